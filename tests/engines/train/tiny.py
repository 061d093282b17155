"""Tiny engines and micro-batches for tests of the training engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from asyncflow.algo.advantages import grpo
from asyncflow.algo.aggregation import Aggregation
from asyncflow.algo.corrections import Clipped
from asyncflow.algo.losses import PolicyLoss
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, TOKEN_IDS
from asyncflow.core.config import TrainConfig
from asyncflow.core.types import MicroBatch, Ragged, Rows
from asyncflow.engines.models import build_character_model
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_engine import TorchTrainEngine

ALPHABET = "0123456789+="
VOCABULARY = len(ALPHABET) + 2
MAX_TOKENS = 12

PHASE = Phase(learning_rate=1e-3, betas=(0.9, 0.99), weight_decay=0.0, max_grad_norm=1.0)
CONFIG = TrainConfig(device="cpu", threads=1)

Mode = Literal["token_mean", "sequence_mean", "constant"]


def build_tiny_model(folder: Path, seed: int = 3) -> str:
    """Two layers, 14 tokens."""
    build_character_model(
        folder, alphabet=ALPHABET, layers=2, width=32, heads=4, intermediate=48, max_len=64, seed=seed
    )
    return str(folder)


@asynccontextmanager
async def open_engine(
    source: str,
    phase: Phase = PHASE,
    config: TrainConfig = CONFIG,
    export_dtype: str = "float32",
    lineage: str = "",
) -> AsyncIterator[TorchTrainEngine]:
    engine = await TorchTrainEngine.open(source, config, phase=phase, export_dtype=export_dtype, lineage=lineage)
    try:
        yield engine
    finally:
        await engine.aclose()


def make_loss(mode: Mode = "token_mean") -> PolicyLoss:
    return PolicyLoss(
        correction=Clipped(clip_low=0.2, clip_high=0.28), aggregation=Aggregation(mode=mode, max_tokens=MAX_TOKENS)
    )


def make_batch(group_sizes: Sequence[int], seed: int = 0) -> MicroBatch:
    """Groups of these sizes: samples of 3 to 20 tokens, as if sampled by a policy nearby.

    Advantages add up to 0 in every group, as they do in a run, so that gradients cancel.
    """
    rng = np.random.default_rng(seed)
    num_samples = sum(group_sizes)
    prompts = rng.integers(1, 9, num_samples)
    completions = rng.integers(2, MAX_TOKENS + 1, num_samples)
    lengths = (prompts + completions).astype(np.int32)
    mask = np.concatenate([np.arange(p + c) >= p for p, c in zip(prompts, completions, strict=True)])
    near_uniform = -np.log(VOCABULARY) + rng.normal(scale=0.3, size=len(mask))
    columns = {
        TOKEN_IDS: Ragged(values=rng.integers(0, VOCABULARY, len(mask)).astype(np.int32), lengths=lengths),
        LOSS_MASK: Ragged(values=mask, lengths=lengths),
        LOGPROBS: Ragged(values=np.where(mask, near_uniform, 0).astype(np.float32), lengths=lengths),
        ADVANTAGE: Ragged(
            values=np.concatenate([grpo(rng.normal(size=size).astype(np.float32)) for size in group_sizes]),
            lengths=np.ones(num_samples, np.int32),
        ),
    }
    parts = [Rows.of_groups(np.array([7 + group]), size) for group, size in enumerate(group_sizes)]
    return MicroBatch(rows=Rows.join(parts), columns=columns)


def select(batch: MicroBatch, samples: Sequence[int]) -> MicroBatch:
    """Some samples of a batch, in this order."""
    columns = {name: [column.rows()[i] for i in samples] for name, column in batch.columns.items()}
    chosen = {name: Ragged.stack(rows) for name, rows in columns.items()}
    return MicroBatch(rows=batch.rows[np.array(samples, np.int64)], columns=chosen)


def gradient(engine: TorchTrainEngine) -> torch.Tensor:
    """All gradients that the engine has accumulated, as one vector; the engine goes on without them."""
    parameters = engine._parameters.values()
    vector = torch.cat([p.grad.reshape(-1).clone() for p in parameters if p.grad is not None])
    for parameter in parameters:
        parameter.grad = None
    return vector
