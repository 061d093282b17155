"""The durable log: records in one order, written by one process, acted upon once a crash can't take them back.

A record is a meta and a payload; the log knows what neither means. `append` only numbers it: a
thread takes all records that wait (at most `ROUND_BYTES`), writes them with one `writev`,
flushes them with one `fdatasync` and wakes the event loop once, so the more records come, the
fewer flushes each costs.

**Invariant.** In mode `sync`, an action given to `when_safe` runs only when its record and all
before it are on the disk. In mode `group_commit` it runs at once, and a crash may take back
what was appended in the last `group_commit_s` and the flush after it. When the disk fails, no
record that was not on it is ever acted upon in mode `sync`, nor any appended later in either;
a failed flush is not tried again, because the system may have dropped the pages it failed on.

**How the bytes get to the disk.** Sustained for 11 s into new files on a virtual disk with
ext4, 12 records of 350 KB a flush, checksums included, two runs of each (MB/s): `writev` and
`fdatasync` 376 and 378, since the kernel throttles who fills the page cache with new pages; the
same into allocated segments 447 and 468; `O_DIRECT` from a staging buffer 904-1218; `O_DIRECT`
into allocated segments 773-1471; `writev`, `fdatasync` and `POSIX_FADV_DONTNEED` on what was
flushed 1056 and 1203. The last is as fast as the disk within its spread, and needs no alignment,
no padding and no second path for file systems without `O_DIRECT`, so it is used.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.causes import disk_reason
from asyncflow.core.errors import LedgerError, RunFolderError
from asyncflow.core.world import sync_folder
from asyncflow.data.log_reader import (
    MAX_META_BYTES,
    MAX_PAYLOAD_BYTES,
    LoggedRecord,
    Place,
    compact,
    read_log,
    read_payload,
)
from asyncflow.data.log_segments import Pending, SegmentWriter, lock_folder, recover

__all__ = [
    "Buffer",
    "FileLog",
    "Log",
    "LogMode",
    "LoggedRecord",
    "MemoryLog",
    "NoLog",
    "Place",
    "compact",
    "read_log",
    "read_payload",
]

SEGMENT_BYTES = 64 << 20
ROUND_BYTES = 16 << 20

Buffer: TypeAlias = bytes | memoryview | NDArray[np.uint8]
Action: TypeAlias = Callable[[], None]


class LogMode(StrEnum):
    """When a record may be acted upon: on the disk; at once, and flushed soon after; there is no log."""

    SYNC = "sync"
    GROUP_COMMIT = "group_commit"
    OFF = "off"


class Log(Protocol):
    """Where transitions go before they are acted upon. Used from the event loop's thread only."""

    is_kept: bool
    """Whether anything is kept at all."""

    def append(self, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """The record's number: 1, 2, 3, … The buffers must not change until `when_written`."""
        ...

    def when_safe(self, lsn: int, action: Action) -> None:
        """Call the action once the record may be acted upon: now if it may, else later, in the records' order."""
        ...

    def when_written(self, lsn: int, action: Action) -> None:
        """Call the action once the payload's buffers are no longer read, so that their memory may be used again."""
        ...

    async def flush(self) -> None:
        """Wait until everything appended so far is on the disk. Raises `RunFolderError` when it can't be."""
        ...

    async def aclose(self) -> None:
        """Flush and close; may be called again. Raises like `flush`, closed nevertheless."""
        ...


class NoLog:
    """Mode `off`: nothing is kept, every action runs at once."""

    is_kept = False

    def __init__(self) -> None:
        self._last = 0

    def append(self, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """The next number."""
        self._last += 1
        return self._last

    def when_safe(self, lsn: int, action: Action) -> None:
        """Call it."""
        action()

    def when_written(self, lsn: int, action: Action) -> None:
        """Call it."""
        action()

    async def flush(self) -> None:
        """Nothing to wait for."""

    async def aclose(self) -> None:
        """Nothing to close."""


class MemoryLog(NoLog):
    """Keeps meta and payload of every record in `records`, for simulation and tests."""

    is_kept = True

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[bytes, bytes]] = []

    def append(self, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """Keep a copy."""
        self.records.append((meta, b"".join(map(_view, payload))))
        return super().append(meta)


class _Milestone:
    """How far the records have come, and what waits for that, in the records' order."""

    def __init__(self, reached: int) -> None:
        self.reached = reached
        self._waiting: list[tuple[int, int, Action]] = []
        self._calls = count()

    def when(self, lsn: int, action: Action) -> None:
        if lsn <= self.reached:
            action()
        else:
            heapq.heappush(self._waiting, (lsn, next(self._calls), action))

    def advance(self, lsn: int) -> None:
        """Run what waited for this. An action that fails is reported, and the others run."""
        while self._waiting and self._waiting[0][0] <= lsn:
            # Never further than the action that runs: what it asks for must not overtake those that wait.
            self.reached, _, action = heapq.heappop(self._waiting)
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the caller of an action is the loop
                context = {"message": f"an action of record {self.reached} failed", "exception": error}
                asyncio.get_running_loop().call_exception_handler(context)
        self.reached = max(self.reached, lsn)


class FileLog:
    """The log in a folder, whose only writer this is; `open` makes one.

    The memory of records that wait to be written is the caller's: how many may wait is
    bounded by what the caller does until `when_written`.
    """

    is_kept = True

    def __init__(
        self, end: SegmentWriter, *, mode: LogMode, group_commit_s: float, on_failure: Callable[[Exception], None]
    ) -> None:
        self._end = end
        self._mode = mode
        self._group_commit_s = group_commit_s
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._next_lsn = end.first_lsn
        self._written = _Milestone(end.written_lsn)
        self._durable = _Milestone(end.durable_lsn)
        self._failure: RunFolderError | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._is_closed = False
        # What follows belongs to both threads: the loop's appends and asks, the writer's takes.
        self._wake = threading.Condition()
        self._pending: deque[Pending] = deque()
        self._asked_lsn = 0  # `flush` wants everything up to here on the disk
        self._is_ending = False
        self._lock = -1
        self._thread = threading.Thread(target=self._work, name="asyncflow-log", daemon=True)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        mode: LogMode,
        on_failure: Callable[[Exception], None],
        group_commit_s: float = 0.01,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> Self:
        """Take the folder over: cut what a crash left at the end, and go on after it in a new segment.

        To be called on the event loop; reads the last segment. `on_failure` is called there, once,
        when the disk fails. Raises `RunFolderError` when another process writes here or the folder
        can't be written, `LogDamagedError` when the last segment is damaged.
        """
        if mode == LogMode.OFF:
            raise LedgerError("a FileLog writes; in mode off use NoLog")
        lock = -1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            lock = lock_folder(folder)
            number, first_lsn = recover(folder)
            end = SegmentWriter(folder=folder, segment_bytes=segment_bytes, number=number, first_lsn=first_lsn)
            end.start()
        except (OSError, RunFolderError) as error:
            if lock >= 0:
                os.close(lock)
            if isinstance(error, OSError):
                raise RunFolderError(f"{folder} can't be written: {disk_reason(error)}") from error
            raise
        log = cls(end, mode=mode, group_commit_s=group_commit_s, on_failure=on_failure)
        log._lock = lock
        log._thread.start()
        return log

    def append(self, meta: bytes, payload: Sequence[Buffer] = ()) -> int:
        """The record's number. Raises `LedgerError` when the log is closed or the record too large."""
        views = [view.cast("B") for part in payload if (view := _view(part)).nbytes]
        payload_bytes = sum(len(view) for view in views)
        if self._is_closed or len(meta) > MAX_META_BYTES or payload_bytes > MAX_PAYLOAD_BYTES:
            raise LedgerError(
                f"record {self._next_lsn} can't be logged: the log is closed, or its meta ({len(meta)} bytes) or "
                f"payload ({payload_bytes} bytes) is over {MAX_META_BYTES} or {MAX_PAYLOAD_BYTES}"
            )
        lsn = self._next_lsn
        self._next_lsn += 1
        if self._failure is None:
            with self._wake:
                self._pending.append(Pending(lsn, meta, views, payload_bytes))
                self._wake.notify()
        return lsn

    def when_safe(self, lsn: int, action: Action) -> None:
        """Call the action at once in mode `group_commit`, else when the record is on the disk."""
        if self._mode == LogMode.SYNC or self._failure is not None:
            self._durable.when(lsn, action)
        else:
            action()

    def when_written(self, lsn: int, action: Action) -> None:
        """Call the action once the payload's buffers are no longer read."""
        self._written.when(lsn, action)

    async def flush(self) -> None:
        """Wait until everything appended so far is on the disk. Raises `RunFolderError` when it can't be."""
        self._raise_failure()
        target = self._next_lsn - 1
        if self._durable.reached >= target:
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        self._durable.when(target, partial(_settle, waiter))
        with self._wake:
            self._asked_lsn = max(self._asked_lsn, target)
            self._wake.notify()
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
        self._raise_failure()

    async def aclose(self) -> None:
        """Flush, end the thread and let go of the folder; may be called again. Raises like `flush`."""
        self._is_closed = True
        try:
            await self.flush()
        finally:
            with self._wake:
                self._is_ending = True
                self._wake.notify()
            self._thread.join()  # it has nothing left to write, unless this was cancelled
            self._end.close()
            lock, self._lock = self._lock, -1
            if lock >= 0:
                os.close(lock)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise RunFolderError(str(self._failure)) from self._failure.__cause__

    def _reach(self, written_lsn: int, durable_lsn: int) -> None:
        self._written.advance(written_lsn)
        self._durable.advance(durable_lsn)

    def _fail(self, error: Exception) -> None:
        """On the loop, after all that the thread told before: nothing that still waits ever runs."""
        reason = disk_reason(error) or f"{type(error).__name__}: {error}"
        self._failure = RunFolderError(
            f"the log in {self._end.folder} can't be written: {reason}. Nothing after record "
            f"{self._durable.reached} is certain to be on the disk; resume the run when the disk is sound"
        )
        self._failure.__cause__ = error
        self._pending.clear()  # the thread has ended
        for waiter in self._waiters:
            _settle(waiter)
        self._on_failure(self._failure)

    def _work(self) -> None:
        """The writer's thread: a round each time that there is something to do."""
        end = self._end
        sync_due_s: float | None = None  # when what was written must be flushed
        try:
            while (batch := self._take_round(sync_due_s)) is not None:
                if batch:
                    end.write(batch)
                now_s = self._loop.time()
                if sync_due_s is None:
                    sync_due_s = now_s + self._group_commit_s
                if self._mode == LogMode.SYNC or self._must_sync() or now_s >= sync_due_s:
                    end.sync()
                if end.durable_lsn == end.written_lsn:
                    sync_due_s = None
                del batch  # the memory of its payloads is the caller's again
                self._tell(partial(self._reach, end.written_lsn, end.durable_lsn))
        except Exception as error:  # noqa: BLE001 - told to the loop
            self._tell(partial(self._fail, error))

    def _must_sync(self) -> bool:
        return self._is_ending or self._end.durable_lsn < self._asked_lsn

    def _take_round(self, sync_due_s: float | None) -> list[Pending] | None:
        """The records that wait, none when only a flush is due; None when all is done."""
        with self._wake:
            while not self._pending:
                if self._is_ending and sync_due_s is None:
                    return None
                wait_s = None if sync_due_s is None else sync_due_s - self._loop.time()
                if wait_s is not None and (wait_s <= 0 or self._must_sync()):
                    return []
                self._wake.wait(wait_s)
            batch: list[Pending] = []
            num_bytes = 0
            while self._pending and num_bytes < ROUND_BYTES:
                batch.append(self._pending.popleft())
                num_bytes += batch[-1].payload_bytes + len(batch[-1].meta)
            return batch

    def _tell(self, news: Action) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(news)


def _view(part: Buffer) -> memoryview:
    return part.data if isinstance(part, np.ndarray) else memoryview(part)


def _settle(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
