"""What is refused changes nothing, and what ended stays ended: on the control plane itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from asyncflow.core.errors import ColumnError, LeaseLostError, QueueError, StaleHandleError
from asyncflow.core.types import PolicyVersion, Rows
from asyncflow.data import journal, leases, log_reader, records
from asyncflow.data.arena import Arena
from asyncflow.data.control import ControlPlane
from asyncflow.data.directory import Extent
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnSpec, lay_out
from asyncflow.data.ledger import Ledger, QueueTask
from asyncflow.data.log import Log, MemoryLog, NoLog
from asyncflow.data.plane import Writer
from asyncflow.data.sessions import Lease, ParkedTake, Session, Taken
from tests.data.arenas import arenas_open

READ, LEARN = QueueTask(name="read", needs=("x",)), QueueTask(name="learn", needs=("x", "late"))
TRAIN = QueueTask(name="train", needs=("x",), trains=True)
GATE = Gate(groups_per_step=2, max_staleness=1, steps=9)


class Plane:
    """A control plane with one user, who gets its answers at once."""

    def __init__(self, *tasks: QueueTask, gate: Gate | None = None, log: Log | None = None) -> None:
        self.control = ControlPlane(Ledger(tasks, gate), log or NoLog())
        self.ledger = self.control.ledger
        self.freed: list[Extent] = []
        self.session = self.control.open_session("test", self.freed.append)
        self.writer = Writer(self.control.memory.attach(self.session, lambda number: Arena.create(1 << 16, number)))
        self.num_leases = 0

    def block(self, **columns: int) -> tuple[Extent, tuple[ColumnSpec, ...]]:
        """Columns of so many rows."""
        drafts, num_bytes, _ = lay_out({name: np.zeros(num_rows) for name, num_rows in columns.items()})
        written = self.writer.write(drafts, num_bytes)
        assert written is not None
        return written

    def put(self, num_rows: int, *names: str, ticket: int | None = None, group_size: int = 1) -> int:
        block = self.block(**dict.fromkeys(names or ("x",), num_rows))
        done: list[int] = []
        self.control.put(self.session, ticket, num_rows // group_size, group_size, *block, done.append)
        return done[0]

    def write(self, rows: Rows, *names: str) -> None:
        block = self.block(**dict.fromkeys(names, len(rows)))
        self.control.write(self.session, rows, *block, lambda n: None, missing_ok=False)

    def take(self, task: str, max_groups: int = 99, at_least: int = 1) -> tuple[Lease, list[Taken], ParkedTake | None]:
        self.num_leases += 1
        lease = self.control.leases.open(self.session, task, self.num_leases)
        given: list[Taken] = []
        parked = self.control.leases.take(self.session, lease, given.append, max_groups=max_groups, at_least=at_least)
        return lease, given, parked

    def acknowledge(self, lease: Lease, step: int = 0, session: Session | None = None) -> None:
        self.control.acknowledge(session or self.session, lease.number, lambda: None, step=step)

    def rows(self, *tickets: int) -> Rows:
        return self.control.rows_of(np.array(tickets))


@pytest.fixture
def plane() -> Iterator[Callable[..., Plane]]:
    made: list[Plane] = []

    def make(*tasks: QueueTask, gate: Gate | None = None, log: Log | None = None) -> Plane:
        made.append(Plane(*tasks, gate=gate, log=log))
        return made[-1]

    yield make
    for each in made:
        each.control.close()
    assert arenas_open() == []


Make = Callable[..., Plane]

# -- leases ----------------------------------------------------------------------------------


def test_a_take_that_waits_while_the_queue_is_cleared_can_acknowledge_what_it_gets(plane: Make) -> None:
    queue = plane(READ)
    queue.put(2)
    held, _, _ = queue.take("read")
    waiting, given, _ = queue.take("read")
    queue.control.clear()
    with pytest.raises(LeaseLostError):
        queue.acknowledge(held)
    queue.put(3)
    assert [len(taken.tickets) for taken in given] == [3]
    queue.acknowledge(waiting)
    assert queue.control.counts().trained == 3
    assert queue.control.num_blocks == 0


def test_a_lease_whose_take_waits_can_not_be_ended(plane: Make) -> None:
    queue = plane(READ)
    lease, given, parked = queue.take("read")
    with pytest.raises(LeaseLostError):
        queue.acknowledge(lease)
    with pytest.raises(LeaseLostError):
        queue.control.release(queue.session, lease.number)
    queue.put(1)
    assert len(given) == 1
    queue.acknowledge(lease)
    assert queue.control.counts().trained == 1
    other, _, parked = queue.take("read")
    assert parked is not None
    assert queue.control.cancel(parked)
    queue.control.release(queue.session, other.number)


def test_a_lease_that_ended_gives_nothing_back_that_others_hold(plane: Make) -> None:
    """The answer to the first came too late: the groups were offered again, and are another's."""
    queue = plane(READ)
    queue.put(2)
    lease, given, _ = queue.take("read")
    queue.control.release(queue.session, lease.number, leases.EXPIRED)
    other, again, _ = queue.take("read")
    assert again[0].tickets is not None
    assert len(again[0].tickets) == 2
    queue.control.give_back(lease, given[0].tickets)
    assert queue.ledger.num_ready("read") == 0
    queue.acknowledge(other)
    assert queue.control.counts().trained == 2


