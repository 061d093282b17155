"""The groups that one task may be offered, in the order in which it gets them."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LeaseLostError
from asyncflow.data.ledger_types import Offer, QueueTask, State
from asyncflow.data.tickets import TicketArray, Tickets, as_array, join, places, some

INCOMPLETE, READY, LEASED, DONE = map(int, Offer)
DROPPED = int(State.DROPPED)


@dataclass(slots=True)
class TaskLine:
    """A task with the tickets it may be offered: by ticket where order matters, else as they came.

    `mask` holds the bits of the columns that it needs, `offers` names its array in the ledger's window.
    `num_whole` counts the tickets that have those columns, `num_done` those that the task is done with too;
    one that is dropped, or rolled out again, counts no more.
    """

    task: QueueTask
    mask: int
    has_gate: bool
    in_order: bool = field(init=False)
    offers: str = field(init=False)
    heap: list[int] = field(default_factory=list)
    line: deque[Tickets] = field(default_factory=deque)
    num_ready: int = 0
    num_whole: int = 0
    num_done: int = 0

    def __post_init__(self) -> None:
        self.in_order = self.has_gate and self.task.trains
        self.offers = f"offer {self.task.name}"

    def add(self, tickets: Tickets, *, first: bool = False) -> None:
        """These may be offered now, after all others or `first`."""
        self.num_ready += len(tickets)
        if self.in_order:
            for ticket in as_array(tickets).tolist():
                heapq.heappush(self.heap, ticket)
        elif first:
            self.line.appendleft(tickets)
        else:
            self.line.append(tickets)

    def add_range(self, tickets: range) -> None:
        """The same for consecutive tickets; those put one by one become one range."""
        last = self.line[-1] if self.line and not self.in_order else None
        if isinstance(last, range) and last.stop == tickets.start:
            self.num_ready += len(tickets)
            self.line[-1] = range(last.start, tickets.stop)
        else:
            self.add(tickets)

    def offer(self, tickets: TicketArray, full: NDArray[np.int64], offers: NDArray[np.int64], base: int) -> None:
        """Columns of these were completed, and `full` are now: those that have all that the task needs are ready."""
        needs, here = np.uint64(self.mask), tickets - base
        ready = tickets[(full[here] & needs == needs) & (offers[here] == INCOMPLETE)]
        if len(ready):
            offers[ready - base] = READY
            self.num_whole += len(ready)
            self.add(ready)

    def withdraw(self, offers: NDArray[np.int64], here: slice | TicketArray) -> None:
        """The tickets at these places are not offered any longer."""
        held = offers[here]
        self.num_ready -= int(np.count_nonzero(held == READY))
        self.num_whole -= int(np.count_nonzero(held != INCOMPLETE))
        self.num_done -= int(np.count_nonzero(held == DONE))
        offers[here] = INCOMPLETE

    def lease(self, offers: NDArray[np.int64], here: slice | TicketArray) -> None:
        """The task has the tickets at these places, whether or not they were offered to it."""
        held = offers[here]
        self.num_ready -= int(np.count_nonzero(held == READY))
        self.num_whole += int(np.count_nonzero(held == INCOMPLETE))
        offers[here] = LEASED

    def still_leased(
        self, tickets: TicketArray, states: NDArray[np.int64], offers: NDArray[np.int64], base: int
    ) -> TicketArray:
        """Those that were not dropped. Raises `LeaseLostError` unless all of these are leased to the task."""
        known = tickets[tickets >= base]  # what is leased is forgotten only when it was dropped
        live: TicketArray = known[states[known - base] != DROPPED]
        if (offers[live - base] != LEASED).any():
            raise LeaseLostError(f"task {self.task.name} acknowledged tickets {some(tickets)} not leased to it")
        return live

    def take(self, offers: NDArray[np.int64], raw: bytearray, base: int, max_groups: int) -> Tickets:
        """The next ones that are ready, at most so many; they are leased now.

        `offers`, as bytes `raw`, says of each ticket from `base` on where it is: some that stand here were
        dropped or taken meanwhile.
        """
        wanted = min(max_groups, self.num_ready)
        parts: list[Tickets] = []
        while wanted:
            tickets = self._pop(wanted)
            here = places(tickets, base)
            if not isinstance(here, slice) or here.start < 0 or raw[here].count(READY) != len(tickets):
                tickets = as_array(tickets)
                tickets = tickets[tickets >= base]  # others were dropped so long ago that they are forgotten
                tickets = tickets[offers[tickets - base] == READY]
                here = tickets - base
            offers[here] = LEASED  # at once, for one issued again may stand in line twice
            parts.append(tickets)
            wanted -= len(tickets)
            self.num_ready -= len(tickets)
        return join(parts)

    def take_while(
        self, is_allowed: Callable[[int], bool], offers: NDArray[np.int64], base: int, max_groups: int
    ) -> Tickets:
        """The same in the order of tickets, up to the first that is not allowed."""
        taken: list[int] = []
        while self.heap and len(taken) < max_groups and is_allowed(self.heap[0]):
            ticket = heapq.heappop(self.heap)
            if ticket >= base and offers[ticket - base] == READY:
                offers[ticket - base] = LEASED
                taken.append(ticket)
        self.num_ready -= len(taken)
        return np.array(taken, np.int64)

    def _pop(self, wanted: int) -> Tickets:
        tickets = self.line.popleft()
        if len(tickets) > wanted:
            self.line.appendleft(tickets[wanted:])
        return tickets[:wanted]
