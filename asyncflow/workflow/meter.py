"""What a step looked like: one record for the run folder and the terminal.

The meter is an observer in front of the run's observer: it passes everything on and keeps
the spans of the last step, from which it knows how busy each role was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from asyncflow.core.metrics import Observer
from asyncflow.core.types import Group, StepReport
from asyncflow.data.ledger import LedgerCounts
from asyncflow.workflow.totals import StepTotals

Span = tuple[float, float]

DROPPED = "dropped_"
"""How the names begin under which a step's record counts dropped groups by reason."""


class Meter:
    """Turns reports into records. Engines are given it as their observer."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._start_s = self._step_start_s = 0.0
        self._steps = 0
        self._spans: dict[str, list[Span]] = defaultdict(list)

    def begin(self, *, steps: int, now_s: float) -> None:
        """A phase of so many steps begins now, in loop time."""
        self._start_s = self._step_start_s = now_s
        self._steps = steps
        self._spans.clear()

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Pass it on."""
        self._observer.record(kind, values)

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Remember when a role was busy, and pass it on."""
        self._spans[role].append((start_s, end_s))
        self._observer.span(role, name, start_s, end_s)

    def group(self, group: Group) -> None:
        """Pass it on."""
        self._observer.group(group)

    def step(
        self, report: StepReport, totals: StepTotals, counts: LedgerCounts, held: int, now_s: float
    ) -> dict[str, float | int | str]:
        """The record of a step that ended now."""
        seconds = max(1e-9, now_s - self._step_start_s)
        train, rollout, both = self._busy(self._step_start_s, now_s)
        values: dict[str, float | int | str] = {
            "step": report.version.step,
            "steps": self._steps,
            "reward": totals.reward_mean,
            "length": totals.length_mean,
            "staleness_mean": totals.staleness_mean,
            "staleness_max": totals.staleness_max,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
            "learning_rate": report.learning_rate,
            **report.metrics,
            **_effective_sample_size(report.metrics),
            "num_tokens": totals.num_tokens,
            "num_batches": totals.num_batches,
            "tokens_per_s": totals.num_tokens / seconds,
            "admitted": counts.admitted,
            "trained": counts.trained,
            "dropped": sum(counts.dropped.values()),
            **{DROPPED + reason.replace(" ", "_"): count for reason, count in counts.dropped.items()},
            "queued_groups": held,
            "train_busy": train / seconds,
            "rollout_busy": rollout / seconds,
            "both_busy": both / seconds,
            "step_s": seconds,
            "elapsed_s": now_s - self._start_s,
        }
        self._step_start_s = now_s
        self._forget(now_s)
        return values

    def _busy(self, since_s: float, until_s: float) -> tuple[float, float, float]:
        """Seconds that training, rollout and both were busy."""
        train = join_spans(self._spans["train"], since_s, until_s)
        rollout = join_spans(self._spans["rollout"], since_s, until_s)
        return total_s(train), total_s(rollout), total_s(common_spans(train, rollout))

    def _forget(self, before_s: float) -> None:
        for role, spans in self._spans.items():
            self._spans[role] = [span for span in spans if span[1] > before_s]


def _effective_sample_size(metrics: Mapping[str, float]) -> dict[str, float]:
    """(sum w)^2 / (n sum w^2) of the importance ratios w (Kong, 1992): 1 when all weigh the same."""
    if metrics.get("ratio_squared", 0.0) <= 0:
        return {}
    return {"effective_sample_size": metrics["ratio"] ** 2 / metrics["ratio_squared"]}


def join_spans(spans: list[Span], since_s: float, until_s: float) -> list[Span]:
    """The union of spans within a window, as disjoint spans in order.

    >>> join_spans([(0, 2), (5, 9), (1, 3)], 0.5, 6)
    [(0.5, 3), (5, 6)]
    """
    joined: list[Span] = []
    for start_s, end_s in sorted(spans):
        start_s, end_s = max(start_s, since_s), min(end_s, until_s)
        if start_s >= end_s:
            continue
        if joined and start_s <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((start_s, end_s))
    return joined


def common_spans(first: list[Span], second: list[Span]) -> list[Span]:
    """When both were busy; each list is disjoint and in order.

    >>> common_spans([(0, 3), (5, 8)], [(2, 6)])
    [(2, 3), (5, 6)]
    """
    common: list[Span] = []
    i = j = 0
    while i < len(first) and j < len(second):
        start_s, end_s = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if start_s < end_s:
            common.append((start_s, end_s))
        if first[i][1] <= second[j][1]:
            i += 1
        else:
            j += 1
    return common


def total_s(spans: list[Span]) -> float:
    """Seconds in disjoint spans."""
    return sum(end_s - start_s for start_s, end_s in spans)
