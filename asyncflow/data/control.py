"""The control plane: who may have which rows, and the one place in asyncflow that waits on state.

Sessions (a process, or this one) put, take, write back and acknowledge. What a call waits for
is decided by plain functions of the ledger; after every transition the parked calls that
became answerable are answered, so a waiting consumer is woken by the put that completes its
rows and by nothing else.

**Durability.** Every transition is appended to the log, and no answer that depends on it leaves
before the log says that it may be acted upon (`Log.when_safe`): in mode `sync`, when it is on the disk.

All methods run on one event loop and none waits: answers are given to callbacks. So between
two calls the state is consistent and no lock is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError, QueueError, StaleHandleError
from asyncflow.core.types import PolicyVersion, Ragged, Rows, Ticket
from asyncflow.data import records
from asyncflow.data.directory import Directory, Extent, Source
from asyncflow.data.journal import Journal
from asyncflow.data.layout import ColumnSpec
from asyncflow.data.leases import RETURNED, Leases, waiting_for
from asyncflow.data.ledger import Ledger, LedgerCounts, LedgerSnapshot, Offer
from asyncflow.data.log import Log
from asyncflow.data.memory import Memory, check_groups
from asyncflow.data.plane import read_columns
from asyncflow.data.sessions import Lease, ParkedReserve, ParkedTake, Session
from asyncflow.data.tickets import Tickets, as_array

CLEARED = "cleared"
ROW_BYTES = 16
"""Of a row in the record of a write."""


class ControlPlane:
    """The state of one queue and everybody who waits for it."""

    def __init__(self, ledger: Ledger, log: Log, *, generation: int = 0, first_ticket: int = 0) -> None:
        self.ledger = ledger
        self.generation = generation
        self.journal = Journal(log)
        self.directory = Directory(first_ticket)
        self.memory = Memory(self.journal)
        self.leases = Leases(ledger, self.directory, self.memory, self.journal, generation=generation)
        self._reserves: deque[ParkedReserve] = deque()
        self._sessions: set[Session] = set()
        self._settlers: list[Callable[[], None]] = []

    # -- sessions ----------------------------------------------------------------------------

    def open_session(self, name: str, free: Callable[[Extent], None]) -> Session:
        """A new user."""
        session = Session(name, free)
        self._sessions.add(session)
        return session

    def close_session(self, session: Session) -> None:
        """A user is gone: what it had taken is offered again, what it was to produce is issued again.

        Rows that it put stay until they are acknowledged, and its arena with them.
        """
        session.is_open = False
        self._sessions.discard(session)
        self._reserves = deque(parked for parked in self._reserves if parked.session is not session)
        with ExitStack() as rest:  # all of it, the last first, whatever fails
            rest.callback(self.settle)
            rest.callback(self.memory.close_when_unused, session)
            rest.callback(self._return_reserved, session)
            rest.callback(self.leases.close_session, session)

    def _return_reserved(self, session: Session) -> None:
        reserved, session.reserved = np.array(sorted(session.reserved), np.int64), set()
        if len(reserved):
            self._return(reserved, "its producer was lost")

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
        payload = self.memory.check_block(session, extent, columns)
        check_groups(count, group_size, columns)
        self.journal.check(num_bytes=0, payload_bytes=len(payload))
        names = [spec.name for spec in columns]
        self.ledger.check_columns(names)
        if ticket is None:
            if self.ledger.gate is not None:
                raise QueueError("this queue has a gate: reserve a ticket, then put its group")
            first = self.ledger.issue(count)
            self.journal.note(lambda: records.Admitted(first=first, count=count, live_step=-1))
        elif ticket not in session.reserved:
            raise QueueError(f"ticket {ticket} is not reserved by {session.name}")
        elif count != 1:
            raise QueueError(f"a reserved ticket is one group; {count} were put for ticket {ticket}")
        else:
            first = ticket
        self.ledger.produce(first, count, group_size, names)
        session.reserved.discard(first)
        self.directory.add(first, count, group_size, extent, columns)
        self.memory.keep(extent, columns)
        self.journal.note(
            lambda: records.Produced(first=first, count=count, group_size=group_size, columns=columns), payload
        )
        self.journal.when_safe(lambda: done(first))
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
        payload = self.memory.check_block(session, extent, columns)
        if any(spec.num_rows != len(rows) for spec in columns):
            raise ColumnError(f"a written column has {columns[0].num_rows} rows, the batch {len(rows)}")
        order = self._writable(rows, [spec.name for spec in columns], missing_ok=missing_ok)
        rows = rows[order]
        if len(rows) == 0:
            session.free(extent)
            self.journal.when_safe(lambda: done(0))
            return
        self.journal.check(num_bytes=ROW_BYTES * len(rows), payload_bytes=len(payload))
        tickets, counts = np.unique(rows.tickets, return_counts=True)
        self.ledger.check_write(tickets, counts, [spec.name for spec in columns])
        for spec in columns:
            self.ledger.write(tickets, counts, spec.name)
        self.directory.add_late(rows, extent, columns, order)
        self.memory.keep(extent, columns)
        where = records.row_bytes(rows)
        places = order.tobytes() if len(order) != columns[0].num_rows else b""
        self.journal.note(lambda: records.Written(rows=where, places=places, columns=columns), payload)
        self.journal.when_safe(lambda: done(len(rows)))
        self._serve_all()

    def _writable(self, rows: Rows, names: Sequence[str], *, missing_ok: bool) -> NDArray[np.int32]:
        """The places of the rows that can be written: still there, and without the columns."""
        self.check_generation(rows)
        self.ledger.state_of(rows.tickets)  # raises for those never admitted
        is_there = self.ledger.is_in_use(rows.tickets)
        if not is_there.all() and not missing_ok:
            raise StaleHandleError(f"{np.count_nonzero(~is_there)} of the {len(rows)} rows are no longer in the queue")
        order = np.flatnonzero(is_there).astype(np.int32)
        rows = rows[order]
        self.directory.check_rows(rows)
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
        self.journal.check_text(reason)
        tickets = np.unique(as_array(tickets))
        self.ledger.drop(tickets, reason)
        for owner in self._sessions:
            owner.reserved.difference_update(tickets.tolist())
        self._let_go_dropped(tickets, reason)
        self.settle()

    def _let_go_dropped(self, tickets: Tickets, reason: str) -> None:
        self.journal.note_tickets(tickets, lambda part: records.Dropped(tickets=part, reason=reason))
        self.memory.free(self.directory.free(tickets, oldest=self.ledger.oldest))

    def clear(self) -> None:
        """Drop everything that is in the queue; leases on it are void, and memory comes back as they end."""
        for session in self._sessions:
            session.reserved.clear()
            self.leases.clear(session)
        self.memory.forget_types()
        tickets = self.ledger.pending()
        if len(tickets):
            self.ledger.drop(tickets, CLEARED, also_trained=True)
            self._let_go_dropped(tickets, CLEARED)
        self._clear_trained()
        self.settle()

    def _clear_trained(self) -> None:
        """What is trained and not done with for another task is done with."""
        trained = self.ledger.left_over()
        left = {name: trained[self.ledger.offered(name, trained) != Offer.DONE] for name in self.ledger.tasks}
        for name, tickets in left.items():
            if len(tickets):
                self.ledger.lease(name, tickets)
                _, free = self.ledger.acknowledge(name, tickets)
                self.leases.note_done(name, tickets)
                self.memory.free(self.directory.free(free, oldest=self.ledger.oldest))

    def dispatch(self, ticket: int, prompt: str, num_tokens: int) -> None:
        """Note which prompt a ticket is."""
        self.journal.check_text(prompt)
        self.journal.note(lambda: records.Dispatched(ticket=ticket, prompt=prompt, num_tokens=num_tokens))

    def finish(self) -> None:
        """No more puts will come: takes get what is left, then an empty answer."""
        self.leases.is_finished = True
        self._serve_all()

    def advance(self, version: PolicyVersion) -> None:
        """The rollout engines serve this version now."""
        self.journal.check_text(version.lineage, version.fingerprint)
        self.ledger.advance(version.step)
        self.journal.note(
            lambda: records.Live(step=version.step, lineage=version.lineage, fingerprint=version.fingerprint)
        )
        self.settle()

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on; the order of takes depends on it."""
        self.ledger.train_step = step
        self.settle()

    # -- consumers ---------------------------------------------------------------------------

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
        self.leases.acknowledge(session, number, step=step, batches=batches, threads=threads)
        self.journal.when_safe(done)
        if self.ledger.gate is not None or self.leases.is_finished:
            self.settle()

    def release(self, session: Session, number: int, reason: str = RETURNED) -> None:
        """A lease is over without an acknowledgement: its rows are offered again. Raises `LeaseLostError`."""
        self.leases.release(session, number, reason)
        self.settle()

    def give_back(self, lease: Lease, tickets: Tickets) -> None:
        """Some of a lease was granted to somebody who was cancelled: it is offered again."""
        self.leases.give_back(lease, tickets)
        self.settle()

    def cancel(self, parked: ParkedTake | ParkedReserve) -> bool:
        """Forget a parked call; false when it was granted meanwhile, and its answer may be under way."""
        if isinstance(parked, ParkedTake):
            return self.leases.cancel(parked)
        if parked not in self._reserves:
            return False
        self._reserves.remove(parked)
        return True

    def locate(self, rows: Rows, names: Sequence[str]) -> tuple[Source, ...]:
        """Where columns of rows lie. Raises `StaleHandleError`."""
        self.check_generation(rows)
        self.directory.check_rows(rows)
        return self.directory.locate(rows, names)

    def rows_of(self, tickets: Tickets) -> Rows:
        """All rows of these groups, in order."""
        return self.directory.rows_of(tickets, self.generation)

    def give_up_reserved(self, session: Session, ticket: int) -> None:
        """A ticket was granted to somebody who was cancelled: it is issued again."""
        session.reserved.discard(ticket)
        self._return(np.array([ticket]), "its producer was cancelled")
        self.settle()

    def _return(self, tickets: Tickets, reason: str) -> None:
        self.ledger.readmit(tickets)
        self.journal.note_tickets(tickets, lambda part: records.Reissued(tickets=part, reason=reason))

    # -- taking up a log ---------------------------------------------------------------------

    def note(self, record: records.AnyRecord) -> None:
        """Append a record that changes nothing."""
        self.journal.note(lambda: record)

    def issue_again(self, tickets: Tickets, reason: str) -> None:
        """Roll groups out again: what was put for them is void."""
        if len(tickets):
            self.memory.free(self.directory.free(tickets, oldest=self.ledger.oldest))
            self._return(tickets, reason)

    def read(self, rows: Rows, name: str) -> Ragged | None:
        """A column of rows; None where it does not exist for all of them."""
        try:
            return read_columns(self.locate(rows, (name,)), (name,), self.memory.arena)[name]
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

    def waiting_for(self) -> str:
        """Who has not acknowledged what, for messages."""
        return waiting_for(self.ledger, self._sessions)

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
            self.journal.when_safe(self._settlers.pop())

    def _admit_parked(self) -> None:
        while self._reserves and self.ledger.may_admit():
            parked = self._reserves.popleft()
            ticket = self.ledger.admit()
            parked.session.reserved.add(ticket)
            live = -1 if self.ledger.live_step is None else self.ledger.live_step
            self._grant(parked, Ticket(ticket), live)

    def _grant(self, parked: ParkedReserve, ticket: Ticket, live_step: int) -> None:
        self.journal.note(lambda: records.Admitted(first=ticket, count=1, live_step=live_step))
        self.journal.when_safe(lambda: parked.answer(ticket))

    def _serve_all(self) -> None:
        self.leases.serve()
        self._tell_settled()

    def close(self) -> None:
        """Give all memory back, whoever uses it. May be called twice."""
        self.memory.close()

    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """The queue's tasks and the columns that each needs."""
        return {name: task.needs for name, task in self.ledger.tasks.items()}
