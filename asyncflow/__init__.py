"""asyncflow: post-train language models with reinforcement learning as a streaming dataflow.

What a recipe needs is here; it is imported when first used, so `import asyncflow` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncflow.core.config import (
        AlgorithmConfig,
        CheckpointConfig,
        EvaluateConfig,
        RolloutConfig,
        RunConfig,
        SamplingConfig,
        TrainConfig,
        WarmupConfig,
    )
    from asyncflow.core.types import Demonstration, Prompt
    from asyncflow.data.prompts import read_prompts
    from asyncflow.recipes.recipe import Task
    from asyncflow.rollout.chat import Agent, Chat
    from asyncflow.rollout.rewards import Reward, score, single_turn

__version__ = "0.1.0"

HOMES = {
    "asyncflow.core.config": (
        "AlgorithmConfig",
        "CheckpointConfig",
        "EvaluateConfig",
        "RolloutConfig",
        "RunConfig",
        "SamplingConfig",
        "TrainConfig",
        "WarmupConfig",
    ),
    "asyncflow.core.types": ("Demonstration", "Prompt"),
    "asyncflow.data.prompts": ("read_prompts",),
    "asyncflow.recipes.recipe": ("Task",),
    "asyncflow.rollout.chat": ("Agent", "Chat"),
    "asyncflow.rollout.rewards": ("Reward", "score", "single_turn"),
}
"""Where each public name lives."""

__all__ = [
    "Agent",
    "AlgorithmConfig",
    "Chat",
    "CheckpointConfig",
    "Demonstration",
    "EvaluateConfig",
    "Prompt",
    "Reward",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "Task",
    "TrainConfig",
    "WarmupConfig",
    "read_prompts",
    "score",
    "single_turn",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    for home, names in HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"asyncflow has no {name!r}; it has {', '.join(__all__)}")
