"""The transfer queue: rollouts in, micro-batches out, each row exactly once.

The only class in asyncflow that waits on state. Everything it waits for is decided by plain
functions of the ledger; after every transition `_settle` answers the parked calls that the
transition made answerable, so a waiting task is woken by the put that completes its groups
and by nothing else.

All methods run on one event loop; those without `async` never wait, so between two awaits
the state is consistent and no lock is needed.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncflow.core.columns import TOKEN_IDS
from asyncflow.core.errors import LedgerError
from asyncflow.core.types import MicroBatch, PolicyVersion, Ragged, RowId, Ticket
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import Ledger, LedgerCounts, LedgerSnapshot, QueueTask, Transition
from asyncflow.data.packing import pack
from asyncflow.data.store import LocalStore, count_rows


@dataclass(slots=True, kw_only=True)
class Lease:
    """What one consumer has taken and not yet acknowledged."""

    task: str
    tickets: list[Ticket] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _ParkedTake:
    """A take that could not be served when it came."""

    lease: Lease
    max_groups: int
    max_tokens: int | None
    answer: asyncio.Future[list[Ticket]]


def _ignore(transition: Transition) -> None:
    """The journal of a queue that keeps none."""


class TransferQueue:
    """Streams groups between the tasks of a run, under the gate.

    Producers: `reserve` a ticket, then `put` its group or `drop` it. Consumers: open a
    `lease`, `take` or `stream` under it, perhaps `write` a column back, then `acknowledge`,
    or `release` what was not finished.
    """

    def __init__(
        self,
        tasks: Sequence[QueueTask],
        gate: Gate,
        *,
        journal: Callable[[Transition], None] = _ignore,
        snapshot: LedgerSnapshot | None = None,
    ) -> None:
        self._ledger = Ledger(tasks, gate, journal, snapshot)
        self._store = LocalStore()
        self._parked_reserves: deque[asyncio.Future[Ticket]] = deque()
        self._parked_takes: list[_ParkedTake] = []

    # -- producers ---------------------------------------------------------------------------

    async def reserve(self) -> Ticket:
        """Admit a group. Waits while a group started now could end up too stale."""
        answer: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._parked_reserves.append(answer)
        self._settle()
        try:
            return await answer
        except asyncio.CancelledError:
            # The ticket may have been granted in the same turn of the loop that cancelled us.
            if answer.done() and not answer.cancelled():
                self._ledger.readmit(answer.result())
                self._settle()
            raise

    def put(self, ticket: Ticket, columns: Mapping[str, Ragged]) -> None:
        """Hand in the group of a ticket, with the columns that exist already."""
        self._ledger.produce(ticket, count_rows(columns), columns)
        self._store.put(ticket, columns)
        self._settle()

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Give a ticket up for a stated reason; another group may start in its place."""
        self._ledger.drop(ticket, reason)
        self._store.free(ticket)
        self._settle()

    def advance(self, version: PolicyVersion) -> None:
        """The rollout engines serve this version now."""
        self._ledger.advance(version.step)
        self._settle()

    # -- consumers ---------------------------------------------------------------------------

    def lease(self, task: str) -> Lease:
        """Open a lease for one consumer of a task."""
        if task not in self._ledger.tasks:
            raise LedgerError(f"no task {task!r} in this queue; it has {', '.join(self._ledger.tasks)}")
        return Lease(task=task)

    async def take(self, lease: Lease, *, max_groups: int) -> MicroBatch:
        """At least one and at most so many complete groups, the columns the task needs of them.

        Waits until there is one.
        """
        return self._store.get(await self._take_rows(lease, max_groups), self._ledger.tasks[lease.task].needs)

    async def stream(self, lease: Lease, *, groups: int, max_tokens: int) -> AsyncIterator[MicroBatch]:
        """Exactly `groups` groups, in micro-batches of at most `max_tokens` tokens, each as soon as it is ready.

        A group may be spread over several micro-batches. Waits for groups that are not there yet. Of a
        group that is dropped in the meantime, the rows not handed out yet are passed over.
        """
        while groups:
            rows = await self._take_rows(lease, groups)
            groups -= len({row.ticket for row in rows})
            for batch in self._micro_batches(lease, rows, max_tokens):
                yield batch

    async def stream_ready(self, lease: Lease, *, max_tokens: int) -> AsyncIterator[MicroBatch]:
        """The oldest complete groups, as many as have `max_tokens` tokens together, in micro-batches of so many.

        Waits for one group and no more; one that is longer comes alone, in several micro-batches.
        Groups dropped in the meantime are passed over.
        """
        for batch in self._micro_batches(lease, await self._take_rows(lease, max_tokens=max_tokens), max_tokens):
            yield batch

    def _micro_batches(self, lease: Lease, rows: Sequence[RowId], max_tokens: int) -> Iterator[MicroBatch]:
        needs = self._ledger.tasks[lease.task].needs
        for chosen in pack(self._store.lengths(rows, TOKEN_IDS), max_tokens):
            # The consumer was away since the take, and a stage may have dropped a group and freed its rows.
            held = [rows[index] for index in chosen if self._ledger.is_pending(rows[index].ticket)]
            if held:
                yield self._store.get(held, needs)

    def write(self, batch: MicroBatch, column: str, values: Ragged) -> None:
        """Add a column to the rows of a batch, in the batch's order."""
        self._store.write(batch.rows, column, values)
        for ticket, num_rows in Counter(row.ticket for row in batch.rows).items():
            self._ledger.write(ticket, num_rows, column)
        self._settle()

    def acknowledge(self, lease: Lease) -> None:
        """The consumer is done with all it took. For the training task this ends the tickets."""
        for ticket in self._ledger.acknowledge(lease.task, lease.tickets):
            self._store.free(ticket)
        lease.tickets.clear()
        self._settle()

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on; the order of takes depends on it."""
        self._ledger.train_step = step
        self._settle()

    def release(self, lease: Lease) -> None:
        """The consumer gives back all it took: it is offered again."""
        self._ledger.release(lease.task, lease.tickets)
        lease.tickets.clear()
        self._settle()

    # -- looking in --------------------------------------------------------------------------

    @property
    def bound(self) -> int:
        """Versions a trained token may be old at most."""
        return self._ledger.gate.bound

    @property
    def num_groups_held(self) -> int:
        """Groups whose rows are in memory."""
        return len(self._store)

    def counts(self) -> LedgerCounts:
        """Where all tickets are; raises `LedgerError` if one went missing."""
        self._ledger.check()
        return self._ledger.counts()

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps of the ledger."""
        return self._ledger.snapshot()

    # -- waiting -----------------------------------------------------------------------------

    async def _take_rows(
        self, lease: Lease, max_groups: int = sys.maxsize, max_tokens: int | None = None
    ) -> list[RowId]:
        """Rows of at least one group. A group dropped between the grant and our waking is passed over."""
        rows: list[RowId] = []
        while not rows:
            granted = await self._grant(lease, max_groups, max_tokens)
            rows = [row for ticket in granted if self._ledger.is_pending(ticket) for row in self._store.rows_of(ticket)]
        return rows

    async def _grant(self, lease: Lease, max_groups: int, max_tokens: int | None) -> list[Ticket]:
        answer: asyncio.Future[list[Ticket]] = asyncio.get_running_loop().create_future()
        parked = _ParkedTake(lease=lease, max_groups=max_groups, max_tokens=max_tokens, answer=answer)
        self._parked_takes.append(parked)
        self._settle()
        try:
            return await parked.answer
        except asyncio.CancelledError:
            # The groups may have been granted in the same turn of the loop that cancelled us.
            if parked.answer.done() and not parked.answer.cancelled():
                granted = parked.answer.result()
                lease.tickets = [ticket for ticket in lease.tickets if ticket not in granted]
                self._ledger.release(lease.task, granted)
                self._settle()
            raise

    def _settle(self) -> None:
        """Answer every parked call that can be answered now; forget those that were cancelled."""
        while self._parked_reserves and (self._parked_reserves[0].done() or self._ledger.may_admit()):
            answer = self._parked_reserves.popleft()
            if not answer.done():
                answer.set_result(self._ledger.admit())
        self._parked_takes = [parked for parked in self._parked_takes if not self._serve(parked)]

    def _serve(self, parked: _ParkedTake) -> bool:
        if parked.answer.done():
            return True
        tickets = self._ledger.takeable(parked.lease.task, parked.max_groups)
        if not tickets:
            return False
        if parked.max_tokens is not None:
            tickets = self._fitting(tickets, parked.max_tokens)
        self._ledger.lease(parked.lease.task, tickets)
        parked.lease.tickets.extend(tickets)
        parked.answer.set_result(tickets)
        return True

    def _fitting(self, tickets: Sequence[Ticket], max_tokens: int) -> list[Ticket]:
        """As many of the groups as have so many tokens together; the first in any case."""
        sizes = [int(self._store.lengths(self._store.rows_of(ticket), TOKEN_IDS).sum()) for ticket in tickets]
        return list(tickets[: max(1, int(np.searchsorted(np.cumsum(sizes), max_tokens, side="right")))])