def test_a_second_trainer_is_refused(plane: Make) -> None:
    queue = plane(TRAIN, gate=GATE)
    queue.control.advance(PolicyVersion(step=0))
    queue.ledger.last_step = 4
    granted: list[int] = []
    for _ in range(4):
        queue.control.reserve(queue.session, granted.append)
    for ticket in granted:
        queue.put(1, ticket=ticket)
    lease, _, _ = queue.take("train", 1)
    for step in (4, 6, 1):
        with pytest.raises(LeaseLostError, match=f"step {step} was acknowledged after step 4: another trainer"):
            queue.acknowledge(lease, step)
    queue.acknowledge(lease, 5)
    lease, _, _ = queue.take("train", 1)
    with pytest.raises(LeaseLostError, match="after step 5"):
        queue.acknowledge(lease, 5)
    queue.acknowledge(lease)  # a step that nobody counts
    assert queue.control.counts().trained == 2


# -- tickets ---------------------------------------------------------------------------------


def test_a_ticket_named_twice_is_dropped_once(plane: Make) -> None:
    queue = plane(READ)
    queue.put(2)
    queue.put(1)
    queue.control.drop(queue.session, np.array([2, 0, 0, 2]), "why")
    assert dict(queue.control.counts().dropped) == {"why": 2}
    assert queue.control.num_blocks == 1
    assert len(queue.freed) == 1
    with pytest.raises(StaleHandleError, match="never admitted"):
        queue.control.drop(queue.session, np.array([1, 7]), "why")
    assert queue.control.counts().pending == 1


def test_unsorted_tickets_of_which_some_are_forgotten_touch_no_others(plane: Make) -> None:
    """The first of the array is the youngest; those dropped long ago are behind the window."""
    unsorted = np.concatenate([np.arange(400, 600), np.arange(400)])
    queue = plane(READ)
    queue.put(600)
    held, _, _ = queue.take("read", 600)
    held.parts = [unsorted]
    queue.control.drop(queue.session, np.arange(400), "old")
    assert queue.ledger._window.base == 400
    queue.put(200)
    other, _, _ = queue.take("read", 200)  # its tickets lie where those before the window would
    queue.acknowledge(held)
    assert queue.control.counts().trained == 200
    queue.acknowledge(other)
    assert queue.control.counts().trained == 400

    queue = plane(READ)
    queue.put(600)
    lease, _, _ = queue.take("read", 600)
    lease.parts = [unsorted]
    queue.control.release(queue.session, lease.number)  # in line in this order
    queue.control.drop(queue.session, np.arange(400), "old")
    assert queue.ledger._window.base == 400
    queue.put(200)
    _, given, _ = queue.take("read", 401)
    assert given[0].tickets.tolist() == [*range(400, 800)]  # type: ignore[union-attr]
    assert queue.ledger.num_ready("read") == 0


# -- puts and writes -------------------------------------------------------------------------


def state(queue: Plane) -> Sequence[object]:
    ledger = queue.ledger
    return ledger.counts(), ledger.num_ready("read"), sorted(queue.session.reserved), queue.control.num_blocks


