"""The memory of the main loop's queue: who waits for room in it, who gets it first, and when nobody ever will.

**Invariant.** A write never waits for a put: some of the memory only writes may use, and they are woken
first. A put leaves room for the groups before it that are still being rolled out, for the trainer
waits for those. So whoever waits is let in by what others free, or by the oldest groups' end; once nobody
is left who could free anything, all who wait are told so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from asyncflow.core.errors import QueueFullError
from asyncflow.data.arena import HEADER_BYTES, Arena
from asyncflow.data.control import ControlPlane
from asyncflow.data.directory import Extent
from asyncflow.data.layout import ColumnSpec, Draft
from asyncflow.data.plane import Writer
from asyncflow.data.sessions import Lease, Session

HEADROOM = 4
"""One part in so many of the memory is for writes alone: a stage that could not write would free nothing."""

MIN_ARENA_BYTES = 1 << 16

Written: TypeAlias = tuple[Extent, tuple[ColumnSpec, ...]]


@dataclass(slots=True, kw_only=True, eq=False)
class _Wait:
    """Somebody who waits for room: a producer with a ticket, or a consumer that writes under a lease."""

    num_bytes: int
    ticket: int = -1
    lease: int = -1
    room: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class LocalMemory:
    """Two arenas of this process: one for puts and writes, a smaller one for writes alone.

    `session` is the first one's: producers reserve and consumers lease under it.
    """

    def __init__(self, control: ControlPlane, num_bytes: int) -> None:
        self._control = control
        headroom = max(MIN_ARENA_BYTES, num_bytes // HEADROOM)
        self.session, self._writer = self._attach("this process", max(MIN_ARENA_BYTES, num_bytes - headroom))
        self._late_session, self._late_writer = self._attach("this process, writing", headroom)
        self._waits: list[_Wait] = []
        self._takes: dict[int, tuple[Lease, int]] = {}
        self._largest = 0

    def _attach(self, name: str, num_bytes: int) -> tuple[Session, Writer]:
        session = self._control.open_session(name, self.free)
        return session, Writer(self._control.memory.attach(session, lambda number: Arena.create(num_bytes, number)))

    # -- room ----------------------------------------------------------------------------------

    async def room_for_put(self, ticket: int, drafts: Sequence[Draft], num_bytes: int) -> Written:
        """A block for the group of a ticket, once there is room. Raises `QueueFullError` when none can ever come."""
        self._check_size(num_bytes, self._writer)
        self._largest = max(self._largest, num_bytes + HEADER_BYTES)
        while True:
            if not self._is_needed_by_older(ticket, num_bytes) and (written := self._writer.write(drafts, num_bytes)):
                return written
            await self._wait(_Wait(num_bytes=num_bytes, ticket=ticket))

    def _is_needed_by_older(self, ticket: int, num_bytes: int) -> bool:
        """Whether what this put would leave is too little for the groups before it.

        Their sizes are not known yet: each counts as much as the largest group so far.
        """
        reserved, left = self.session.reserved, self._writer.num_free - num_bytes - HEADER_BYTES
        if self._control.ledger.gate is None or left >= len(reserved) * self._largest:
            return False
        return left < sum(older < ticket for older in reserved) * self._largest

    async def room_for_write(
        self, lease: int, drafts: Sequence[Draft], num_bytes: int
    ) -> tuple[Session, Extent, tuple[ColumnSpec, ...]]:
        """The same for columns that a consumer adds, under its lease, and the session whose block it is."""
        places = ((self.session, self._writer), (self._late_session, self._late_writer))
        self._check_size(num_bytes, max((writer for _, writer in places), key=lambda writer: writer.arena.num_bytes))
        while True:
            for session, writer in places:
                if num_bytes + HEADER_BYTES <= writer.arena.num_bytes and (written := writer.write(drafts, num_bytes)):
                    return session, *written
            await self._wait(_Wait(num_bytes=num_bytes, lease=lease))

    def free(self, extent: Extent) -> None:
        """Nobody needs a block any more."""
        writer = self._writer if extent.arena == self._writer.arena.number else self._late_writer
        writer.free(extent)
        self._wake()

    def changed(self) -> None:
        """A ticket was put or dropped, or a lease has ended: who waits may have more room, or none for ever."""
        self._wake()

    def take_waits(self, lease: Lease) -> None:
        """The consumer of this lease waits for more groups; what it has is not acknowledged before it got them."""
        self._takes[lease.number] = (lease, len(lease.parts))
        self._judge()

    def take_ends(self, lease: Lease) -> None:
        """It does not wait any more."""
        self._takes.pop(lease.number, None)

    def close(self) -> None:
        """Give it all back."""
        self._control.close_session(self.session)
        self._control.close_session(self._late_session)

    # -- who waits -----------------------------------------------------------------------------

    async def _wait(self, wait: _Wait) -> None:
        self._waits.append(wait)
        try:
            self._judge()
            await wait.room
        finally:
            if wait in self._waits:
                self._waits.remove(wait)

    def _wake(self) -> None:
        """Let all try again: writes first, for they let the trainer go on, then the oldest groups."""
        waits, self._waits = self._waits, []
        for wait in sorted(waits, key=lambda wait: wait.ticket):
            if not wait.room.done():
                wait.room.set_result(None)

    def _judge(self) -> None:
        """Fail all who wait if nobody can free anything, once the log has let go of what was freed."""
        if self._waits and self._is_stuck():
            self._control.journal.when_written(self._fail_if_stuck)

    def _fail_if_stuck(self) -> None:
        if self._waits and self._is_stuck():
            waits, self._waits = self._waits, []
            for wait in waits:
                if not wait.room.done():
                    wait.room.set_exception(QueueFullError(self._full(wait.num_bytes)))

    def _is_stuck(self) -> bool:
        """Whether every task, every lease and every group under way waits in vain.

        Whoever holds rows and waits for more, or for room to write, acknowledges nothing meanwhile.
        """
        leases = self.session.leases
        waiting = {wait.lease for wait in self._waits}
        waiting |= {number for number, (held, num_parts) in self._takes.items() if len(held.parts) == num_parts}
        is_active = any(lease.parts and number not in waiting for number, lease in leases.items())
        is_rolling_out = bool(self.session.reserved - {wait.ticket for wait in self._waits})
        tasks = {leases[number].task for number in waiting if number in leases}
        return not is_active and not is_rolling_out and len(tasks) == len(self._control.ledger.tasks)

    # -- messages ------------------------------------------------------------------------------

    def _check_size(self, num_bytes: int, writer: Writer) -> None:
        if num_bytes + HEADER_BYTES > writer.arena.num_bytes:
            raise QueueFullError(self._full(num_bytes))

    def _full(self, num_bytes: int) -> str:
        return (
            f"the transfer queue has no room for {num_bytes:,} bytes: {self._writer.num_free:,} of "
            f"{self._writer.arena.num_bytes:,} are free, and {self._late_writer.num_free:,} of the "
            f"{self._late_writer.arena.num_bytes:,} that only columns written by stages may use "
            f"({self._control.waiting_for()}). Raise queue.memory_mb"
        )
