"""What consumers take: groups leased to one of them, acknowledged or offered again.

A take that can't be served waits here, and is answered by the transition that makes it
servable. A lease ends with its acknowledgement, when it is given back, when its consumer is
lost, or when it ran out; in the last three cases others are offered the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LeaseLostError, QueueError
from asyncflow.core.types import Rows
from asyncflow.data import records
from asyncflow.data.directory import Directory
from asyncflow.data.journal import Journal
from asyncflow.data.ledger import Ledger, Offer
from asyncflow.data.memory import Memory
from asyncflow.data.sessions import Answer, Lease, ParkedTake, Session, Taken
from asyncflow.data.tickets import Tickets, as_array

LOST = "its consumer was lost"
EXPIRED = "its lease ran out"
RETURNED = "given back"
CANCELLED = "its taker was cancelled"


class Leases:
    """The consumers' half of the control plane."""

    def __init__(
        self, ledger: Ledger, directory: Directory, memory: Memory, journal: Journal, *, generation: int
    ) -> None:
        self.is_finished = False
        """Whether no more puts will come: takes then get what is left, and after it nothing."""
        self._ledger = ledger
        self._directory = directory
        self._memory = memory
        self._journal = journal
        self._generation = generation
        self._takes: dict[str, deque[ParkedTake]] = {name: deque() for name in ledger.tasks}

    def open(self, session: Session, task: str, number: int) -> Lease:
        """Open a lease for a consumer of a task, or give back the one with this number."""
        if task not in self._ledger.tasks:
            raise QueueError(f"there is no task {task!r} in this queue; it has {', '.join(self._ledger.tasks)}")
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

    def cancel(self, parked: ParkedTake) -> bool:
        """Forget a parked take; false when it was granted meanwhile, and its answer may be under way."""
        line = self._takes[parked.lease.task]
        if parked not in line:
            return False
        line.remove(parked)
        self.serve()
        return True

    def serve(self) -> None:
        """Answer the takes that can be answered now, the oldest first."""
        for name in self._takes:
            while self._takes[name]:
                parked = self._takes[name].popleft()  # first, for its answer may come back to here
                if not self._serve(parked):
                    self._takes[name].appendleft(parked)
                    break

    def acknowledge(
        self, session: Session, number: int, *, step: int, batches: Sequence[Rows], threads: Sequence[int]
    ) -> None:
        """A consumer is done with all of its lease. Raises `LeaseLostError` when it is void."""
        lease = self._find(session, number)
        if lease.parts:
            named, free = self._ledger.acknowledge(lease.task, lease.tickets)
            self._note_end(lease.task, named, step, batches, threads)
            self._memory.free(self._directory.free(free, oldest=self._ledger.oldest))
        self.end(session, lease)

    def _note_end(
        self, task: str, tickets: Tickets, step: int, batches: Sequence[Rows], threads: Sequence[int]
    ) -> None:
        named = records.ticket_bytes(tickets)
        if self._ledger.tasks[task].trains:
            composition = tuple(map(records.row_bytes, batches))
            self._journal.note(
                lambda: records.Trained(step=step, tickets=named, batches=composition, threads=tuple(threads))
            )
        else:
            self._journal.note(lambda: records.Done(task=task, tickets=named))

    def release(self, session: Session, number: int, reason: str) -> None:
        """A lease is over without an acknowledgement: its rows are offered again."""
        lease = self._find(session, number)
        self._offer_again(lease, lease.tickets, reason, is_lost=reason in (LOST, EXPIRED))
        if reason == EXPIRED:  # who held it may still read: its memory is let go when it is heard of again
            del session.leases[number]
            session.expired[number] = lease
        else:
            self.end(session, lease)

    def give_back(self, lease: Lease, tickets: Tickets) -> None:
        """Some of a lease was granted to somebody who was cancelled: it is offered again."""
        held = as_array(lease.tickets)
        lease.parts = [held[~np.isin(held, as_array(tickets))]]
        self._offer_again(lease, tickets, CANCELLED, is_lost=False)

    def end(self, session: Session, lease: Lease) -> None:
        """Whatever it held may be written over."""
        for held in (session.leases, session.expired):
            if held.get(lease.number) is lease:
                del held[lease.number]
        self._memory.let_go(lease)

    def close_session(self, session: Session) -> None:
        """A consumer is lost: nothing waits for it, and what it held is offered again."""
        for name, line in self._takes.items():
            self._takes[name] = deque(parked for parked in line if parked.session is not session)
        for number in list(session.leases):
            self.release(session, number, LOST)
        for lease in list(session.expired.values()):
            self.end(session, lease)

    def all_wait(self) -> bool:
        """Whether every task has a consumer that waits in vain."""
        return all(self._takes.values())

    def _find(self, session: Session, number: int) -> Lease:
        if number in session.expired:
            self.end(session, session.expired[number])
        lease = session.leases.get(number)
        if lease is None:
            raise LeaseLostError(f"these rows are not leased to {session.name}, or no longer: others are offered them")
        return lease

    def _offer_again(self, lease: Lease, tickets: Tickets, reason: str, *, is_lost: bool) -> None:
        back = self._ledger.release(lease.task, tickets, is_lost=is_lost)
        if len(back):
            self._journal.note(
                lambda: records.Released(task=lease.task, tickets=records.ticket_bytes(back), reason=reason)
            )

    def _serve(self, parked: ParkedTake) -> bool:
        """Answer a take if it can be; whether it was."""
        task, lease = parked.lease.task, parked.lease
        if self._ledger.num_ready(task) < parked.at_least and not self._is_rest(task):
            return False
        tickets = self._choose(parked)
        if len(tickets) == 0:
            if self._is_over(task):
                self._journal.when_safe(lambda: parked.answer(Taken(tickets, 1, ())))
                return True
            return False
        lease.parts.append(tickets)
        taken = self._locate(tickets, self._ledger.tasks[task].needs)
        self._memory.hold(lease, taken.sources)
        self._journal.note(lambda: records.Taken(task=task, tickets=records.ticket_bytes(tickets)))
        self._journal.when_safe(lambda: parked.answer(taken))
        return True

    def _locate(self, tickets: Tickets, needs: Sequence[str]) -> Taken:
        block = self._directory.block_of(tickets)
        if block is not None and isinstance(tickets, range):
            sources = self._directory.locate_groups(block, tickets, needs)
            if sources is not None:
                return Taken(tickets, block.group_size, sources)
        rows = self._directory.rows_of(tickets, self._generation)
        return Taken(tickets, self._directory.common_size(tickets), self._directory.locate(rows, needs))

    def _choose(self, parked: ParkedTake) -> Tickets:
        """The groups that a take gets now; none where that would be too few."""
        task = parked.lease.task
        tickets = self._ledger.take(task, parked.max_groups)
        kept = len(tickets)
        if parked.limit is not None and kept:
            kept = max(1, parked.limit(tickets))
        if kept < parked.at_least and not self._is_rest(task):
            kept = 0
        if kept < len(tickets):
            self._ledger.release(task, tickets[kept:])
        return tickets[:kept]

    def _is_rest(self, task: str) -> bool:
        """Whether what is ready now is all that is still to come, unless a consumer is lost."""
        return self.is_finished and not (self._offers(task) == Offer.INCOMPLETE).any()

    def _is_over(self, task: str) -> bool:
        return self.is_finished and bool((self._offers(task) == Offer.DONE).all())

    def _offers(self, task: str) -> NDArray[np.uint8]:
        return self._ledger.offered(task, self._ledger.pending())


def waiting_for(ledger: Ledger, sessions: Iterable[Session]) -> str:
    """Who has not acknowledged what, for messages."""
    taken = dict.fromkeys(ledger.tasks, 0)
    for session in sessions:
        for lease in session.leases.values():
            taken[lease.task] += len(lease.tickets)
    return ", ".join(f"task {name}: {ledger.num_ready(name)} groups ready, {taken[name]} taken" for name in taken)
