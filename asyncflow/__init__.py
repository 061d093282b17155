"""asyncflow: post-train language models with reinforcement learning as a streaming dataflow."""

__version__ = "0.1.0"