def test_a_put_that_is_refused_issues_no_ticket(plane: Make) -> None:
    queue = plane(READ)
    before = state(queue)
    with pytest.raises(ColumnError, match="at most 63 columns"):
        queue.put(1, *(f"x{number}" for number in range(70)))
    with pytest.raises(ColumnError, match="at most 1024 letters"):
        queue.put(1, "x" * 2000)
    extent, (spec,) = queue.block(x=1)
    shared = ColumnSpec("x", spec.dtype, spec.kind, (), True, 1, 1, 0, 0)
    for size in (0, -1, 1 << 24 | 1, 1 << 31, 1 << 40, 1 << 70):
        with pytest.raises(ColumnError, match="groups of"):
            queue.control.put(queue.session, None, 1, size, extent, (shared,), lambda first: None)
    shared = ColumnSpec("x", spec.dtype, spec.kind, (0,), True, 1 << 20, 1 << 20, 0, 0)
    with pytest.raises(ColumnError, match="too many"):
        queue.control.put(queue.session, None, 1 << 20, 1 << 20, extent, (shared,), lambda first: None)
    assert state(queue) == before
    for number in range(62):
        queue.put(1, f"x{number}")  # none of the names above was kept


def test_a_reserved_ticket_stays_reserved_where_its_put_is_refused(plane: Make) -> None:
    queue = plane(READ, TRAIN, gate=GATE)
    queue.control.advance(PolicyVersion(step=0))
    queue.control.reserve(queue.session, lambda ticket: None)
    before = state(queue)
    with pytest.raises(QueueError, match="a reserved ticket is one group"):
        queue.put(2, ticket=0)
    with pytest.raises(ColumnError, match="at most 63 columns"):
        queue.put(1, *(f"x{number}" for number in range(70)), ticket=0)
    assert state(queue) == before
    queue.put(1, ticket=0)


@pytest.mark.parametrize(
    "names", [("late", "x"), ("late", *(f"y{number}" for number in range(62))), ("late", "was written")]
)
def test_a_write_that_is_refused_books_none_of_its_columns(plane: Make, names: Sequence[str]) -> None:
    queue = plane(READ, LEARN)
    queue.put(4, group_size=2)
    queue.write(queue.rows(0, 1), "was written")
    with pytest.raises(ColumnError):
        queue.write(queue.rows(0, 1), *names)
    assert queue.ledger.num_ready("learn") == 0
    queue.write(queue.rows(0, 1), "late")
    assert queue.ledger.num_ready("learn") == 2


def test_a_handle_of_rows_that_its_groups_do_not_have_is_not_looked_up(plane: Make) -> None:
    queue = plane(READ)
    queue.put(4, group_size=2)
    rows = queue.rows(0, 1)
    for move in (1, -1, 2, 1 << 20):
        with pytest.raises(StaleHandleError, match="rows that its groups do not have"):
            queue.control.locate(Rows(rows.tickets, rows.indices + np.int32(move), rows.generation), ("x",))
    assert queue.control.locate(rows, ("x",))


# -- the log ---------------------------------------------------------------------------------


def logged(log: MemoryLog, kind: type[records.AnyRecord]) -> list[records.AnyRecord]:
    return [record for meta, _ in log.records if isinstance(record := records.decode(meta), kind)]


