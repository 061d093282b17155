"""What consumers take: groups leased to one of them, acknowledged or offered again.

A take that can't be served waits here, and is answered by the transition that makes it
servable. A lease ends with its acknowledgement, when it is given back, when its consumer is
lost, or when it ran out; in the last three cases others are offered the rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from asyncflow.core.errors import LeaseLostError, QueueError
from asyncflow.core.types import Rows
from asyncflow.data import records
from asyncflow.data.directory import Directory
from asyncflow.data.journal import Journal
from asyncflow.data.ledger import Ledger
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
            lease.num_parked += 1
            return parked
        return None

    def cancel(self, parked: ParkedTake) -> bool:
        """Forget a parked take; false when it was granted meanwhile, and its answer may be under way."""
        line = self._takes[parked.lease.task]
        if parked not in line:
            return False
        line.remove(parked)
        parked.lease.num_parked -= 1
        self.serve()
        return True

    def serve(self) -> None:
        """Answer the takes that can be answered now, the oldest first."""
        for name in self._takes:
            while self._takes[name]:
                parked = self._takes[name].popleft()  # first, for its answer may come back to here
                parked.lease.num_parked -= 1
                if not self._serve(parked):
                    parked.lease.num_parked += 1
                    self._takes[name].appendleft(parked)
                    break

    def acknowledge(
        self, session: Session, number: int, *, step: int, batches: Sequence[Rows], threads: Sequence[int]
    ) -> None:
        """A consumer is done with all of its lease. Raises `LeaseLostError` when it is void, the step too."""
        lease = self._find(session, number)
        if len(batches) and not lease.parts:
            raise LeaseLostError(f"nothing is leased to {session.name} under this lease: what it took was cleared")
        is_step = step > 0 and self._ledger.tasks[lease.task].trains
        if is_step:
            self._check_step(step)
        if lease.parts:
            num_rows = sum(map(len, batches))
            self._journal.check(num_bytes=12 * num_rows + 8 * sum(map(len, lease.parts)) if num_rows else 0)
            named, free = self._ledger.acknowledge(lease.task, lease.tickets)
            self._note_end(lease.task, named, step, batches, threads)
            self._memory.free(self._directory.free(free, oldest=self._ledger.oldest))
        if is_step:
            self._ledger.last_step = step
        self.end(session, lease)

    def _check_step(self, step: int) -> None:
        """In a queue with a gate, steps follow each other: one that does not is of a trainer that was replaced."""
        last = self._ledger.last_step
        if self._ledger.gate is not None and last is not None and step != last + 1:
            raise LeaseLostError(
                f"step {step} was acknowledged after step {last}: another trainer is at work, or this one went back. "
                "End it, or resume it from the last step"
            )

    def _note_end(
        self, task: str, tickets: Tickets, step: int, batches: Sequence[Rows], threads: Sequence[int]
    ) -> None:
        if self._ledger.tasks[task].trains:
            self._journal.note(
                lambda: records.Trained(
                    step=step,
                    tickets=records.ticket_bytes(tickets),
                    batches=tuple(map(records.row_bytes, batches)),
                    threads=tuple(threads),
                )
            )
        else:
            self.note_done(task, tickets)

    def note_done(self, task: str, tickets: Tickets) -> None:
        """Note that a task that does not train is done with groups."""
        self._journal.note_tickets(tickets, lambda part: records.Done(task=task, tickets=part))

    def release(self, session: Session, number: int, reason: str) -> None:
        """A lease is over without an acknowledgement: its rows are offered again."""
        lease = self._find(session, number)
        tickets, lease.parts = lease.tickets, []
        self._offer_again(lease, tickets, reason, is_lost=reason in (LOST, EXPIRED))
        if reason == EXPIRED:  # who held it may still read: its memory is let go when it is heard of again
            del session.leases[number]
            session.expired[number] = lease
        else:
            self.end(session, lease)

    def give_back(self, lease: Lease, tickets: Tickets) -> None:
        """Some of a lease was granted to somebody who was cancelled: what it still holds of that is offered again."""
        held = as_array(lease.tickets)
        is_given = np.isin(held, as_array(tickets))
        lease.parts = [held[~is_given]] if not is_given.all() else []
        self._offer_again(lease, held[is_given], CANCELLED, is_lost=False)

    def end(self, session: Session, lease: Lease) -> None:
        """Whatever it held may be written over, and is its own no longer."""
        lease.parts = []
        for held in (session.leases, session.expired):
            if held.get(lease.number) is lease:
                del held[lease.number]
        self._memory.let_go(lease)

    def close_session(self, session: Session) -> None:
        """A consumer is lost: nothing waits for it, and what it held is offered again."""
        for name, line in self._takes.items():
            self._takes[name] = deque(parked for parked in line if parked.session is not session)
        with ExitStack() as rest:  # all of it, whatever fails
            for lease in list(session.expired.values()):
                rest.callback(self.end, session, lease)
            for lease in list(session.leases.values()):
                lease.num_parked = 0
                rest.callback(self.end, session, lease)
                rest.callback(self.release, session, lease.number, LOST)

    def clear(self, session: Session) -> None:
        """What a consumer has taken is not there any more. Where its take waits, the lease is for what it will get."""
        for lease in list(session.leases.values()):
            if lease.parts:
                self.end(session, lease)

    def _find(self, session: Session, number: int) -> Lease:
        if number in session.expired:
            self.end(session, session.expired[number])
        lease = session.leases.get(number)
        if lease is None or lease.num_parked:
            raise LeaseLostError(f"these rows are not leased to {session.name}, or no longer: others are offered them")
        return lease

    def _offer_again(self, lease: Lease, tickets: Tickets, reason: str, *, is_lost: bool) -> None:
        back = self._ledger.release(lease.task, tickets, is_lost=is_lost)
        self._journal.note_tickets(back, lambda part: records.Released(task=lease.task, tickets=part, reason=reason))

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
        lease = parked.lease = parked.session.leases.setdefault(lease.number, lease)  # it may have been cleared
        lease.parts.append(tickets)
        taken = self._locate(tickets, self._ledger.tasks[task].needs)
        self._memory.hold(lease, taken.sources)
        self._journal.note_tickets(tickets, lambda part: records.Taken(task=task, tickets=part))
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
        return self.is_finished and self._ledger.num_incomplete(task) == 0

    def _is_over(self, task: str) -> bool:
        return self.is_finished and self._ledger.num_left(task) == 0


def waiting_for(ledger: Ledger, sessions: Iterable[Session]) -> str:
    """Who has not acknowledged what, for messages."""
    taken = dict.fromkeys(ledger.tasks, 0)
    for session in sessions:
        for lease in session.leases.values():
            taken[lease.task] += len(lease.tickets)
    return ", ".join(f"task {name}: {ledger.num_ready(name)} groups ready, {taken[name]} taken" for name in taken)
