"""The meter: the arithmetic of busy spans against a grid, and the record of a step."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.types import Group, PolicyVersion, StepReport
from asyncflow.data.ledger import LedgerCounts
from asyncflow.workflow.meter import Meter, Span, common_spans, join_spans, total_s
from asyncflow.workflow.totals import StepTotals

END = 24
SPANS = st.lists(st.tuples(st.integers(0, END), st.integers(0, END)).map(lambda pair: (min(pair), max(pair))))
WINDOW = st.tuples(st.integers(0, END), st.integers(0, END)).map(lambda pair: (min(pair), max(pair)))


def seconds_of(spans: list[tuple[int, int]]) -> set[int]:
    """The whole seconds that spans cover; spans begin and end at whole seconds here."""
    return {second for start, end in spans for second in range(start, end)}


def as_spans(spans: list[tuple[int, int]]) -> list[Span]:
    return [(float(start), float(end)) for start, end in spans]


def grid(spans: list[Span]) -> set[int]:
    return seconds_of([(int(start), int(end)) for start, end in spans])


@given(SPANS, WINDOW)
def test_joined_spans_cover_what_the_spans_cover_in_the_window(
    spans: list[tuple[int, int]], window: tuple[int, int]
) -> None:
    joined = join_spans(as_spans(spans), *window)
    assert grid(joined) == seconds_of(spans) & set(range(*window))
    assert total_s(joined) == len(grid(joined))
    edges = [edge for span in joined for edge in span]
    assert edges == sorted(set(edges))  # in order, disjoint, not even touching


@given(SPANS, SPANS)
def test_common_spans_cover_what_both_cover(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    common = common_spans(join_spans(as_spans(one), 0, END), join_spans(as_spans(other), 0, END))
    assert grid(common) == seconds_of(one) & seconds_of(other)
    assert total_s(common) == len(grid(common))


class Notes:
    """An observer that keeps spans and records."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, float, float]] = []
        self.records: list[tuple[str, Mapping[str, float | int | str]]] = []

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        self.records.append((kind, values))

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        self.spans.append((role, name, start_s, end_s))

    def group(self, group: Group) -> None:
        """Forget it."""


def report(step: int, **metrics: float) -> StepReport:
    return StepReport(
        version=PolicyVersion(step=step),
        loss=-0.5,
        grad_norm=2.0,
        learning_rate=1e-3,
        num_tokens=40,
        num_samples=4,
        metrics=metrics,
    )


COUNTS = LedgerCounts(admitted=9, trained=5, dropped={"no signal": 2, "reward": 1}, pending=1)


def take_step(meter: Meter, now_s: float, step: int = 1, **metrics: float) -> dict[str, float | int | str]:
    totals = StepTotals(step=step - 1, bound=1, num_tokens=40)
    return meter.step(report(step, **metrics), totals, COUNTS, 3, now_s)


def test_shares_are_of_the_step_and_spans_over_its_end_count_in_both_steps() -> None:
    notes = Notes()
    meter = Meter(notes)
    meter.begin(steps=2, now_s=100.0)
    meter.span("train", "accumulate", 100.0, 104.0)
    meter.span("rollout", "decode", 102.0, 106.0)
    meter.span("rollout", "decode", 109.0, 110.0)
    first = take_step(meter, 110.0)
    assert (first["train_busy"], first["rollout_busy"], first["both_busy"]) == (0.4, 0.5, 0.2)
    assert (first["step_s"], first["elapsed_s"], first["tokens_per_s"]) == (10.0, 10.0, 4.0)
    meter.span("rollout", "decode", 108.0, 112.0)  # reported late: half of it was before the step
    second = take_step(meter, 114.0, step=2)
    assert (second["train_busy"], second["rollout_busy"]) == (0.0, 0.5)
    assert (second["step_s"], second["elapsed_s"]) == (4.0, 14.0)
    assert len(notes.spans) == 4  # all passed on


def test_the_record_says_what_became_of_the_tickets() -> None:
    meter = Meter(Notes())
    meter.begin(steps=2, now_s=0.0)
    record = take_step(meter, 1.0)
    wanted = {"admitted": 9, "trained": 5, "dropped": 3, "dropped_no_signal": 2, "dropped_reward": 1}
    assert {name: record[name] for name in wanted} == wanted
    assert (record["step"], record["steps"], record["queued_groups"], record["loss"]) == (1, 2, 3, -0.5)


def test_the_effective_sample_size_is_1_where_all_weigh_the_same() -> None:
    meter = Meter(Notes())
    meter.begin(steps=2, now_s=0.0)
    assert take_step(meter, 1.0, ratio=0.9, ratio_squared=0.81)["effective_sample_size"] == pytest.approx(1.0)
    # one token of two weighs 2, the other nothing: half of them count
    assert take_step(meter, 2.0, ratio=1.0, ratio_squared=2.0)["effective_sample_size"] == 0.5
    assert "effective_sample_size" not in take_step(meter, 3.0)


def test_a_phase_begins_with_nobody_busy() -> None:
    meter = Meter(Notes())
    meter.begin(steps=2, now_s=0.0)
    meter.span("train", "accumulate", 0.0, 20.0)
    meter.begin(steps=2, now_s=10.0)
    assert take_step(meter, 20.0)["train_busy"] == 0.0
