"""What a put, a take, a write and an acknowledgement cost, with a thousand rows pending and with a million.

Counted, not timed: calls of functions, and elements of the queue's own arrays that are looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from asyncflow.core.types import Rows
from asyncflow.data import window
from asyncflow.data.control import ControlPlane
from asyncflow.data.layout import lay_out
from asyncflow.data.ledger import Ledger, QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.log import NoLog
from asyncflow.data.sessions import Lease, Taken

FEW, MANY, BLOCK, BATCH = 1_000, 1_000_000, 100, 32
CYCLES = 60
TASKS = [QueueTask(name="read", needs=("x",)), QueueTask(name="learn", needs=("x", "late"))]
touched = 0


class Counted(np.ndarray[Any, Any]):
    """Counts the elements that functions look at."""

    def __array_ufunc__(self, ufunc: np.ufunc, method: Any, *inputs: Any, out: Any = None, **keys: Any) -> Any:
        global touched
        touched += max(getattr(each, "size", 1) for each in inputs)
        if out is not None:
            keys["out"] = tuple(map(plain, out))
        result = getattr(ufunc, method)(*map(plain, inputs), **keys)
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, func: Callable[..., Any], types: Any, args: Any, keys: Any) -> Any:
        global touched
        touched += max((each.size for each in args if isinstance(each, np.ndarray)), default=0)
        return func(*map(plain, args), **keys)


def plain(value: Any) -> Any:
    if isinstance(value, Counted):
        return value.view(np.ndarray)
    return tuple(map(plain, value)) if type(value) in (list, tuple) else value


class Bench:
    """A queue that is driven below its asynchronous face, where the work is."""

    def __init__(self, tasks: Sequence[QueueTask]) -> None:
        self.queue = LocalQueue(tasks, control=ControlPlane(Ledger(tasks), NoLog()))
        self.control, self.session = self.queue.control, self.queue._session
        self.leases = 1_000

    def put(self, num_rows: int) -> None:
        drafts, num_bytes, _ = lay_out({"x": np.zeros(num_rows, np.uint8)})
        written = self.queue._memory._writer.write(drafts, num_bytes)
        assert written is not None
        self.control.put(self.session, None, num_rows, 1, *written, lambda first: None)

    def take(self, task: str, num_rows: int = BATCH) -> tuple[Lease, Rows]:
        self.leases += 1
        lease = self.control.leases.open(self.session, task, self.leases)
        given: list[Taken] = []
        self.control.leases.take(self.session, lease, given.append, max_groups=num_rows)
        assert len(given[0].tickets) == num_rows
        return lease, self.control.rows_of(given[0].tickets)

    def write(self, rows: Rows) -> None:
        drafts, num_bytes, _ = lay_out({"late": np.zeros(len(rows), np.uint8)})
        written = self.queue._memory._writer.write(drafts, num_bytes)
        assert written is not None
        self.control.write(self.session, rows, *written, lambda count: None, missing_ok=False)

    def acknowledge(self, lease: Lease) -> None:
        self.control.acknowledge(self.session, lease.number, lambda: None)

    def cycles(self, costs: dict[str, list[tuple[int, int]]], *, is_late: bool) -> None:
        """So many rows come and so many go; those of each second batch before those of the first."""
        held: list[tuple[Lease, Rows]] = []
        learnt: list[Lease] = []
        for number in range(CYCLES):
            with measured(costs["put"]):
                self.put(BATCH)
            with measured(costs["take"]):
                held.append(self.take("read"))
            if is_late:
                with measured(costs["write"]):
                    self.write(held[-1][1])
                learnt.append(self.take("learn")[0])
            if number % 2:
                for lease in [learnt[1], learnt[0]] if is_late else []:
                    with measured(costs["acknowledge"]):
                        self.acknowledge(lease)
                for lease, _ in reversed(held):
                    with measured(costs["acknowledge"]):
                        self.acknowledge(lease)
                held.clear()
                learnt.clear()


@contextmanager
def measured(costs: list[tuple[int, int]]) -> Iterator[None]:
    """The calls and the elements of what is done inside."""
    num_calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    before = touched
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)
    costs.append((num_calls, touched - before))


def costs_at(num_pending: int, *, is_late: bool) -> dict[str, list[tuple[int, int]]]:
    costs: dict[str, list[tuple[int, int]]] = {"put": [], "take": [], "write": [], "acknowledge": []}
    bench = Bench(TASKS if is_late else TASKS[:1])
    try:
        for _ in range(2 * num_pending // BLOCK):
            bench.put(BLOCK)
        for _ in range(98):  # a little less than half: what is gone is still in the windows
            bench.acknowledge(bench.take("read", num_pending // 100)[0])
        bench.cycles(costs, is_late=is_late)
        assert bench.control.counts().pending >= num_pending
    finally:
        bench.queue.close()
    return costs


def middle(values: Sequence[int]) -> int:
    return sorted(values)[len(values) // 2]


@pytest.mark.slow
@pytest.mark.parametrize("is_late", [False, True])
def test_8_the_cost_of_an_operation_is_flat_to_a_million_rows(monkeypatch: pytest.MonkeyPatch, is_late: bool) -> None:
    """With the batches acknowledged out of order, and with a column written afterwards."""
    counting = SimpleNamespace(
        full=lambda *args: np.full(*args).view(Counted),
        frombuffer=lambda *args: np.frombuffer(*args).view(Counted),
        uint8=np.uint8,
        int64=np.int64,
        bool_=np.bool_,
    )
    monkeypatch.setattr(window, "np", counting)
    few, many = costs_at(FEW, is_late=is_late), costs_at(MANY, is_late=is_late)
    assert sum(elements for costs in few.values() for _, elements in costs) > 1000  # something was counted
    for name in few:
        for kind in (0, 1):
            small, large = ([cost[kind] for cost in costs[name]] for costs in (few, many))
            if small:
                assert middle(large) <= 1.3 * middle(small) + 2, (name, kind)
                assert max(large) <= 4 * max(small) + 64 * BATCH, (name, kind)
