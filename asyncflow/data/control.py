"""The control plane: who may have which rows, and the one place in asyncflow that waits on state.

Sessions (a process, or this one) put, take, write back and acknowledge. What a call waits for
is decided by plain functions of the ledger; after every transition the parked calls that
became answerable are answered, so a waiting consumer is woken by the put that completes its
rows and by nothing else.

**Durability.** Every transition is appended to the log, and no answer that depends on it leaves
before the log says that it may be acted upon (`Log.when_safe`): in mode `sync`, when it is on the disk.

**Memory.** The space of a block goes back to its writer when every task has acknowledged its
rows, nobody holds a lease on them any more, and the log has written them.

All methods run on one event loop and none waits: answers are given to callbacks. So between
two calls the state is consistent and no lock is needed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError, LeaseLostError, QueueError, StaleHandleError
from asyncflow.core.types import PolicyVersion, Ragged, Rows, Ticket
from asyncflow.data import records
from asyncflow.data.arena import HEADER_BYTES, Arena
from asyncflow.data.directory import Directory, Extent, Source
from asyncflow.data.layout import ColumnSpec, check, row_type
from asyncflow.data.ledger import Ledger, LedgerCounts, LedgerSnapshot, Offer, State
from asyncflow.data.log import Log
from asyncflow.data.plane import read_columns
from asyncflow.data.tickets import Tickets, as_array, join

LOST = "its consumer was lost"
EXPIRED = "its lease ran out"
RETURNED = "given back"
CLEARED = "cleared"


@dataclass(frozen=True, slots=True)
class Taken:
    """Rows handed to a consumer, and where their columns lie. No rows: the stream has ended."""

    rows: Rows
    sources: tuple[Source, ...]


class Answer(Protocol):
    """Called once with the groups that were taken."""

    def __call__(self, taken: Taken, /) -> None:
        """What was taken."""
        ...


@dataclass(slots=True)
class Lease:
    """What a consumer has taken and not yet acknowledged."""

    number: int
    task: str
    parts: list[Tickets] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)

    @property
    def tickets(self) -> Tickets:
        """All of it."""
        return join(self.parts)


@dataclass(slots=True, eq=False)
class ParkedTake:
    """A take that could not be served when it came."""

    session: Session
    lease: Lease
    max_groups: int
    at_least: int
    limit: Callable[[Tickets], int] | None
    answer: Answer


@dataclass(slots=True, eq=False)
class Session:
    """One user of the queue. `free` is told which of its blocks may be overwritten."""

    name: str
    free: Callable[[Extent], None]
    arena: Arena | None = None
    reserved: set[int] = field(default_factory=set)
    leases: dict[int, Lease] = field(default_factory=dict)
    is_open: bool = True


@dataclass(slots=True, eq=False)
class ParkedReserve:
    """A producer that waits for the gate."""

    session: Session
    answer: Callable[[Ticket], None]


class ControlPlane:
    """The state of one queue and everybody who waits for it."""

    def __init__(self, ledger: Ledger, log: Log, *, generation: int = 0, first_ticket: int = 0) -> None:
        self.ledger = ledger
        self.generation = generation
        self.log = log
        self.is_finished = False
        self.directory = Directory(first_ticket)
        self._arenas: dict[int, Session] = {}
        self._num_arenas = 0
        self._lsn = 0
        self._held: Counter[Extent] = Counter()
        self._deferred: set[Extent] = set()
        self._reserves: deque[ParkedReserve] = deque()
        self._takes: dict[str, deque[ParkedTake]] = {name: deque() for name in ledger.tasks}
        self._sessions: set[Session] = set()
        self._types: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._settlers: list[Callable[[], None]] = []

    # -- sessions ----------------------------------------------------------------------------

    def open_session(self, name: str, free: Callable[[Extent], None]) -> Session:
        """A new user."""
        session = Session(name, free)
        self._sessions.add(session)
        return session

    def attach(self, session: Session, arena: Callable[[int], Arena]) -> Arena:
        """Give a session its arena, made by `arena` from the number it gets."""
        if session.arena is not None:
            raise QueueError(f"{session.name} has an arena already")
        session.arena = arena(self._num_arenas)
        self._arenas[self._num_arenas] = session
        self._num_arenas += 1
        return session.arena

    def arena(self, number: int) -> Arena:
        """The arena of this number. Raises `StaleHandleError`."""
        session = self._arenas.get(number)
        if session is None or session.arena is None:
            raise StaleHandleError(f"there is no arena {number}")
        return session.arena

    def close_session(self, session: Session) -> None:
        """A user is gone: what it had taken is offered again, what it was to produce is issued again.

        Rows that it put stay until they are acknowledged, and its arena with them.
        """
        session.is_open = False
        self._sessions.discard(session)
        self._reserves = deque(parked for parked in self._reserves if parked.session is not session)
        for name, line in self._takes.items():
            self._takes[name] = deque(parked for parked in line if parked.session is not session)
        for lease in list(session.leases.values()):
            self._release(session, lease, LOST, is_lost=True)
        if session.reserved:
            self._return(np.array(sorted(session.reserved), np.int64), "its producer was lost")
            session.reserved.clear()
        self._close_arena_when_empty(session)
        self.settle()

    def _close_arena_when_empty(self, session: Session) -> None:
        arena = session.arena
        if session.is_open or arena is None or self.directory.uses(arena.number):
            return
        if any(extent.arena == arena.number for extent in self._deferred):
            return
        self.log.when_written(self._lsn, arena.close)
        del self._arenas[arena.number]
        session.arena = None

    # -- producers ---------------------------------------------------------------------------

    def reserve(self, session: Session, answer: Callable[[Ticket], None]) -> ParkedReserve:
        """Admit a group; `answer` gets its ticket as soon as the gate allows it."""
        parked = ParkedReserve(session, answer)
        self._reserves.append(parked)
        self._admit_parked()
        return parked

    def put(
        self,
        session: Session,
        ticket: int | None,
        count: int,
        group_size: int,
        extent: Extent,
        columns: tuple[ColumnSpec, ...],
        done: Callable[[int], None],
    ) -> None:
        """`count` groups exist, in this block. `done` gets their first ticket once they are safe.

        Without a gate, tickets are given out here; with one, `ticket` was reserved before.
        """
        payload = self._payload(session, extent, columns)
        rows = {spec.num_rows * group_size if spec.is_shared else spec.num_rows for spec in columns}
        if min(count, group_size) < 1 or rows != {count * group_size}:
            raise ColumnError(f"{count} groups of {group_size} rows were put with columns of {sorted(rows)} rows")
        if ticket is None:
            if self.ledger.gate is not None:
                raise QueueError("this queue has a gate: reserve a ticket, then put its group")
            first = self.ledger.issue(count)
            self._append(lambda: records.Admitted(first=first, count=count, live_step=-1))
        elif ticket not in session.reserved:
            raise QueueError(f"ticket {ticket} is not reserved by {session.name}")
        else:
            first = ticket
            session.reserved.discard(ticket)
        self.ledger.produce(first, count, group_size, [spec.name for spec in columns])
        self.directory.add(first, count, group_size, extent, columns)
        self.note_types(columns)
        self._append(
            lambda: records.Produced(first=first, count=count, group_size=group_size, columns=columns), payload
        )
        self.log.when_safe(self._lsn, lambda: done(first))
        self._serve_all()

    def write(
        self,
        session: Session,
        rows: Rows,
        extent: Extent,
        columns: tuple[ColumnSpec, ...],
        done: Callable[[int], None],
        *,
        missing_ok: bool,
    ) -> None:
        """Add columns to rows. `done` gets how many rows got them: those dropped or ended meanwhile don't."""
        payload = self._payload(session, extent, columns)
        if any(spec.num_rows != len(rows) for spec in columns):
            raise ColumnError(f"a written column has {columns[0].num_rows} rows, the batch {len(rows)}")
        order = self._writable(rows, [spec.name for spec in columns], missing_ok=missing_ok)
        rows = rows[order]
        if len(rows) == 0:
            session.free(extent)
            self.log.when_safe(self._lsn, lambda: done(0))
            return
        tickets, counts = np.unique(rows.tickets, return_counts=True)
        for spec in columns:
            self.ledger.write(tickets, counts, spec.name)
        self.directory.add_late(rows, extent, columns, order)
        self.note_types(columns)
        where = records.row_bytes(rows)
        places = order.tobytes() if len(order) != columns[0].num_rows else b""
        self._append(lambda: records.Written(rows=where, places=places, columns=columns), payload)
        self.log.when_safe(self._lsn, lambda: done(len(rows)))
        self._serve_all()

    def _writable(self, rows: Rows, names: Sequence[str], *, missing_ok: bool) -> NDArray[np.int32]:
        """The places of the rows that can be written: still there, and without the columns."""
        self.check_generation(rows)
        is_there = self.ledger.state_of(rows.tickets) == State.PRODUCED
        if not is_there.all() and not missing_ok:
            raise StaleHandleError(f"{np.count_nonzero(~is_there)} of the {len(rows)} rows are no longer in the queue")
        order = np.flatnonzero(is_there).astype(np.int32)
        rows = rows[order]
        sizes = self.directory.group_sizes(rows.tickets)
        if np.any(rows.indices < 0) or np.any(rows.indices >= sizes):
            raise StaleHandleError("a handle names rows that its groups do not have")
        for name in names:
            is_written = self.directory.is_written(rows, name)
            if is_written.any():  # a consumer was lost after it had written; the first value stays
                repeated = is_written & self.ledger.is_redelivered(rows.tickets)
                rows, order = rows[~repeated], order[~repeated]
            if len({*zip(rows.tickets.tolist(), rows.indices.tolist(), strict=True)}) != len(rows):
                raise ColumnError(f"a row is named twice in one write of column {name}")
            if self.directory.is_written(rows, name).any():
                raise ColumnError(f"some of these rows have column {name} already: a column is written once")
        return order

    def drop(self, session: Session, tickets: Tickets, reason: str) -> None:
        """Give tickets up for a stated reason; other groups may start in their place."""
        self.ledger.drop(tickets, reason)
        for owner in self._sessions:
            owner.reserved.difference_update(tickets.tolist())
        self._append(lambda: records.Dropped(tickets=records.ticket_bytes(tickets), reason=reason))
        self._free(self.directory.free(tickets, oldest=self.ledger.oldest))
        self.settle()

    def clear(self) -> None:
        """Drop everything that is in the queue; leases on it are void, and memory comes back as they end."""
        for session in self._sessions:
            session.reserved.clear()
            self._types.clear()
            for lease in list(session.leases.values()):
                self._end_lease(session, lease)
        tickets = self.ledger.pending()
        if len(tickets):
            self.ledger.drop(tickets, CLEARED, also_trained=True)
            self._append(lambda: records.Dropped(tickets=records.ticket_bytes(tickets), reason=CLEARED))
            self._free(self.directory.free(tickets, oldest=self.ledger.oldest))
        self.settle()

    def dispatch(self, ticket: int, prompt: str, num_tokens: int) -> None:
        """Note which prompt a ticket is."""
        self._append(lambda: records.Dispatched(ticket=ticket, prompt=prompt, num_tokens=num_tokens))

    def finish(self) -> None:
        """No more puts will come: takes get what is left, then an empty answer."""
        self.is_finished = True
        self._serve_all()

    def advance(self, version: PolicyVersion) -> None:
        """The rollout engines serve this version now."""
        self.ledger.advance(version.step)
        self._append(lambda: records.Live(step=version.step, lineage=version.lineage, fingerprint=version.fingerprint))
        self.settle()

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on; the order of takes depends on it."""
        self.ledger.train_step = step
        self.settle()

    # -- consumers ---------------------------------------------------------------------------

    def lease(self, session: Session, task: str, number: int) -> Lease:
        """Open a lease for a consumer of a task, or give back the one with this number."""
        if task not in self.ledger.tasks:
            raise QueueError(f"there is no task {task!r} in this queue; it has {', '.join(self.ledger.tasks)}")
        return session.leases.setdefault(number, Lease(number, task))

    def take(
        self,
        session: Session,
        lease: Lease,
        answer: Answer,
        *,
        max_groups: int,
        at_least: int = 1,
        limit: Callable[[Tickets], int] | None = None,
    ) -> ParkedTake | None:
        """Groups for a task as soon as `at_least` are ready, at most `max_groups`, of which `limit` says how many.

        Returns what may be cancelled while it waits.
        """
        parked = ParkedTake(session, lease, max_groups, min(at_least, max_groups), limit, answer)
        line = self._takes[lease.task]
        if line or not self._serve(parked):
            line.append(parked)
            return parked
        return None

    def cancel(self, parked: ParkedTake | ParkedReserve) -> bool:
        """Forget a parked call; false when it was granted meanwhile, and its answer may be under way."""
        line: deque[ParkedReserve] | deque[ParkedTake]
        line = self._reserves if isinstance(parked, ParkedReserve) else self._takes[parked.lease.task]
        if parked not in line:
            return False
        line.remove(parked)  # type: ignore[arg-type]  # it is in it
        self._serve_all()
        return True

    def locate(self, rows: Rows, names: Sequence[str]) -> tuple[Source, ...]:
        """Where columns of rows lie. Raises `StaleHandleError`."""
        self.check_generation(rows)
        return self.directory.locate(rows, names)

    def rows_of(self, tickets: Tickets) -> Rows:
        """All rows of these groups, in order."""
        size = self.directory.common_size(tickets)
        tickets = as_array(tickets)
        if size:
            return Rows.of_groups(tickets, size, self.generation)
        sizes = self.directory.group_sizes(tickets)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Rows(np.repeat(tickets, sizes), within.astype(np.int32), self.generation)

    def acknowledge(
        self,
        session: Session,
        number: int,
        done: Callable[[], None],
        *,
        step: int = 0,
        batches: Sequence[Rows] = (),
        threads: Sequence[int] = (),
    ) -> None:
        """A consumer is done with all of its lease. For the training task this ends the tickets, with step `step`.

        Raises `LeaseLostError` when the lease is void.
        """
        lease = session.leases.get(number)
        if lease is None:
            raise LeaseLostError(f"{session.name} acknowledged rows that are not leased to it, or no longer")
        if lease.parts:
            self._acknowledge(lease, step, batches, threads)
        self._end_lease(session, lease)
        self.log.when_safe(self._lsn, done)
        if self.ledger.gate is not None or self.is_finished:
            self.settle()

    def _acknowledge(self, lease: Lease, step: int, batches: Sequence[Rows], threads: Sequence[int]) -> None:
        named, free = self.ledger.acknowledge(lease.task, lease.tickets)
        if self.ledger.tasks[lease.task].trains:
            composition = tuple(map(records.row_bytes, batches))
            self._append(
                lambda: records.Trained(
                    step=step, tickets=records.ticket_bytes(named), batches=composition, threads=tuple(threads)
                )
            )
        else:
            self._append(lambda: records.Done(task=lease.task, tickets=records.ticket_bytes(named)))
        self._free(self.directory.free(free, oldest=self.ledger.oldest))

    def release(self, session: Session, number: int, *, reason: str = RETURNED) -> None:
        """A consumer gives back all of its lease, or it ran out: it is offered again."""
        lease = session.leases.get(number)
        if lease is None:
            raise LeaseLostError(f"{session.name} gave back rows that are not leased to it, or no longer")
        self._release(session, lease, reason, is_lost=reason == EXPIRED)
        self.settle()

    def give_back(self, lease: Lease, tickets: Tickets) -> None:
        """Some of a lease was granted to somebody who was cancelled: it is offered again."""
        held = as_array(lease.tickets)
        lease.parts = [held[~np.isin(held, as_array(tickets))]]
        self.ledger.release(lease.task, tickets)
        self._append(
            lambda: records.Released(
                task=lease.task, tickets=records.ticket_bytes(tickets), reason="its taker was cancelled"
            )
        )
        self.settle()

    def give_up_reserved(self, session: Session, ticket: int) -> None:
        """A ticket was granted to somebody who was cancelled: it is issued again."""
        session.reserved.discard(ticket)
        self._return(np.array([ticket]), "its producer was cancelled")
        self.settle()

    def _release(self, session: Session, lease: Lease, reason: str, *, is_lost: bool) -> None:
        back = self.ledger.release(lease.task, lease.tickets, is_lost=is_lost)
        if len(back):
            self._append(lambda: records.Released(task=lease.task, tickets=records.ticket_bytes(back), reason=reason))
        self._end_lease(session, lease)

    def _end_lease(self, session: Session, lease: Lease) -> None:
        session.leases.pop(lease.number, None)
        for extent in lease.extents:
            self._held[extent] -= 1
            if self._held[extent] == 0:
                del self._held[extent]
                if extent in self._deferred:
                    self._deferred.discard(extent)
                    self._give_back_space([extent])
        lease.extents.clear()

    def _return(self, tickets: Tickets, reason: str) -> None:
        self.ledger.readmit(tickets)
        self._append(lambda: records.Reissued(tickets=records.ticket_bytes(tickets), reason=reason))

    # -- taking up a log ---------------------------------------------------------------------

    def note(self, record: records.AnyRecord) -> None:
        """Append a record that changes nothing."""
        self._lsn = self.log.append(records.encode(record))

    def issue_again(self, tickets: Tickets, reason: str) -> None:
        """Roll groups out again: what was put for them is void."""
        if len(tickets):
            self._free(self.directory.free(tickets, oldest=self.ledger.oldest))
            self._return(tickets, reason)

    def read(self, rows: Rows, name: str) -> Ragged | None:
        """A column of rows; None where it does not exist for all of them."""
        try:
            return read_columns(self.locate(rows, (name,)), (name,), self.arena)[name]
        except ColumnError:
            return None

    # -- looking in --------------------------------------------------------------------------

    def counts(self) -> LedgerCounts:
        """Where all tickets are; raises `LedgerError` if one went missing."""
        self.ledger.check()
        return self.ledger.counts()

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps of the ledger."""
        return self.ledger.snapshot()

    @property
    def num_blocks(self) -> int:
        """Blocks whose memory is in use."""
        return len(self.directory)

    @property
    def is_stuck(self) -> bool:
        """Whether no space can come back unless somebody new comes: nothing is leased, and every task waits in vain."""
        is_leased = any(lease.parts for session in self._sessions for lease in session.leases.values())
        return not is_leased and all(self._takes[name] for name in self._takes)

    def waiting_for(self) -> str:
        """Who has not acknowledged what, for messages."""
        taken: Counter[str] = Counter()
        for session in self._sessions:
            for lease in session.leases.values():
                taken[lease.task] += len(lease.tickets)
        return ", ".join(
            f"task {name}: {self.ledger.num_ready(name)} groups ready, {taken[name]} taken"
            for name in self.ledger.tasks
        )

    def check_generation(self, rows: Rows) -> None:
        """Raise `StaleHandleError` when a handle is of another queue."""
        if rows.generation != self.generation:
            raise StaleHandleError("these rows are of another queue, or of this one before it was started again")

    # -- answering ---------------------------------------------------------------------------

    def settle(self) -> None:
        """Answer every parked call that can be answered now."""
        self._admit_parked()
        self._serve_all()

    def when_settled(self, action: Callable[[], None]) -> None:
        """Call `action` once no rollout is under way or may begin under the live weights."""
        self._settlers.append(action)
        self._tell_settled()

    def _tell_settled(self) -> None:
        while self._settlers and self.ledger.is_settled():
            self.log.when_safe(self._lsn, self._settlers.pop())

    def _admit_parked(self) -> None:
        while self._reserves and self.ledger.may_admit():
            parked = self._reserves.popleft()
            ticket = self.ledger.admit()
            parked.session.reserved.add(ticket)
            live = -1 if self.ledger.live_step is None else self.ledger.live_step
            self._append(lambda: records.Admitted(first=ticket, count=1, live_step=live))
            self._answer(parked.answer, Ticket(ticket))

    def _answer(self, answer: Callable[[Ticket], None], ticket: Ticket) -> None:
        self.log.when_safe(self._lsn, lambda: answer(ticket))

    def _serve_all(self) -> None:
        for name in self._takes:
            while self._takes[name]:
                parked = self._takes[name].popleft()  # first, for its answer may come back to here
                if not self._serve(parked):
                    self._takes[name].appendleft(parked)
                    break
        self._tell_settled()

    def _serve(self, parked: ParkedTake) -> bool:
        """Answer a take if it can be; whether it was."""
        task, lease = parked.lease.task, parked.lease
        if self.ledger.num_ready(task) < parked.at_least and not self._is_rest(task):
            return False
        tickets = self.ledger.take(task, parked.max_groups)
        kept = len(tickets) if parked.limit is None else max(1, parked.limit(tickets)) if len(tickets) else 0
        if kept < parked.at_least and not self._is_rest(task):
            kept = 0
        if kept < len(tickets):
            self.ledger.release(task, tickets[kept:])
            tickets = tickets[:kept]
        if len(tickets) == 0:
            if self._is_over(task):
                self.log.when_safe(self._lsn, lambda: parked.answer(Taken(Rows.of_groups(as_array(tickets), 1), ())))
                return True
            return False
        lease.parts.append(tickets)
        rows, needs = self.rows_of(tickets), self.ledger.tasks[task].needs
        sources = self.directory.locate_groups(tickets, needs) or self.directory.locate(rows, needs)
        for extent in {piece.extent for source in sources for piece in source.pieces}:
            lease.extents.append(extent)
            self._held[extent] += 1
        self._append(lambda: records.Taken(task=task, tickets=records.ticket_bytes(tickets)))
        self.log.when_safe(self._lsn, lambda: parked.answer(Taken(rows, sources)))
        return True

    def _is_rest(self, task: str) -> bool:
        """Whether what is ready now is all that is still to come, unless a consumer is lost."""
        return self.is_finished and not (self._offers(task) == Offer.INCOMPLETE).any()

    def _is_over(self, task: str) -> bool:
        return self.is_finished and bool((self._offers(task) == Offer.DONE).all())

    def _offers(self, task: str) -> NDArray[np.uint8]:
        return self.ledger.offered(task, self.ledger.pending())

    # -- memory and log ----------------------------------------------------------------------

    def _payload(self, session: Session, extent: Extent, columns: Sequence[ColumnSpec]) -> NDArray[np.uint8]:
        """The bytes of a block that a session just wrote. Raises when they are not what it says."""
        if session.arena is None or extent.arena != session.arena.number:
            raise QueueError(f"{session.name} put a block that is not in its own arena")
        if len({spec.name for spec in columns}) != len(columns) or not columns:
            raise ColumnError("a block has at least one column, and each once")
        for spec in columns:
            check(spec, extent.num_bytes - HEADER_BYTES)
            known = self._types.get(spec.name, row_type(spec))
            if spec.num_values and known != row_type(spec):
                raise ColumnError(
                    f"rows of column {spec.name} are {known[0]}{[*known[1]]} in this queue, these are "
                    f"{spec.dtype}{[*row_type(spec)[1]]}: convert them, or name the column otherwise"
                )
        return session.arena.block(extent)

    def note_types(self, columns: Iterable[ColumnSpec]) -> None:
        """From now on rows of these columns must be of the same types, so that any can be read together."""
        for spec in columns:
            if spec.num_values:
                self._types[spec.name] = row_type(spec)

    def _append(self, record: Callable[[], records.AnyRecord], payload: NDArray[np.uint8] | None = None) -> None:
        """Log what happened; nothing is made of it where no log is kept."""
        if self.log.is_kept:
            self._lsn = self.log.append(records.encode(record()), () if payload is None else (payload,))

    def _free(self, extents: Sequence[Extent]) -> None:
        held = [extent for extent in extents if extent in self._held]
        self._deferred.update(held)
        self._give_back_space([extent for extent in extents if extent not in self._held])

    def _give_back_space(self, extents: Sequence[Extent]) -> None:
        for extent in extents:
            session = self._arenas.get(extent.arena)
            if session is None:  # its user is gone, and the arena went with the block before this one
                continue
            if session.is_open:
                self.log.when_written(self._lsn, partial(session.free, extent))
            else:
                self._close_arena_when_empty(session)

    def close(self) -> None:
        """Give all memory back, whoever uses it. May be called twice."""
        for session in self._arenas.values():
            if session.arena is not None:
                session.arena.close()
        self._arenas.clear()

    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """The queue's tasks and the columns that each needs."""
        return {name: task.needs for name, task in self.ledger.tasks.items()}
