"""Shared memory for blocks: one arena for each process that writes.

An arena is a `memfd`: it has no name in any file system, processes get it as a file
descriptor, and the kernel frees it when the last process that holds it is gone, however that
process ended. So nothing is ever left behind, and no limit of /dev/shm applies. Its owner
writes; everybody else maps it read-only.

A block lies behind a header of 64 bytes that holds its stamp, a number that no other block
of the arena ever had. The owner clears the stamp before it writes over a block and sets the new one
when it is whole: whoever reads by an old reference sees another stamp, and never other data.

Pages are taken from the system as they are first used, before they are written to, so that
memory that is exhausted is an error (`QueueFullError`) and not a signal that kills.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LedgerError, QueueError, QueueFullError, StaleHandleError
from asyncflow.data.directory import Extent
from asyncflow.data.layout import ALIGNMENT_BYTES

HEADER_BYTES = ALIGNMENT_BYTES
SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
FIRST_BYTES = 1 << 20
GROW_BYTES = 1 << 26
"""Pages are taken from the system in pieces that double between these sizes."""
Bytes = NDArray[np.uint8]


class Arena:
    """A mapped arena: for its owner to write, for others to read."""

    def __init__(self, fd: int, number: int, *, is_owner: bool) -> None:
        self.number = number
        self.fd = fd
        self.num_bytes = os.fstat(fd).st_size
        access = mmap.ACCESS_WRITE if is_owner else mmap.ACCESS_READ
        self._memory: Bytes | None = np.frombuffer(mmap.mmap(fd, self.num_bytes, access=access), np.uint8)
        self._readable = self._memory.view()
        self._readable.flags.writeable = False
        self._num_backed = 0

    @classmethod
    def create(cls, num_bytes: int, number: int) -> Arena:
        """A new arena, whose memory is taken as it is used."""
        if num_bytes < 1 << 16:
            raise ValueError(f"an arena has at least 64 KiB, not {num_bytes} bytes")
        fd = os.memfd_create("asyncflow-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SIZE_SEALS)
        return cls(fd, number, is_owner=True)

    @classmethod
    def attach(cls, fd: int, number: int) -> Arena:
        """An arena of another process, to read. It takes the descriptor over.

        Raises `QueueError` when it is none, or one whose size could change under us, which would kill a reader.
        """
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SIZE_SEALS == SIZE_SEALS
            if not is_sealed:
                raise QueueError("shared memory that may change its size is no arena")
            return cls(fd, number, is_owner=False)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError | ValueError):
                raise QueueError(f"this descriptor is no arena: {error}") from error
            raise

    def begin(self, extent: Extent) -> Bytes:
        """The memory of a new block, to be filled before `commit`. Raises `QueueFullError` without memory."""
        self._back(extent.offset + extent.num_bytes)
        memory = self._open()
        memory[extent.offset : extent.offset + 8].view(np.uint64)[0] = 0
        return memory[extent.offset + HEADER_BYTES : extent.offset + extent.num_bytes]

    def commit(self, extent: Extent) -> None:
        """The block is whole: from now on it is what its stamp says."""
        self._open()[extent.offset : extent.offset + 8].view(np.uint64)[0] = extent.stamp

    def block(self, extent: Extent) -> Bytes:
        """A read-only view of a block. Raises `StaleHandleError` when it is no longer what the reference names."""
        self._open()
        memory = self._readable
        if extent.offset < 0 or extent.num_bytes < HEADER_BYTES or extent.offset + extent.num_bytes > len(memory):
            raise StaleHandleError(f"no block can lie at byte {extent.offset} of an arena of {len(memory)} bytes")
        if int(memory[extent.offset : extent.offset + 8].view(np.uint64)[0]) != extent.stamp:
            raise StaleHandleError("the memory of these rows is used again by others: they were freed")
        return memory[extent.offset + HEADER_BYTES : extent.offset + extent.num_bytes]

    def close(self) -> None:
        """Let go of it; the memory is freed once no process and no view holds it. May be called twice."""
        if self._memory is not None:
            self._memory = None
            self._readable = np.empty(0, np.uint8)
            os.close(self.fd)

    def _back(self, end: int) -> None:
        if end <= self._num_backed:
            return
        step = min(GROW_BYTES, max(FIRST_BYTES, self._num_backed))
        wanted = min(self.num_bytes, -(-end // step) * step)
        try:
            os.posix_fallocate(self.fd, self._num_backed, wanted - self._num_backed)
        except OSError as error:
            raise QueueFullError(
                f"the system has no memory for {(wanted - self._num_backed) >> 20} MiB more of a transfer queue: "
                f"{error.strerror}. Free some, or give the queue smaller arenas"
            ) from error
        self._num_backed = wanted

    def _open(self) -> Bytes:
        if self._memory is None:
            raise StaleHandleError("the arena is closed")
        return self._memory


class Allocator:
    """Free space of an arena: first fit, neighbours joined. The lowest addresses are used again first."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_free = num_bytes
        self._starts = [0]
        self._sizes = {0: num_bytes}
        self._num_stamps = secrets.randbits(62)  # no value in a row looks like the next ones

    def take(self, num_bytes: int, arena: int) -> Extent | None:
        """Space for a block of so many bytes; None when there is none now.

        >>> space = Allocator(1 << 16)
        >>> extent = space.take(100, arena=1)
        >>> extent.offset, extent.num_bytes
        (0, 192)
        """
        wanted = -(-(num_bytes + HEADER_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        start = next((start for start in self._starts if self._sizes[start] >= wanted), None)
        if start is None:
            return None
        size = self._sizes.pop(start)
        place = bisect_left(self._starts, start)
        if size == wanted:
            del self._starts[place]
        else:
            self._starts[place] = start + wanted
            self._sizes[start + wanted] = size - wanted
        self.num_free -= wanted
        self._num_stamps += 1
        return Extent(arena, start, wanted, self._num_stamps)

    def give_back(self, offset: int, num_bytes: int) -> None:
        """The space of a block is free. Raises `LedgerError` when part of it is free already."""
        place = bisect_left(self._starts, offset)
        before = self._starts[place - 1] if place else None
        after = self._starts[place] if place < len(self._starts) else None
        overlaps = (before is not None and before + self._sizes[before] > offset) or (
            after is not None and offset + num_bytes > after
        )
        if overlaps:
            raise LedgerError(f"the space at byte {offset} was given back twice")
        self.num_free += num_bytes
        start, size = offset, num_bytes
        if after is not None and offset + num_bytes == after:
            size += self._sizes.pop(after)
            del self._starts[place]
        if before is not None and before + self._sizes[before] == offset:
            self._sizes[before] += size
        else:
            insort(self._starts, start)
            self._sizes[start] = size
