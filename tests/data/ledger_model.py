"""What the ledger should do, said with dictionaries and loops: slow and plainly right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from asyncflow.data.gate import Gate
from asyncflow.data.ledger import LedgerCounts, Offer, QueueTask, State


@dataclass
class ModelTicket:
    """One ticket: `cells` are the pairs (row, column) that exist."""

    state: State
    live_step: int
    size: int = 0
    cells: set[tuple[int, str]] = field(default_factory=set)
    offers: dict[str, Offer] = field(default_factory=dict)


class LedgerModel:
    """The same tickets as the ledger's."""

    def __init__(self, tasks: Sequence[QueueTask], gate: Gate | None) -> None:
        self.tasks = {task.name: task for task in tasks}
        self.gate = gate
        self.tickets: list[ModelTicket] = []
        self.dropped: Counter[str] = Counter()
        self.live_step = -1
        self.step = 0
        self.lines: dict[str, list[int]] = {name: [] for name in self.tasks}

    # -- what is so --------------------------------------------------------------------------

    def pending(self) -> list[int]:
        return [i for i, ticket in enumerate(self.tickets) if ticket.state <= State.PRODUCED]

    def oldest(self) -> int:
        """The first ticket that is pending, or has rows that some task is not done with."""
        for number, ticket in enumerate(self.tickets):
            if ticket.state <= State.PRODUCED or any(offer != Offer.DONE for offer in ticket.offers.values()):
                return number
        return len(self.tickets)

    def of_state(self, state: State) -> list[int]:
        return [i for i, ticket in enumerate(self.tickets) if ticket.state == state]

    def offered(self, task: str, offer: Offer) -> list[int]:
        return [i for i, ticket in enumerate(self.tickets) if ticket.offers.get(task, Offer.INCOMPLETE) == offer]

    def num_left(self, task: str, last: Offer) -> int:
        """Tickets that are of use to the task, or will be, and have come to `last` for it at most."""
        of_use = [ticket for ticket in self.tickets if ticket.state <= State.PRODUCED or ticket.offers]
        return sum(ticket.offers.get(task, Offer.INCOMPLETE) <= last for ticket in of_use)

    def left_over(self) -> list[int]:
        return [i for i in self.of_state(State.TRAINED) if {*self.tickets[i].offers.values()} - {Offer.DONE}]

    def rank(self, number: int) -> int:
        return sum(ticket.state != State.DROPPED for ticket in self.tickets[:number])

    def counts(self) -> LedgerCounts:
        return LedgerCounts(
            admitted=len(self.tickets),
            trained=len(self.of_state(State.TRAINED)),
            dropped=dict(self.dropped),
            pending=len(self.pending()),
        )

    def may_admit(self) -> bool:
        if self.gate is None:
            return True
        returned = self.of_state(State.RETURNED)
        rank = self.rank(returned[0] if returned else len(self.tickets))
        horizon = min(self.live_step + 1 + self.gate.max_staleness, self.gate.steps)
        return self.live_step >= 0 and rank < horizon * self.gate.groups_per_step

    def may_be_taken(self, task: str) -> list[int]:
        """All that the task may have now, in the order in which it gets them."""
        if self.gate is None or not self.tasks[task].trains:
            return self.lines[task]
        waiting = [i for i in self.pending() if self.tickets[i].offers.get(task, Offer.INCOMPLETE) <= Offer.READY]
        oldest = self.rank(waiting[0] if waiting else len(self.tickets))
        limit = max((self.step + 1) * self.gate.groups_per_step, oldest + self.gate.look_ahead)
        return [i for i in self.offered(task, Offer.READY) if self.rank(i) < limit]

    # -- what happens ------------------------------------------------------------------------

    def issue(self, count: int) -> int:
        self.tickets += [ModelTicket(State.ADMITTED, self.live_step) for _ in range(count)]
        return len(self.tickets) - count

    def admit(self) -> int:
        returned = self.of_state(State.RETURNED)
        if not returned:
            return self.issue(1)
        self.tickets[returned[0]] = ModelTicket(State.ADMITTED, self.live_step)
        return returned[0]

    def produce(self, numbers: Iterable[int], size: int, columns: Iterable[str]) -> None:
        for number in numbers:
            ticket = self.tickets[number]
            ticket.state, ticket.size = State.PRODUCED, size
            ticket.offers = dict.fromkeys(self.tasks, Offer.INCOMPLETE)
            ticket.cells = {(row, column) for row in range(size) for column in columns}
            self._offer(number)

    def missing(self, number: int, column: str) -> list[int]:
        ticket = self.tickets[number]
        return [row for row in range(ticket.size) if (row, column) not in ticket.cells]

    def write(self, number: int, rows: Iterable[int], column: str) -> None:
        self.tickets[number].cells |= {(row, column) for row in rows}
        self._offer(number)

    def _offer(self, number: int) -> None:
        ticket = self.tickets[number]
        for name, task in self.tasks.items():
            needed = {(row, column) for row in range(ticket.size) for column in task.needs}
            if ticket.offers[name] == Offer.INCOMPLETE and needed <= ticket.cells:
                ticket.offers[name] = Offer.READY
                self.lines[name].append(number)

    def _withdraw(self, number: int) -> None:
        for line in self.lines.values():
            if number in line:
                line.remove(number)
        self.tickets[number].offers = {}

    def drop(self, numbers: Iterable[int], reason: str) -> None:
        for number in numbers:
            self._withdraw(number)
            self.tickets[number].state = State.DROPPED
            self.dropped[reason] += 1

    def readmit(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._withdraw(number)
            self.tickets[number] = ModelTicket(State.RETURNED, -1)

    def take(self, task: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            assert self.tickets[number].offers[task] == Offer.READY
            self.tickets[number].offers[task] = Offer.LEASED
            self.lines[task].remove(number)

    def release(self, task: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.tickets[number].offers[task] = Offer.READY
        self.lines[task] = [*numbers, *self.lines[task]]

    def acknowledge(self, task: str, numbers: Iterable[int]) -> list[int]:
        """Those that nobody needs any more."""
        free = []
        ends = any(task.trains for task in self.tasks.values())
        for number in numbers:
            ticket = self.tickets[number]
            ticket.offers[task] = Offer.DONE
            is_free = all(offer == Offer.DONE for offer in ticket.offers.values())
            free += [number] if is_free else []
            if self.tasks[task].trains if ends else is_free:
                ticket.state = State.TRAINED
        return free

    def restart(self) -> None:
        """From a snapshot: rows are gone, and so is what tasks did with those that are trained."""
        for number, ticket in enumerate(self.tickets):
            self._withdraw(number)
            if ticket.state <= State.PRODUCED:
                self.tickets[number] = ModelTicket(State.RETURNED, -1)
        self.live_step = -1
