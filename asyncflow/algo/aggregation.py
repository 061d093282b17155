"""How token losses become the one number that is differentiated. Pure.

The loss of an optimizer step is `sum over tokens of weight x token loss / denominator`. A weight
depends on nothing but the token's own sample, and denominators add up over micro-batches.
So the un-normalised sums of any split into micro-batches, divided once by the sum of
their denominators, equal the loss of the whole step: streaming within a step is exact.

| mode          | weight of a sampled token | what a sample adds to the denominator | source                     |
|---------------|---------------------------|---------------------------------------|----------------------------|
| token_mean    | 1                         | its sampled tokens                    | DAPO, arXiv 2503.14476     |
| sequence_mean | 1 / its sampled tokens    | 1                                     | GRPO, arXiv 2402.03300     |
| constant      | 1                         | max_tokens                            | Dr. GRPO, arXiv 2503.20783 |

Every other token has weight 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from asyncflow.core.columns import LOSS_MASK
from asyncflow.core.types import FloatArray, IntArray, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """One of the modes above; `max_tokens` is the longest completion, for `constant`."""

    mode: Literal["token_mean", "sequence_mean", "constant"]
    max_tokens: int

    def weights(self, batch: MicroBatch) -> FloatArray:
        """The weight of each token, `[T]`."""
        mask_T = batch[LOSS_MASK].astype(np.float32)
        if self.mode != "sequence_mean":
            return mask_T
        per_sample_S = 1 / np.maximum(num_sampled(batch), 1)
        return mask_T * np.repeat(per_sample_S, batch.lengths).astype(np.float32)

    def denominator(self, batch: MicroBatch) -> float:
        """What this micro-batch adds to the denominator of the step."""
        match self.mode:
            case "token_mean":
                return float(batch[LOSS_MASK].sum())
            case "sequence_mean":
                return float(len(batch.lengths))
            case "constant":
                return float(len(batch.lengths) * self.max_tokens)


def num_sampled(batch: MicroBatch) -> IntArray:
    """Sampled tokens in each sample, `[S]`.

    >>> from asyncflow.core.types import Ragged
    >>> mask = Ragged.stack([np.array([False, True, True]), np.array([False, True])])
    >>> num_sampled(MicroBatch(rows=(), columns={"token_ids": mask, "loss_mask": mask})).tolist()
    [2, 1]
    """
    sampled_before = np.concatenate([[0], np.cumsum(batch[LOSS_MASK])])
    ends_S = np.cumsum(batch.lengths)
    num_sampled_S: IntArray = (sampled_before[ends_S] - sampled_before[ends_S - batch.lengths]).astype(np.int32)
    return num_sampled_S
