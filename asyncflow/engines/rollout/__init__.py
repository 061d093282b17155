"""The built-in rollout engine: any Hugging Face causal language model, in a process of its own."""
