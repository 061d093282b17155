"""The failure budget: a failed rollout is data, until there are too many."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from asyncflow.core.errors import FailureBudgetError, RolloutError

WINDOW = 1024

FAILED = "a rollout failed and its group was dropped"
"""How the message begins that tells the first failure of each reason."""


class FailureBudget:
    """Allows `max_failures` failed groups among the last 1,024. The first of each reason is told to `tell`."""

    def __init__(self, max_failures: int, tell: Callable[[str], None]) -> None:
        self._max_failures = max_failures
        self._tell = tell
        self._recent: deque[str] = deque(maxlen=WINDOW)
        self._told: set[str] = set()

    def spend(self, error: RolloutError) -> None:
        """Count a failed group. Raises `FailureBudgetError` when the budget is spent."""
        self._recent.append(error.reason)
        if error.reason not in self._told:
            self._told.add(error.reason)
            self._tell(f"{FAILED} ({error.reason}): {error}")
        failures = Counter(reason for reason in self._recent if reason)
        if failures.total() > self._max_failures:
            reason, count = failures.most_common(1)[0]
            raise FailureBudgetError(
                f"{failures.total()} of the last {len(self._recent)} groups failed, rollout.max_failures is "
                f"{self._max_failures}; most often ({count} times) for reason {reason!r}. The last one: {error}"
            ) from error

    def succeed(self) -> None:
        """Count a group that worked."""
        self._recent.append("")
