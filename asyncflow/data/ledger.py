"""The control plane's state: what has become of every ticket.

A ticket is admitted once and ends once, trained or dropped for a stated reason::

    admit ──> produce ──> columns arrive ──> leased to a task ──> acknowledged
      │          │              │                  │
      └──────────┴── drop ──────┘                  └─ release: offered again

A ticket is a group of rows; in a queue without groups, one row. **Invariant**, checked by
`check`: ``admitted = trained + dropped + pending``.

Pure: no `await`, no clock, no input or output. State is kept in arrays and every call works on
all its tickets at once, so its cost depends on them and not on how many others there are.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LedgerError, StaleHandleError
from asyncflow.core.types import Ticket
from asyncflow.data.column_book import ColumnBook
from asyncflow.data.gate import Gate
from asyncflow.data.ledger_types import LedgerCounts, LedgerSnapshot, Offer, QueueTask, State
from asyncflow.data.ranks import Endings, Ranks
from asyncflow.data.task_line import TaskLine
from asyncflow.data.tickets import TicketArray, Tickets, as_array, first_place, places, reach_before, some
from asyncflow.data.window import Window

__all__ = ["Ledger", "LedgerCounts", "LedgerSnapshot", "Offer", "QueueTask", "State"]

# As plain numbers: an attribute of an enumeration costs as much as an array operation here.
_ADMITTED, _RETURNED, _PRODUCED, _TRAINED, _DROPPED = map(int, State)
_INCOMPLETE, _READY, _LEASED, _DONE = map(int, Offer)


class Ledger:
    """Tickets, their columns and their takers."""

    def __init__(
        self, tasks: Sequence[QueueTask], gate: Gate | None = None, snapshot: LedgerSnapshot | None = None
    ) -> None:
        num_training = sum(task.trains for task in tasks)
        if num_training > 1 or (gate is not None and num_training == 0):
            raise LedgerError("exactly one task of a queue with a gate must be the one that trains")
        self.gate = gate
        self.tasks = {task.name: task for task in tasks}
        self.live_step: int | None = None
        self.train_step = 0
        self.last_step: int | None = None  # the version that the last acknowledged step made, where that is known
        self._columns = ColumnBook()
        self._states = {one.name: TaskLine(one, self._columns.mask(one.needs), gate is not None) for one in tasks}
        self._training = next((task.name for task in tasks if task.trains), None)
        snapshot = snapshot or LedgerSnapshot(admitted=0, trained=0, dropped={}, pending=())
        self._endings = Endings(snapshot)
        for state in self._states.values():
            state.num_whole = state.num_done = snapshot.trained
        oldest = min(snapshot.pending, default=Ticket(snapshot.admitted))
        self._window = Window(
            {"state": (np.uint8, _TRAINED), "rows": (np.int32, 0), "undone": (np.uint8, 0)}
            | {"again": (np.bool_, 0), "full": (np.uint64, 0)}
            | {f"offer {name}": (np.uint8, _INCOMPLETE) for name in self.tasks},
            base=oldest,
        )
        self._ranks = Ranks(snapshot.dropped_since, num_before=self._endings.num_dropped - len(snapshot.dropped_since))
        self._oldest = int(oldest)  # no ticket before it is pending
        self._window.extend(snapshot.admitted - oldest)
        self._set_state(np.array(snapshot.dropped_since, np.int64), _DROPPED)
        self._returned = sorted(map(int, snapshot.pending))
        self._set_state(np.array(self._returned, np.int64), _RETURNED)

    # -- admission ---------------------------------------------------------------------------

    def may_admit(self) -> bool:
        """Whether a ticket may be issued now. With a gate, nothing starts before some weights are live."""
        if self.gate is None:
            return True
        if self.live_step is None:
            return False
        next_ticket = self._returned[0] if self._returned else self._window.end
        return self.gate.may_admit(rank=self.rank(next_ticket), live_step=self.live_step)

    def rank(self, ticket: int) -> int:
        """Groups admitted before this one and not dropped."""
        return self._ranks.rank(ticket)

    def admit(self, count: int = 1) -> int:
        """The first of `count` consecutive tickets; a single one may be one whose rollout was lost."""
        if not self.may_admit():
            raise LedgerError(f"admission refused: {self.counts()}, weights live at version {self.live_step}")
        if self._returned and count == 1:
            ticket = self._returned.pop(0)
            self._set_state(np.array([ticket]), _ADMITTED)
            return ticket
        return self.issue(count)

    def issue(self, count: int) -> int:
        """The first of `count` new tickets, whatever the gate says: for groups that exist already."""
        first = self._window.end
        self._window.extend(count)
        here = slice(first - self._window.base, self._window.end - self._window.base)
        self._window.raw["state"][here] = bytes([_ADMITTED]) * count
        return first

    def restore_admission(self, first: int, count: int) -> None:
        """Issue these very tickets, as a log says: new ones, or one whose rollout was lost."""
        if first == self._window.end:
            self.issue(count)
        elif count == 1 and first in self._returned:
            self._returned.remove(first)
            self._set_state(np.array([first]), _ADMITTED)
        else:
            raise LedgerError(f"ticket {first} was admitted twice")

    def readmit(self, tickets: Tickets) -> None:
        """Issue tickets again whose rollout was lost, or whose rows can't be used; what tasks did with them is void."""
        self._check_pending(tickets)
        self._withdraw(tickets)
        self._columns.forget(self._window, tickets)
        self._set_state(tickets, _RETURNED)
        for ticket in as_array(tickets).tolist():
            if ticket not in self._returned:
                insort(self._returned, ticket)

    def is_settled(self) -> bool:
        """Whether no rollout is under way or, with a gate, may begin under the live weights: all groups are whole."""
        if self.gate is not None and (self.live_step is None or self.may_admit()):
            return self.live_step is None
        pending = self.pending()  # what may not be issued again yet waits for newer weights, and nobody for it
        begun = pending[self._window["state"][pending - self._window.base] != State.RETURNED]
        if self._training is None:  # whoever writes columns for later tasks decides when they are whole
            return bool((self._window["state"][begun - self._window.base] == _PRODUCED).all())
        return bool((self.offered(self._training, begun) >= _READY).all())

    def advance(self, live_step: int) -> None:
        """The rollout engines serve the weights of `live_step` from now on."""
        if self.live_step is not None and live_step < self.live_step:
            raise LedgerError(f"live weights went back from version {self.live_step} to {live_step}")
        self.live_step = live_step

    # -- columns -----------------------------------------------------------------------------

    def check_columns(self, columns: Collection[str]) -> None:
        """Raise `ColumnError` where the queue can't have these as well."""
        self._columns.mask(columns)

    def produce(self, first: int, count: int, group_size: int, columns: Collection[str]) -> None:
        """The groups of consecutive tickets exist, with these columns for all their rows."""
        window, mask = self._window, self._columns.mask(columns)
        here, states = slice(first - window.base, first - window.base + count), window.raw["state"]
        if first < window.base or first + count > window.end or states[here].count(_ADMITTED) != count:
            raise LedgerError(f"tickets from {first} on were put twice, or put without being reserved")
        states[here] = bytes([_PRODUCED]) * count
        window["rows"][here] = group_size
        window["full"][here] = mask
        window.raw["undone"][here] = bytes([len(self.tasks)]) * count
        for state in self._states.values():
            if state.mask & ~mask == 0:
                window.raw[state.offers][here] = bytes([_READY]) * count
                state.num_whole += count
                state.add_range(range(first, first + count))

    def check_write(self, tickets: TicketArray, num_rows: NDArray[np.integer], columns: Collection[str]) -> None:
        """Raise `ColumnError` unless so many more rows of some groups can have these columns."""
        self._columns.check(self._window, tickets, num_rows, columns)

    def write(self, tickets: TicketArray, num_rows: NDArray[np.integer], column: str) -> None:
        """So many more rows of some groups, each named once, have a column. Raises like `check_write`."""
        window, bit = self._window, self._columns.mask((column,))
        complete = self._columns.write(window, tickets, num_rows, column)
        for state in self._states.values():
            if state.mask & bit:
                state.offer(complete, window["full"], window[state.offers], window.base)

    def drop(self, tickets: Tickets, reason: str, *, also_trained: bool = False) -> None:
        """Give tickets up, with `also_trained` those too that are being trained. What tasks hold of them is void."""
        self._check_pending(tickets)
        window, here = self._window, places(tickets, self._window.base)
        for state in self._states.values():
            if state.task.trains and not also_trained and (window[state.offers][here] >= _LEASED).any():
                raise LedgerError(f"tickets {some(tickets)} can't be dropped: they are being trained")
        self._withdraw(tickets)
        self._set_state(tickets, _DROPPED)
        for ticket in as_array(tickets).tolist():
            self._ranks.drop(ticket)
            if self._returned and ticket in self._returned:
                self._returned.remove(ticket)
        self._endings.drop(len(tickets), reason)
        self._forget()

    def _withdraw(self, tickets: Tickets) -> None:
        """No task is offered these any longer."""
        here = places(tickets, self._window.base)
        for state in self._states.values():
            state.withdraw(self._window[state.offers], here)
        self._window["undone"][here] = 0

    # -- leases ------------------------------------------------------------------------------

    def num_ready(self, task: str) -> int:
        """Groups that a task could be offered, were it not for the gate's order."""
        return self._states[task].num_ready

    def num_incomplete(self, task: str) -> int:
        """Tickets that the task may be offered later, and can't be yet."""
        return self._window.end - self._endings.num_dropped - self._states[task].num_whole

    def num_left(self, task: str) -> int:
        """Tickets that the task is not done with, whether or not it has been offered them."""
        return self._window.end - self._endings.num_dropped - self._states[task].num_done

    def take(self, task: str, max_groups: int) -> Tickets:
        """Lease the groups that a task may have now to it, at most so many, oldest first."""
        state = self._states[task]
        base, offers = self._window.base, self._window[state.offers]
        if not state.in_order:
            return state.take(offers, self._window.raw[state.offers], base, max_groups)
        limit = self._rank_limit(offers)
        return state.take_while(lambda ticket: self.rank(ticket) < limit, offers, base, max_groups)

    def lease(self, task: str, tickets: Tickets) -> None:
        """Lease these very groups to a task, as a log says it was."""
        here, state = places(tickets, self._window.base), self._states[task]
        offers = self._window[state.offers]
        if reach_before(tickets, self._window.base) or (offers[here] == _DONE).any():
            raise LedgerError(f"task {task} is done with some of tickets {some(tickets)} already")
        state.lease(offers, here)

    def _rank_limit(self, offers: NDArray[np.int64]) -> int:
        """Groups of ranks below this may be trained now, by the gate's order."""
        gate, window = self.gate, self._window
        if gate is None:
            raise LedgerError("a queue without a gate has no order")
        states = window["state"]
        place = first_place(
            self._oldest - window.base,
            window.end - window.base,
            lambda part: (states[part] <= _PRODUCED) & (offers[part] <= _READY),
        )
        return gate.rank_limit(oldest_rank=self.rank(window.base + place), step=self.train_step)

    def release(self, task: str, tickets: Tickets, *, is_lost: bool = False) -> TicketArray:
        """Take groups back unfinished: they are offered again, first of all. Those ended meanwhile are passed over.

        `is_lost`: nobody knows what their taker did; columns that it wrote stay, and may be written again.
        """
        state, window = self._states[task], self._window
        offers, held = window[state.offers], as_array(tickets)
        held = held[held >= window.base]
        back: TicketArray = held[offers[held - window.base] == _LEASED]
        offers[back - window.base] = _READY
        window["again"][back - window.base] |= is_lost
        if len(back):
            state.add(back, first=True)
        return back

    def acknowledge(self, task: str, tickets: Tickets) -> tuple[Tickets, Tickets]:
        """A task is done with groups; those dropped meanwhile are passed over.

        Returns the others, and those among them that nobody needs any more. Raises `LeaseLostError`
        unless all of the others are leased to the task.
        """
        if len(tickets) == 0:
            return tickets, tickets
        if isinstance(tickets, range) and len(self.tasks) == 1 and self._finish_range(task, tickets):
            return tickets, tickets
        state, window = self._states[task], self._window
        offers, undone = window[state.offers], window["undone"]
        here = places(tickets, window.base)
        if reach_before(tickets, window.base) or (offers[here] != _LEASED).any():
            tickets = state.still_leased(as_array(tickets), window["state"], offers, window.base)
            here = places(tickets, window.base)
        offers[here] = _DONE
        state.num_done += len(tickets)
        left = undone[here] - 1
        undone[here] = left
        free = tickets if not left.any() else as_array(tickets)[left == 0]
        ended = tickets if state.task.trains else free if self._training is None else range(0)
        if len(ended):
            window["state"][places(ended, window.base)] = _TRAINED
            self._endings.trained += len(ended)
        if len(ended) or len(free):
            self._forget()
        return tickets, free

    def _finish_range(self, task: str, tickets: range) -> bool:
        """The same for consecutive groups that only this task takes; false where some are not leased to it."""
        window, count = self._window, len(tickets)
        here, offers = slice(tickets.start - window.base, tickets.stop - window.base), window.raw[f"offer {task}"]
        if tickets.start < window.base or offers[here].count(_LEASED) != count:
            return False
        offers[here] = bytes([_DONE]) * count
        window.raw["undone"][here] = bytes(count)
        window.raw["state"][here] = bytes([_TRAINED]) * count
        self._endings.trained += count
        self._states[task].num_done += count
        if tickets.start <= self._oldest < tickets.stop:
            self._oldest = tickets.stop
        self._forget()
        return True

    def _forget(self) -> None:
        """Move the window past tickets that have ended and are done with for every task."""
        window = self._window
        states, undone = window["state"], window["undone"]
        here = self._oldest - window.base
        if self._oldest == window.end or window.raw["state"][here] <= _PRODUCED or window.raw["undone"][here]:
            window.forget(self._oldest)
            self._ranks.forget(window.base)
            return
        stop = window.end - window.base
        place = first_place(here, stop, lambda part: (states[part] <= _PRODUCED) | (undone[part] > 0))
        self._oldest = window.base + place
        window.forget(self._oldest)
        self._ranks.forget(window.base)

    # -- accounting --------------------------------------------------------------------------

    def counts(self) -> LedgerCounts:
        """Where all tickets are."""
        return self._endings.counts(admitted=self._window.end, pending=len(self.pending()))

    def check(self) -> None:
        """Raise `LedgerError` unless every admitted ticket is accounted for."""
        counts = self.counts()
        if counts.admitted != counts.trained + sum(counts.dropped.values()) + counts.pending:
            raise LedgerError(f"tickets went missing: {counts}")

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps."""
        self.check()
        pending = tuple(map(Ticket, self.pending().tolist()))
        return self._endings.snapshot(admitted=self._window.end, pending=pending, ranks=self._ranks)

    def pending(self) -> TicketArray:
        """The tickets that are neither trained nor dropped, in order."""
        window = self._window
        start, size = self._oldest - window.base, window.end - window.base
        return self._oldest + np.flatnonzero(window["state"][start:size] <= _PRODUCED)

    def left_over(self) -> TicketArray:
        """The tickets that are trained, and of use to another task."""
        window = self._window
        here = slice(self._oldest - window.base, window.end - window.base)
        return self._oldest + np.flatnonzero((window["state"][here] == _TRAINED) & (window["undone"][here] > 0))

    def state_of(self, tickets: Tickets) -> NDArray[np.uint8]:
        """The `State` of each; those long gone count as trained. Raises `StaleHandleError` for those never admitted."""
        tickets = as_array(tickets)
        if len(tickets) and (tickets.min() < 0 or tickets.max() >= self._window.end):
            raise StaleHandleError(f"tickets {some(tickets)} were never admitted")
        here = np.maximum(tickets - self._window.base, -1)
        states: NDArray[np.uint8] = np.where(here < 0, _TRAINED, self._window["state"][here]).astype(np.uint8)
        return states

    @property
    def num_admitted(self) -> int:
        """Tickets ever issued; the next new one has this number."""
        return self._window.end

    @property
    def oldest(self) -> int:
        """No ticket before this one is pending, or of use to any task."""
        return self._oldest

    def is_in_use(self, tickets: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether some task still needs the rows of each: a stage may, of one that is trained."""
        here = tickets - self._window.base
        found: NDArray[np.bool_] = (here >= 0) & (self._window["undone"][np.maximum(here, 0)] > 0)
        return found

    def mark_redelivered(self, tickets: Tickets) -> None:
        """Nobody knows what the takers of these did: columns that they wrote stay, and may be written again."""
        self._window["again"][places(tickets, self._window.base)] = True

    def is_redelivered(self, tickets: Tickets) -> NDArray[np.bool_]:
        """Whether each pending ticket was once leased to a consumer that was lost."""
        again: NDArray[np.bool_] = self._window["again"][places(tickets, self._window.base)].astype(np.bool_)
        return again

    def offered(self, task: str, tickets: Tickets) -> NDArray[np.uint8]:
        """The `Offer` of each pending ticket to a task."""
        here = places(tickets, self._window.base)
        offers: NDArray[np.uint8] = self._window[self._states[task].offers][here].astype(np.uint8)
        return offers

    def _set_state(self, tickets: Tickets, state: int) -> None:
        self._window["state"][places(tickets, self._window.base)] = state

    def _check_pending(self, tickets: Tickets) -> None:
        states = self.state_of(tickets)
        if (states > _PRODUCED).any():
            raise LedgerError(f"tickets {some(tickets)} are not pending: trained or dropped already")
