"""Tiny models with opinions, and what they make of a sequence in one plain forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from asyncflow.core.types import FloatArray, IntArray
from asyncflow.engines.channel import Array
from asyncflow.engines.rollout.attention import register

VOCABULARY = 18
CONTEXT = 1024
WINDOW = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: Mapping[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, max_position_embeddings=CONTEXT),
    "tied llama": LlamaConfig(**SIZES, max_position_embeddings=CONTEXT, tie_word_embeddings=True),
    "qwen2, 4 queries to 2 keys": Qwen2Config(**SIZES, max_position_embeddings=CONTEXT, num_key_value_heads=2),
    "mistral, within its window": MistralConfig(
        **SIZES, max_position_embeddings=CONTEXT, num_key_value_heads=1, sliding_window=WINDOW
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    ),
}


def build(name: str = "llama", seed: int = 1) -> PreTrainedModel:
    """A model whose weights are larger than usual, so that its distributions are far from uniform."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=register())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval().requires_grad_(requires_grad=False)


def save(model: PreTrainedModel, folder: Path) -> str:
    """The folder, with the model in it."""
    model.save_pretrained(folder)
    return str(folder)


def shapes(model: PreTrainedModel) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a weight channel must carry."""
    return {name: ("float32", tuple(parameter.shape)) for name, parameter in model.named_parameters()}


def parameters(model: PreTrainedModel) -> dict[str, Array]:
    """The weights, by the channel's names."""
    return {name: parameter.numpy() for name, parameter in model.named_parameters()}


@torch.no_grad()
def score(model: PreTrainedModel, sequence: IntArray) -> FloatArray:
    """Log-probs `[L - 1]` of every token but the first."""
    tokens = torch.from_numpy(sequence.astype(np.int64))[None]
    logprobs = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    scores: FloatArray = logprobs.gather(1, tokens[0, 1:, None])[:, 0].numpy()
    return scores


def prompts(lengths: Iterable[int], seed: int = 0) -> list[IntArray]:
    """Random prompts of these lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]
