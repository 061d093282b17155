"""Micro-batches for tests of losses."""

from collections.abc import Sequence

import numpy as np

from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, REF_LOGPROBS, TOKEN_IDS
from asyncflow.core.types import MicroBatch, Ragged, Rows


def make_batch(masks: Sequence[Sequence[bool]], seed: int = 0) -> MicroBatch:
    """Samples with these loss masks, and random numbers in all columns that losses read."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(mask) for mask in masks], np.int32)
    total = int(lengths.sum())
    sampled = np.concatenate([np.array(mask, np.bool_) for mask in masks])

    def per_token(values: np.ndarray) -> Ragged:
        return Ragged(values=values, lengths=lengths)

    return MicroBatch(
        rows=Rows.of_groups(np.array([3]), len(masks)),
        columns={
            TOKEN_IDS: per_token(rng.integers(0, 9, total).astype(np.int32)),
            LOSS_MASK: per_token(sampled),
            LOGPROBS: per_token(np.where(sampled, -rng.exponential(1, total), 0).astype(np.float32)),
            REF_LOGPROBS: per_token(np.where(sampled, -rng.exponential(1, total), 0).astype(np.float32)),
            ADVANTAGE: Ragged(
                values=rng.normal(size=len(masks)).astype(np.float32), lengths=np.ones(len(masks), np.int32)
            ),
        },
    )
