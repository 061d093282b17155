"""Health: a run says itself that it is collapsing, and which setting to change.

A collapse is taken to be a reward or a held-out accuracy a third below its best, an entropy of
hardly anything, or importance ratios far from 1. The first two spoke in the two runs that
collapsed of four (`LOG.md`) and in none of the others; the rest is chosen. They should be
late rather than wrong, since a message is read by a person who may stop the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

RECENT = 5


@dataclass(slots=True)
class Health:
    """Reads step records and evaluations and answers with what is wrong, each thing once until it recovers."""

    max_staleness: int
    best_reward: float = 0.0
    best_accuracy: float = 0.0
    first_entropy: float = 0.0
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    said: set[str] = field(default_factory=set)

    def check(self, record: Mapping[str, float | int | str]) -> list[str]:
        """New warnings after this step, as sentences."""
        values = {name: float(value) for name, value in record.items() if not isinstance(value, str)}
        self.rewards.append(values.get("reward", 0.0))
        mean = sum(self.rewards) / len(self.rewards)
        if len(self.rewards) == RECENT:
            self.best_reward = max(self.best_reward, mean)
        self.first_entropy = self.first_entropy or values.get("entropy", 0.0)
        found = dict(self._problems(values, mean))
        new = [text for name, text in found.items() if name not in self.said]
        self.said = set(found)
        return new

    def check_accuracy(self, accuracy: float, stderr: float) -> list[str]:
        """A warning when the held-out accuracy is clearly below its best: a third of it, and four standard errors."""
        self.best_accuracy = max(self.best_accuracy, accuracy)
        if accuracy >= 0.66 * self.best_accuracy or accuracy + 4 * stderr >= self.best_accuracy:
            return []
        return [
            f"held-out accuracy fell from {self.best_accuracy:.1%} to {accuracy:.1%}: {self._remedy()}",
        ]

    def _remedy(self) -> str:
        lower = " and a lower max_staleness" if self.max_staleness > 1 else ""
        return f"the policy is collapsing. Go back to a checkpoint with a lower train.learning_rate{lower}"

    def _problems(self, values: Mapping[str, float], mean_reward: float) -> Iterator[tuple[str, str]]:
        if self.best_reward > 0.1 and mean_reward < 0.66 * self.best_reward:
            yield (
                "reward",
                f"the reward fell from {self.best_reward:.2f} to {mean_reward:.2f}: {self._remedy()}",
            )
        if self.first_entropy > 0 and values.get("entropy", self.first_entropy) < 0.02 * self.first_entropy:
            yield (
                "entropy",
                f"entropy is {values['entropy']:.4f}, it began at {self.first_entropy:.3f}: the policy hardly explores "
                "any more. Raise algorithm.clip_high, or stop here if the accuracy is what you want",
            )
        ratio = values.get("ratio", 1.0)
        if not 0.67 < ratio < 1.5:
            yield (
                "ratio",
                f"the mean importance ratio is {ratio:.2f}: sampler and trainer disagree about the same tokens. "
                "Lower train.learning_rate or max_staleness; at max_staleness=0 it must be 1",
            )
        size = values.get("effective_sample_size", 1.0)
        if size < 0.3:
            yield (
                "effective_sample_size",
                f"stale tokens leave an effective sample size of {size:.0%} of the batch. Lower max_staleness "
                "or train.learning_rate, or set algorithm.correction=ppo",
            )
