"""The transfer queue of the main loop: the control plane in this process, rows in shared memory.

Producers: `reserve` a ticket, then `put` its group or `drop` it. Consumers: open a `lease`,
`take` or `stream` under it, perhaps `write` a column back, then `acknowledge`, or `release`
what was not finished. Other processes use the same queue through `asyncflow.data.queue`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from asyncflow.core.columns import TOKEN_IDS
from asyncflow.core.types import IntArray, MicroBatch, PolicyVersion, Ragged, Rows, Ticket
from asyncflow.data.control import ControlPlane
from asyncflow.data.gate import Gate
from asyncflow.data.layout import lay_out
from asyncflow.data.ledger import Ledger, LedgerCounts, LedgerSnapshot, QueueTask
from asyncflow.data.local_memory import LocalMemory
from asyncflow.data.log import Log, NoLog
from asyncflow.data.packing import assign, pack
from asyncflow.data.plane import read_columns
from asyncflow.data.records import Checkpointed
from asyncflow.data.sessions import ParkedReserve, ParkedTake, Taken
from asyncflow.data.tickets import TicketArray, Tickets, as_array

AnswerT = TypeVar("AnswerT")

MEMORY_BYTES = 1 << 30
"""Of a queue's rows, if nobody says otherwise; taken from the system as it is used."""


@dataclass(slots=True, kw_only=True, eq=False)
class Lease:
    """What one consumer has taken and not yet acknowledged, and the micro-batches it was handed."""

    task: str
    number: int
    batches: list[Rows] = field(default_factory=list)


