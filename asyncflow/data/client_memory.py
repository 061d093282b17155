"""A client's memory: its own arena, which it puts rows into, and those of others, which it reads."""

from __future__ import annotations

import time
from collections.abc import Sequence

from asyncflow.core.errors import QueueFullError
from asyncflow.data.arena import Arena
from asyncflow.data.connection import Connection
from asyncflow.data.directory import Extent
from asyncflow.data.layout import ColumnSpec, Draft
from asyncflow.data.messages import Done, Room
from asyncflow.data.plane import Writer


class ClientMemory:
    """The arenas of one connection. Its own is made when it first puts something."""

    def __init__(self, arena_bytes: int) -> None:
        self._arena_bytes = arena_bytes
        self._arenas: dict[int, Arena] = {}
        self._writer: Writer | None = None

    def write(
        self, link: Connection, drafts: Sequence[Draft], num_bytes: int, timeout_s: float | None
    ) -> tuple[Extent, tuple[ColumnSpec, ...]]:
        """A block of ours with these columns, as soon as there is room. Raises `QueueFullError`."""
        writer = self._writer or self._attach(link)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (written := writer.write(drafts, num_bytes)) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if link.ask_parked(Room(link.next()), Done, left) is None:
                raise QueueFullError(
                    f"no room for {num_bytes:,} bytes in {timeout_s:g} s: {writer.num_free:,} of "
                    f"{writer.arena.num_bytes:,} are free, the rest waits for the tasks "
                    f"{', '.join(link.welcome.tasks)}"
                )
        return written

    def _attach(self, link: Connection) -> Writer:
        arena = Arena.create(self._arena_bytes, 0)
        arena.number = link.attach(arena.fd)
        self._arenas[arena.number] = arena
        self._writer = Writer(arena)
        return self._writer

    def free(self, extent: Extent) -> None:
        """A block of ours may be written over."""
        self.free_at(extent.offset, extent.num_bytes)

    def free_at(self, offset: int, num_bytes: int) -> None:
        """The same, for what the server says."""
        if self._writer is not None:
            self._writer.free(Extent(self._writer.arena.number, offset, num_bytes, 0))

    def hear_of(self, number: int, fd: int) -> None:
        """The arena of another process."""
        self._arenas[number] = Arena.attach(fd, number)

    def arena(self, number: int) -> Arena:
        """The arena of this number."""
        return self._arenas[number]

    def close(self) -> None:
        """Let go of all."""
        for arena in self._arenas.values():
            arena.close()
