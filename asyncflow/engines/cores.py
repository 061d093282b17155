"""The cores of one machine, divided between rollout and training.

Two processes that each take all cores disturb each other; a core given to a role that
waits is lost. So training computes on the cores that rollout leaves: on all of them while
no completion is being sampled. Decoding small models gains nothing from a second thread
(`LOG.md`), so rollout keeps its number.

A deterministic run computes on one thread for each role, or on the configured numbers:
bits depend on the number, so it can follow neither from what else is running nor from how
many cores there are where the run is resumed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from asyncflow.core.config import RolloutConfig, RunConfig


class Busy(Protocol):
    """A rollout engine that knows how many completions it is sampling."""

    @property
    def num_running(self) -> int:
        """Completions asked for and not yet returned."""
        ...


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def rollout_threads(config: RolloutConfig, *, deterministic: bool = False) -> int:
    """Threads that the rollout engine computes on: the configured number, else half of the cores."""
    return config.threads or (1 if deterministic else max(1, num_cores() // 2))


@dataclass(slots=True, kw_only=True)
class Cores:
    """Threads for each role. `rollout` is set once its engine runs; training gets `fixed` threads where set."""

    total: int
    rollout_threads: int
    train_threads: int
    rollout: Busy | None = None
    fixed: int = 0

    @classmethod
    def of(cls, config: RunConfig) -> Cores:
        """The division for a run; numbers given in the configuration are taken as they are."""
        total = num_cores()
        return cls(
            total=total,
            rollout_threads=rollout_threads(config.rollout, deterministic=config.deterministic),
            train_threads=config.train.threads or (1 if config.deterministic else 0),
        )

    def fix(self, num_threads: int) -> None:
        """Train on so many threads from now on, to repeat what was computed on as many; 0: as ever."""
        self.fixed = num_threads

    def for_training(self) -> int:
        """Threads for the next micro-batch."""
        is_shared = self.rollout is not None and self.rollout.num_running > 0
        return self.while_sampling if is_shared else self.fixed or self.train_threads or self.total

    @property
    def while_sampling(self) -> int:
        """Threads for a micro-batch while completions are being sampled."""
        return self.fixed or self.train_threads or max(1, self.total - self.rollout_threads)