class LocalQueue:
    """Streams groups between the tasks of a run, under the gate."""

    def __init__(
        self,
        tasks: Sequence[QueueTask],
        gate: Gate | None = None,
        *,
        log: Log | None = None,
        snapshot: LedgerSnapshot | None = None,
        memory_bytes: int = MEMORY_BYTES,
        control: ControlPlane | None = None,
    ) -> None:
        """Begins empty, where a checkpoint's `snapshot` left off, or as the `control` plane of a log stands."""
        first = min(snapshot.pending, default=Ticket(snapshot.admitted)) if snapshot else Ticket(0)
        self.control = control or ControlPlane(Ledger(tasks, gate, snapshot), log or NoLog(), first_ticket=first)
        self._memory = LocalMemory(self.control, memory_bytes)
        self._session = self._memory.session
        self._num_leases = 0

    # -- producers ---------------------------------------------------------------------------

    async def reserve(self) -> Ticket:
        """Admit a group. Waits while a group started now could end up too stale."""
        answer: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        parked: list[ParkedReserve] = []
        try:
            parked.append(self.control.reserve(self._session, lambda ticket: self._grant(answer, ticket)))
            return await answer
        except asyncio.CancelledError:
            # The ticket may have been granted in the same turn of the loop that cancelled us.
            if answer.done() and not answer.cancelled():
                self.control.give_up_reserved(self._session, answer.result())
            else:
                answer.cancel()
                self.control.cancel(parked[0])
            raise

    def _grant(self, answer: asyncio.Future[Ticket], ticket: Ticket) -> None:
        if answer.done():  # cancelled while the log was writing
            self.control.give_up_reserved(self._session, ticket)
        else:
            answer.set_result(ticket)

    async def put(self, ticket: Ticket, columns: Mapping[str, Ragged]) -> None:
        """Hand in the group of a ticket, with the columns that exist already. Returns when it is durable.

        Waits for room where there is none, or where older groups that are still being rolled out need
        it first: the trainer waits for those. Raises `QueueFullError` when none can ever come.
        """
        drafts, num_bytes, num_rows = lay_out(columns)
        extent, specs = await self._memory.room_for_put(ticket, drafts, num_bytes)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        try:
            self.control.put(self._session, ticket, 1, num_rows, extent, specs, lambda first: _settle(done, first))
        except BaseException:
            self._memory.free(extent)
            raise
        self._memory.changed()
        await done

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Give a ticket up for a stated reason; another group may start in its place."""
        self.control.drop(self._session, np.array([ticket]), reason)
        self._memory.changed()

    def dispatch(self, ticket: Ticket, prompt: str, num_tokens: int) -> None:
        """Note in the log which prompt a ticket is, and how many tokens it has."""
        self.control.dispatch(ticket, prompt, num_tokens)

    def advance(self, version: PolicyVersion) -> None:
        """The rollout engines serve this version now."""
        self.control.advance(version)

    async def settled(self) -> None:
        """Wait until no rollout is under way or may begin under the live weights, and every group's rows are whole."""
        quiet: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.control.when_settled(lambda: _settle(quiet, None))
        await quiet

    def note_checkpoint(self, step: int, oldest_kept: int) -> None:
        """Note in the log that the checkpoint after `step` steps is on the disk, and which is the oldest kept."""
        self.control.note(Checkpointed(step=step, oldest_kept=oldest_kept))

    # -- consumers ---------------------------------------------------------------------------

    def lease(self, task: str) -> Lease:
        """Open a lease for one consumer of a task."""
        self._num_leases += 1
        self.control.leases.open(self._session, task, self._num_leases)
        return Lease(task=task, number=self._num_leases)

    async def take(self, lease: Lease, *, max_groups: int) -> MicroBatch:
        """At least one and at most so many complete groups, the columns the task needs of them.

        Waits until there is one.
        """
        rows = self._rows_still_here(await self._take(lease, max_groups))
        while not len(rows):
            rows = self._rows_still_here(await self._take(lease, max_groups))
        return self._batch(lease, rows)

    async def stream(
        self, lease: Lease, *, groups: int, max_tokens: int, at_once: bool = False
    ) -> AsyncIterator[MicroBatch]:
        """Exactly `groups` groups, in micro-batches of at most `max_tokens` tokens, each as soon as it is ready.

        A group may be spread over several micro-batches. Waits for groups that are not there yet, with
        `at_once` for all of them before the first micro-batch, so that nothing depends on when they came.
        Of a group that is dropped in the meantime, the rows not handed out yet are passed over.
        """
        while groups:
            tickets = await self._take(lease, groups, at_least=groups if at_once else 1)
            groups -= len(tickets)
            for batch in self._micro_batches(lease, tickets, max_tokens):
                yield batch

    async def stream_ranks(
        self, lease: Lease, *, groups: int, max_tokens: int, num_ranks: int
    ) -> AsyncIterator[tuple[Rows, ...]]:
        """The same for data-parallel ranks: each time one handle for every rank, of about as many tokens, some empty.

        Each rank fetches its own columns, through a connection of its own (`TransferQueue.fetch`).
        """
        while groups:
            tickets = await self._take(lease, groups)
            groups -= len(tickets)
            rows = self._rows_still_here(tickets)
            ranks = assign(self._lengths(rows), max_tokens, num_ranks) if len(rows) else []
            for chosen in zip(*ranks, strict=True):
                handles = tuple(rows[numbers] for numbers in chosen)
                lease.batches += [handle for handle in handles if len(handle)]
                yield handles

    async def stream_ready(self, lease: Lease, *, max_tokens: int) -> AsyncIterator[MicroBatch]:
        """The oldest complete groups, as many as have `max_tokens` tokens together, in micro-batches of so many.

        Waits for one group and no more; one that is longer comes alone, in several micro-batches.
        Groups dropped in the meantime are passed over.
        """
        tickets = await self._take(
            lease, sys.maxsize, limit=lambda found: self._num_fitting(as_array(found), max_tokens)
        )
        for batch in self._micro_batches(lease, tickets, max_tokens):
            yield batch

    def _micro_batches(self, lease: Lease, tickets: TicketArray, max_tokens: int) -> Iterator[MicroBatch]:
        rows = self._rows_still_here(tickets)
        for chosen in pack(self._lengths(rows), max_tokens) if len(rows) else []:
            # The consumer was away since the take, and a stage may have dropped a group.
            held = rows[chosen]
            held = held[self.control.ledger.is_in_use(held.tickets)]
            if len(held):
                yield self._batch(lease, held)

    async def write(self, lease: Lease, batch: MicroBatch, column: str, values: Ragged) -> None:
        """Add a column to the rows of a batch, in the batch's order. Rows dropped meanwhile are passed over.

        `lease` is the one under which the batch was taken. Waits for room where there is none: for the
        memory that only writes may use, and before all puts. Raises `QueueFullError` when none can ever come.
        """
        drafts, num_bytes, _ = lay_out({column: values})
        session, extent, specs = await self._memory.room_for_write(lease.number, drafts, num_bytes)
        try:
            self.control.write(session, batch.rows, extent, specs, _ignore, missing_ok=True)
        except BaseException:
            self._memory.free(extent)
            raise

    async def acknowledge(self, lease: Lease, *, step: int = 0, threads: Sequence[int] = ()) -> None:
        """The consumer is done with all it took; returns when that is durable.

        For the training task this ends the tickets, with the step that made version `step`.
        """
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.control.leases.open(self._session, lease.task, lease.number)  # it may have taken nothing
        self.control.acknowledge(
            self._session,
            lease.number,
            lambda: _settle(done, None),
            step=step,
            batches=lease.batches,
            threads=threads,
        )
        lease.batches = []
        self._memory.changed()
        await done

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on; the order of takes depends on it."""
        self.control.begin_step(step)

    def release(self, lease: Lease) -> None:
        """The consumer gives back all it took: it is offered again."""
        self.control.leases.open(self._session, lease.task, lease.number)
        self.control.release(self._session, lease.number)
        lease.batches = []
        self._memory.changed()

    # -- looking in --------------------------------------------------------------------------

    @property
    def bound(self) -> int:
        """Versions a trained token may be old at most; without a gate there is no bound."""
        gate = self.control.ledger.gate
        return sys.maxsize if gate is None else gate.bound

    @property
    def num_groups_held(self) -> int:
        """Pending groups."""
        return len(self.control.ledger.pending())

    def counts(self) -> LedgerCounts:
        """Where all tickets are; raises `LedgerError` if one went missing."""
        return self.control.counts()

    def snapshot(self) -> LedgerSnapshot:
        """What a checkpoint keeps of the ledger."""
        return self.control.snapshot()

    async def flush(self) -> None:
        """Wait until all that has happened is on the disk."""
        await self.control.journal.log.flush()

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        if self._session.is_open:
            self._memory.close()
            self.control.close()

    # -- inside ------------------------------------------------------------------------------

    async def _take(
        self,
        lease: Lease,
        max_groups: int,
        *,
        at_least: int = 1,
        limit: Callable[[Tickets], int] | None = None,
    ) -> TicketArray:
        """Tickets of at least one group."""
        answer: asyncio.Future[Taken] = asyncio.get_running_loop().create_future()
        held = self.control.leases.open(self._session, lease.task, lease.number)
        parked: ParkedTake | None = None

        def hand_over(taken: Taken) -> None:
            if answer.cancelled():  # while the log was writing
                self.control.give_back(held, np.unique(as_array(taken.tickets)))
            else:
                answer.set_result(taken)

        try:
            parked = self.control.leases.take(
                self._session,
                held,
                hand_over,
                max_groups=max_groups,
                at_least=at_least,
                limit=limit,
            )
            if parked is not None:
                self._memory.take_waits(held)
            taken = await answer
        except asyncio.CancelledError:
            # The groups may have been granted in the same turn of the loop that cancelled us.
            if answer.done() and not answer.cancelled():
                self.control.give_back(held, np.unique(as_array(answer.result().tickets)))
            elif parked is not None:
                self.control.cancel(parked)
            raise
        finally:
            self._memory.take_ends(held)
        return np.unique(as_array(taken.tickets))

    def _rows_still_here(self, tickets: TicketArray) -> Rows:
        """Rows of the groups that nobody dropped between the grant and our waking."""
        held = tickets[self.control.ledger.is_in_use(tickets)]
        return self.control.rows_of(held)

    def _batch(self, lease: Lease, rows: Rows) -> MicroBatch:
        names = self.control.ledger.tasks[lease.task].needs
        lease.batches.append(rows)
        return MicroBatch(rows=rows, columns=self._read(rows, names))

    def _read(self, rows: Rows, names: Sequence[str]) -> dict[str, Ragged]:
        return read_columns(self.control.locate(rows, names), names, self.control.memory.arena, is_copied=True)

    def _lengths(self, rows: Rows) -> IntArray:
        return self._read(rows, (TOKEN_IDS,))[TOKEN_IDS].lengths

    def _num_fitting(self, tickets: TicketArray, max_tokens: int) -> int:
        """How many of the groups, in this order, have so many tokens together."""
        ends = np.cumsum(self.control.directory.group_sizes(tickets))
        tokens = np.cumsum(self._lengths(self.control.rows_of(tickets)))[ends - 1]
        return int(np.searchsorted(tokens, max_tokens, side="right"))


def _settle(answer: asyncio.Future[AnswerT], value: AnswerT) -> None:
    """Answer whoever still waits."""
    if not answer.done():
        answer.set_result(value)


def _ignore(num_rows: int) -> None:
    """A write whose count nobody needs."""
