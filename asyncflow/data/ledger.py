"""The control plane of the transfer queue: what has become of every ticket.

A ticket is admitted once and ends once, trained or dropped for a stated reason::

    admit ──> produce ──> columns arrive ──> leased to a task ──> acknowledged
      │          │              │                  │
      └──────────┴── drop ──────┘                  └─ release: offered again

**Invariant**, checked by `check`: ``admitted = trained + dropped + pending``.

Pure: no `await`, no clock, no arrays. The queue (`asyncflow.data.queue`) is the one place
that waits for what this says. Every transition is reported to `journal` before anybody sees
its effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from asyncflow.core.errors import LedgerError
from asyncflow.core.types import Ticket
from asyncflow.data.gate import Gate


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueTask:
    """A consumer of the queue: it is offered a group the moment all columns in `needs` exist.

    The one task with `trains` ends a ticket with its acknowledgement, and is offered groups
    by the gate's order; the others take them as they come.
    """

    name: str
    needs: tuple[str, ...]
    trains: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One line of the journal: what happened to a ticket, and `detail`: a reason, task or column."""

    kind: str
    ticket: Ticket
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCounts:
    """Tickets by what became of them."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSnapshot:
    """What a checkpoint keeps: enough to issue unfinished tickets again and nothing twice."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    pending: tuple[Ticket, ...]


@dataclass(slots=True)
class _Record:
    """A pending ticket: rows in its group (0 until produced), rows written per column, takers."""

    num_rows: int = 0
    written: Counter[str] = field(default_factory=Counter)
    leased: set[str] = field(default_factory=set)
    done: set[str] = field(default_factory=set)

    def has(self, columns: Iterable[str]) -> bool:
        """Whether every row has every one of the columns."""
        return self.num_rows > 0 and all(self.written[name] == self.num_rows for name in columns)


