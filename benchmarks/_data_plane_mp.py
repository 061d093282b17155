"""The arm of `multiprocessing.Queue`: every put is one message of packed bytes.

Its pipe is widened to the 1 MiB that Linux allows without privileges, which makes it faster.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import cast

from _data_plane_run import Options
from _data_plane_work import Batch, Job, Rows, count, join, pack, unpack

PIPE_BYTES = 1 << 20


@contextlib.contextmanager
def serve(options: Options) -> Iterator[object]:
    """The queue itself is what processes connect with."""
    queue: Queue[bytes] = multiprocessing.get_context("spawn").Queue()
    writer = getattr(queue, "_writer")  # noqa: B009 - private, and typed nowhere
    with contextlib.suppress(OSError):
        fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, int(options.get("pipe_bytes", PIPE_BYTES)))
    yield queue
    queue.close()


class Producer:
    """Packs and puts; the queue's own thread writes."""

    def __init__(self, queue: Queue[bytes], job: Job) -> None:
        self._queue, self._columns = queue, job.columns

    def put(self, rows: Rows) -> None:
        """One message."""
        self._queue.put(b"".join(pack(rows, self._columns)))

    def flush(self) -> None:
        """Nothing tells when a message has arrived."""


class Consumer:
    """Gets messages until there are enough rows."""

    def __init__(self, queue: Queue[bytes], job: Job) -> None:
        self._queue, self._job = queue, job

    def get(self, num_rows: int) -> Batch:
        """Of as many messages as it takes."""
        batches: list[Batch] = []
        while num_rows > 0:
            batches.append(unpack(self._queue.get(), self._job.columns))
            num_rows -= count(batches[-1])
        return join(batches)

    def clear(self) -> None:
        """Nothing is held."""


@contextlib.contextmanager
def open_producer(address: object, job: Job) -> Iterator[Producer]:
    """Connect."""
    yield Producer(cast("Queue[bytes]", address), job)


@contextlib.contextmanager
def open_consumer(address: object, job: Job) -> Iterator[Consumer]:
    """Connect."""
    yield Consumer(cast("Queue[bytes]", address), job)
