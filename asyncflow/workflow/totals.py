"""What the loop adds up over the micro-batches of one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from asyncflow.core.columns import LOSS_MASK, REWARD, VERSIONS
from asyncflow.core.types import MicroBatch
from asyncflow.workflow.staleness import check_staleness


@dataclass(slots=True, kw_only=True)
class StepTotals:
    """One step at trainer version `step`: the denominator of its gradient, and what it was made of.

    Batches without versions (demonstrations) have no staleness.
    """

    step: int
    bound: int
    denominator: float = 0.0
    num_tokens: int = 0
    num_sampled: int = 0
    num_samples: int = 0
    num_batches: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0
    rewards: list[float] = field(default_factory=list)

    def add(self, batch: MicroBatch, denominator: float) -> None:
        """Count a micro-batch. Raises `StalenessError` if it breaks the bound."""
        self.denominator += denominator
        self.num_batches += 1
        self.num_tokens += batch.num_tokens
        self.num_samples += len(batch.rows)
        self.num_sampled += int(np.count_nonzero(batch[LOSS_MASK]))
        if VERSIONS in batch.columns:
            staleness = check_staleness(batch, self.step, self.bound)
            self.staleness_sum += int(staleness.sum())
            self.staleness_max = max(self.staleness_max, int(staleness.max(initial=0)))
        if REWARD in batch.columns:
            self.rewards += batch[REWARD].astype(float).tolist()

    @property
    def staleness_mean(self) -> float:
        """Versions that a sampled token was old on average."""
        return self.staleness_sum / max(1, self.num_sampled)

    @property
    def reward_mean(self) -> float:
        """Mean reward of the samples; 0 where there are none."""
        return float(np.mean(self.rewards)) if self.rewards else 0.0

    @property
    def length_mean(self) -> float:
        """Sampled tokens of a sample on average."""
        return self.num_sampled / max(1, self.num_samples)