class Ledger:
    """Tickets, their columns and their takers."""

    def __init__(
        self,
        tasks: Sequence[QueueTask],
        gate: Gate,
        journal: Callable[[Transition], None],
        snapshot: LedgerSnapshot | None,
    ) -> None:
        if sum(task.trains for task in tasks) != 1:
            raise LedgerError("exactly one task of the queue must be the one that trains")
        self.gate = gate
        self.tasks = {task.name: task for task in tasks}
        self._journal = journal
        self._dropped: Counter[str] = Counter(snapshot.dropped if snapshot else {})
        self._admitted = snapshot.admitted if snapshot else 0
        self._trained = snapshot.trained if snapshot else 0
        self._reissue = list(snapshot.pending) if snapshot else []
        self._records: dict[Ticket, _Record] = {ticket: _Record() for ticket in self._reissue}
        # Undropped tickets in order of admission, from the oldest pending one on; the trained ones
        # among them were taken ahead of it. `_before` counts the undropped tickets older than that. A
        # snapshot does not say which trained tickets were ahead: all go to the front, which the gate allows.
        self._line: list[Ticket] = list(self._reissue)
        self._before = self._trained
        self.live_step: int | None = None
        self.train_step = 0

    # -- admission ---------------------------------------------------------------------------

    def may_admit(self) -> bool:
        """Whether `admit` may be called now. Nothing starts before some weights are live."""
        if self.live_step is None:
            return False
        return self.gate.may_admit(rank=self._next_rank(), live_step=self.live_step)

    def _next_rank(self) -> int:
        """The rank of the group that `admit` would issue: the oldest of those to issue again, or a new one.

        A ticket to issue again is held to the gate as well: the run before a resume may have had
        a larger bound or more steps.
        """
        return self._before + (self._line.index(self._reissue[0]) if self._reissue else len(self._line))

    def admit(self) -> Ticket:
        """The next ticket: one that a crash left unfinished, or a new one."""
        if not self.may_admit():
            raise LedgerError(f"admission refused: {self.counts()}, weights live at version {self.live_step}")
        if self._reissue:
            ticket = self._reissue.pop(0)
        else:
            ticket = Ticket(self._admitted)
            self._admitted += 1
            self._records[ticket] = _Record()
            self._line.append(ticket)
        self._journal(Transition(kind="admitted", ticket=ticket))
        return ticket

    def readmit(self, ticket: Ticket) -> None:
        """Issue a ticket again whose holder went away before it began."""
        if self._record(ticket).num_rows:
            raise LedgerError(f"ticket {ticket} is produced and can't be issued again")
        self._reissue.append(ticket)
        self._reissue.sort()

    def advance(self, live_step: int) -> None:
        """The rollout engines serve the weights of `live_step` from now on."""
        if self.live_step is not None and live_step < self.live_step:
            raise LedgerError(f"live weights went back from version {self.live_step} to {live_step}")
        self.live_step = live_step

    # -- columns -----------------------------------------------------------------------------

    def produce(self, ticket: Ticket, num_rows: int, columns: Iterable[str]) -> None:
        """The group of a ticket exists, with these columns for all its rows."""
        record = self._record(ticket)
        if record.num_rows or ticket in self._reissue:
            raise LedgerError(f"ticket {ticket} was put twice, or put without being reserved")
        if num_rows < 1:
            raise LedgerError(f"the group of ticket {ticket} is empty")
        self._journal(Transition(kind="produced", ticket=ticket, detail=str(num_rows)))
        record.num_rows = num_rows
        record.written.update(dict.fromkeys(columns, num_rows))

    def write(self, ticket: Ticket, num_rows: int, column: str) -> None:
        """So many more rows of a group have a column. Dropped tickets are passed over."""
        if ticket not in self._records:
            self._known(ticket)
            return
        record = self._records[ticket]
        if record.written[column] + num_rows > record.num_rows:
            raise LedgerError(f"column {column} of ticket {ticket} was written twice")
        self._journal(Transition(kind="written", ticket=ticket, detail=column))
        record.written[column] += num_rows

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Give a ticket up. What another task still holds of it is void."""
        record = self._record(ticket)
        for task in record.leased | record.done:
            if self.tasks[task].trains:
                raise LedgerError(f"ticket {ticket} can't be dropped: it is being trained")
        self._journal(Transition(kind="dropped", ticket=ticket, detail=reason))
        del self._records[ticket]
        if ticket in self._reissue:
            self._reissue.remove(ticket)
        self._line.remove(ticket)
        self._dropped[reason] += 1
        self._shorten_line()

    # -- leases ------------------------------------------------------------------------------

    def takeable(self, task_name: str, max_groups: int) -> list[Ticket]:
        """The groups a task may take now, at most so many, oldest first."""
        task = self.tasks[task_name]
        found: list[Ticket] = []
        oldest_rank: int | None = None
        for rank, ticket in enumerate(self._line, start=self._before):
            record = self._records.get(ticket)
            if record is None or task_name in record.leased or task_name in record.done:
                continue
            oldest_rank = rank if oldest_rank is None else oldest_rank
            if task.trains and not self.gate.may_take(rank=rank, oldest_rank=oldest_rank, step=self.train_step):
                break
            if record.has(task.needs):
                found.append(ticket)
            if len(found) == max_groups:
                break
        return found

    def lease(self, task_name: str, tickets: Iterable[Ticket]) -> None:
        """Hand groups to a task: nobody else of that task is offered them."""
        for ticket in tickets:
            self._journal(Transition(kind="leased", ticket=ticket, detail=task_name))
            self._record(ticket).leased.add(task_name)

    def release(self, task_name: str, tickets: Iterable[Ticket]) -> None:
        """Take groups back unfinished: they are offered again."""
        for ticket in tickets:
            if ticket in self._records:
                self._journal(Transition(kind="released", ticket=ticket, detail=task_name))
                self._records[ticket].leased.discard(task_name)

    def acknowledge(self, task_name: str, tickets: Iterable[Ticket]) -> list[Ticket]:
        """A task is done with groups. Returns those whose rows nobody needs any more."""
        return [ticket for ticket in tickets if self._finish(self.tasks[task_name], ticket)]

    def _finish(self, task: QueueTask, ticket: Ticket) -> bool:
        if ticket not in self._records:
            self._known(ticket)
            return False
        record = self._records[ticket]
        if task.name not in record.leased:
            raise LedgerError(f"task {task.name} acknowledged ticket {ticket} without a lease on it")
        self._journal(Transition(kind="trained" if task.trains else "done", ticket=ticket, detail=task.name))
        record.leased.discard(task.name)
        record.done.add(task.name)
        if not task.trains:
            return False
        del self._records[ticket]
        self._trained += 1
        self._shorten_line()
        return True

    def _shorten_line(self) -> None:
        passed = 0
        while passed < len(self._line) and self._line[passed] not in self._records:
            passed += 1
        del self._line[:passed]
        self._before += passed

    # -- accounting --------------------------------------------------------------------------

    def counts(self) -> LedgerCounts:
        """Where all tickets are."""
        return LedgerCounts(
            admitted=self._admitted, trained=self._trained, dropped=dict(self._dropped), pending=len(self._records)
        )

    def check(self) -> None:
        """Raise `LedgerError` unless every admitted ticket is accounted for."""
        counts = self.counts()
        if counts.admitted != counts.trained + sum(counts.dropped.values()) + counts.pending:
            raise LedgerError(f"tickets went missing: {counts}")

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps."""
        self.check()
        return LedgerSnapshot(
            admitted=self._admitted,
            trained=self._trained,
            dropped=dict(self._dropped),
            pending=tuple(sorted(self._records)),
        )

    def is_pending(self, ticket: Ticket) -> bool:
        """Whether a ticket is neither trained nor dropped."""
        return ticket in self._records

    def _record(self, ticket: Ticket) -> _Record:
        if ticket not in self._records:
            raise LedgerError(f"ticket {ticket} is not pending: never admitted, or trained or dropped already")
        return self._records[ticket]

    def _known(self, ticket: Ticket) -> None:
        if not 0 <= ticket < self._admitted:
            raise LedgerError(f"ticket {ticket} was never admitted")
