"""The scheduler against drawn histories: rows stay dense, limits hold, nobody is overtaken or lost."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from asyncflow.engines.rollout.scheduler import Limits, Request, Scheduler

LIMITS = Limits(max_running=4, prefill_tokens=20, cache_tokens=60)


def request(number: int, *, prompt: int = 4, most: int = 4, priority: int = 0, key: bytes | None = None) -> Request:
    return Request(
        id=number,
        prompt_key=b"%d" % number if key is None else key,
        prompt_tokens=prompt,
        max_tokens=most,
        priority=priority,
    )


def ids(requests: list[Request]) -> list[int]:
    return [one.id for one in requests]


def test_higher_priority_first_then_arrival() -> None:
    scheduler = Scheduler(Limits(max_running=9, prefill_tokens=99, cache_tokens=999))
    for number, priority in enumerate([0, 5, 0, 5, -1]):
        scheduler.submit(request(number, priority=priority))
    assert ids(scheduler.admit()) == [1, 3, 0, 2, 4]


def test_a_free_row_is_refilled() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(6):
        scheduler.submit(request(number))
    assert ids(scheduler.admit()) == [0, 1, 2, 3]
    assert scheduler.admit() == []
    scheduler.release([1])
    assert ids(scheduler.admit()) == [4]
    assert ids(scheduler.running) == [0, 3, 2, 4]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 1)


def test_prompts_computed_before_one_step_are_bounded() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(3):
        scheduler.submit(request(number, prompt=9, most=1))
    assert ids(scheduler.admit()) == [0, 1]
    assert ids(scheduler.admit()) == [2]


def test_a_prompt_longer_than_the_bound_is_admitted_alone() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.submit(request(0, prompt=500))
    scheduler.submit(request(1))
    assert ids(scheduler.admit()) == [0]


def test_siblings_cost_their_prompt_once() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(4):
        scheduler.submit(request(number, prompt=14, most=1, key=b"same"))
    assert ids(scheduler.admit()) == [0, 1, 2, 3]


def test_the_cache_bounds_what_runs() -> None:
    scheduler = Scheduler(LIMITS)
    for number in range(3):
        scheduler.submit(request(number, prompt=5, most=20))
    assert ids(scheduler.admit()) == [0, 1]
    scheduler.release([0])
    assert ids(scheduler.admit()) == [2]


def test_a_withdrawn_request_never_runs() -> None:
    scheduler = Scheduler(LIMITS)
    scheduler.submit(request(0))
    scheduler.submit(request(1))
    assert scheduler.withdraw(0)
    assert not scheduler.withdraw(0)
    assert ids(scheduler.admit()) == [1]
    assert not scheduler.withdraw(1)
    assert scheduler.row_of(1) == 0
    assert scheduler.row_of(0) is None


@dataclass(slots=True)
class Model:
    """What the scheduler should be doing, told by its answers alone."""

    rows: list[int] = field(default_factory=list)
    waiting: list[Request] = field(default_factory=list)
    done: set[int] = field(default_factory=set)

    def check_admitted(self, admitted: list[Request]) -> None:
        for one in admitted:
            assert one == min(self.waiting, key=lambda other: (-other.priority, other.id)), "overtaken"
            self.waiting.remove(one)
            self.rows.append(one.id)

    def release(self, scheduler: Scheduler, rows: set[int]) -> None:
        before = list(self.rows)
        self.done |= {before[row] for row in rows}
        moves = scheduler.release(sorted(rows))
        sources, targets = {move.source for move in moves}, {move.target for move in moves}
        assert not sources & targets, "moves must be independent of their order"
        assert targets <= rows
        for move in moves:
            before[move.target] = before[move.source]
        self.rows = before[: len(before) - len(rows)]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 30), st.integers(1, 40), st.integers(-1, 1)),
        st.tuples(st.just("admit"), st.just(0), st.just(0), st.just(0)),
        st.tuples(st.just("release"), st.integers(0, 15), st.just(0), st.just(0)),
        st.tuples(st.just("withdraw"), st.integers(0, 9), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(operations)
def test_rows_are_dense_limits_hold_and_all_are_served(drawn: list[tuple[str, int, int, int]]) -> None:
    scheduler, model, number = Scheduler(LIMITS), Model(), 0
    for operation, first, second, priority in drawn:
        if operation == "submit":
            one = request(number, prompt=first, most=second, priority=priority, key=b"%d" % (first % 3))
            scheduler.submit(one)
            model.waiting.append(one)
            number += 1
        elif operation == "admit":
            model.check_admitted(scheduler.admit())
        elif operation == "release":
            model.release(scheduler, {row for row in range(len(model.rows)) if first >> row & 1})
        elif model.waiting:
            one = model.waiting.pop(first % len(model.waiting))
            model.done.add(one.id)
            assert scheduler.withdraw(one.id)
        assert ids(scheduler.running) == model.rows
        longest = max((one.most_tokens for one in scheduler.running), default=0)
        assert len(model.rows) <= 1 or len(model.rows) * longest <= LIMITS.cache_tokens
        assert len(model.rows) <= LIMITS.max_running
    while scheduler.num_running or scheduler.num_waiting:
        model.check_admitted(scheduler.admit())
        assert model.rows, "nothing runs although something waits"
        model.release(scheduler, {0})
    assert model.done == set(range(number))