def test_what_does_not_fit_a_record_is_refused_before_it_is_done(plane: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = plane(READ, TRAIN, log=MemoryLog())
    queue.put(8)
    before = state(queue)
    monkeypatch.setattr(journal, "MAX_PAYLOAD_BYTES", 50)
    with pytest.raises(QueueError, match="too many for one record"):
        queue.put(64)
    with pytest.raises(QueueError, match="too many for one record"):
        queue.write(queue.rows(*range(8)), "late")
    monkeypatch.setattr(journal, "MAX_PAYLOAD_BYTES", log_reader.MAX_PAYLOAD_BYTES)
    lease, _, _ = queue.take("train", 4)
    monkeypatch.setattr(journal, "MAX_META_BYTES", journal.SPARE_BYTES + 10)
    with pytest.raises(QueueError, match="too many for one record"):
        queue.write(queue.rows(*range(8)), "late")
    with pytest.raises(QueueError, match="too many for one record"):
        queue.control.acknowledge(queue.session, lease.number, lambda: None, step=1, batches=[queue.rows(0, 1, 2, 3)])
    with pytest.raises(QueueError, match="too long for the log"):
        queue.control.drop(queue.session, range(8), "why " * journal.MAX_TEXT)
    queue.control.release(queue.session, lease.number)
    assert state(queue) == before


def test_tickets_are_told_in_several_records_where_they_are_many(plane: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "TICKETS_IN_RECORD", 3)
    log = MemoryLog()
    queue = plane(READ, log=log)
    queue.put(10)
    lease, _, _ = queue.take("read", 8)
    queue.control.release(queue.session, lease.number)
    lease, _, _ = queue.take("read", 4)
    queue.acknowledge(lease)
    queue.control.drop(queue.session, range(5, 9), "why")
    for kind, count in ((records.Taken, 8 + 4), (records.Released, 8), (records.Done, 4), (records.Dropped, 4)):
        told = [records.read_tickets(record.tickets) for record in logged(log, kind)]  # type: ignore[union-attr]
        assert max(map(len, told)) == 3
        assert sum(map(len, told)) == count


class Refusing(MemoryLog):
    """Takes no record about leases."""

    def append(self, meta: bytes, payload: Sequence[object] = ()) -> int:
        if isinstance(records.decode(meta), records.Released):
            raise QueueError("full")
        return super().append(meta)


def test_a_session_ends_whole_whatever_fails(plane: Make) -> None:
    queue = plane(READ, TRAIN, gate=GATE, log=Refusing())
    queue.control.advance(PolicyVersion(step=0))
    for _ in range(4):
        queue.control.reserve(queue.session, lambda ticket: None)
    queue.put(1, ticket=0)
    queue.put(1, ticket=1)
    queue.take("read", 1)
    queue.take("train", 1)
    with pytest.raises(QueueError, match="full"):
        queue.control.close_session(queue.session)
    assert queue.session.reserved == set()
    assert not queue.session.leases
    assert queue.ledger.num_ready("read") == queue.ledger.num_ready("train") == 2
    assert queue.ledger._returned == [2, 3]
    assert queue.control.memory._held == {}


# -- the end ---------------------------------------------------------------------------------


def test_what_is_trained_and_needed_by_a_stage_is_not_over_and_is_cleared(plane: Make) -> None:
    log = MemoryLog()
    queue = plane(TRAIN, READ, LEARN, log=log)
    queue.put(2)
    lease, _, _ = queue.take("train")
    queue.acknowledge(lease)
    queue.control.finish()
    _, given, _ = queue.take("read", 9, 9)
    assert len(given[0].tickets) == 2  # the rest
    _, given, parked = queue.take("learn")
    assert given == []
    assert parked is not None  # their column may come yet
    queue.control.clear()
    assert queue.control.num_blocks == 0 or queue.control.memory._held
    assert [len(taken.tickets) for taken in given] == [0]
    assert queue.ledger.oldest == 2
    assert queue.control.counts().trained == 2
    assert len(logged(log, records.Done)) == 2


def test_asking_for_the_rest_does_not_look_at_all_that_waits(plane: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = plane(READ, LEARN)
    queue.put(4)
    queue.control.finish()
    monkeypatch.setattr(Ledger, "pending", lambda self: pytest.fail("it looked at all"))
    monkeypatch.setattr(Ledger, "offered", lambda self, *rest: pytest.fail("it looked at all"))
    _, given, _ = queue.take("read", 9, 9)
    assert len(given[0].tickets) == 4
    _, given, parked = queue.take("learn", 9, 9)
    assert parked is not None


def test_a_queue_without_a_gate_is_settled_when_its_rows_are_whole(plane: Make) -> None:
    for tasks, is_at_once in (((READ,), True), ((QueueTask(name="t", needs=("x", "late"), trains=True),), False)):
        queue = plane(*tasks)
        queue.control.advance(PolicyVersion(step=0))
        queue.put(2)
        settled: list[bool] = []
        queue.control.when_settled(lambda told=settled: told.append(True))  # type: ignore[misc]
        assert bool(settled) == is_at_once
        queue.write(queue.rows(0, 1), "late")
        assert settled == [True]
