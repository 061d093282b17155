"""The arm of asyncflow's own transfer queue."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from _data_plane_run import Options
from _data_plane_work import COLUMNS, Batch, Job, Rows

from asyncflow.data import Batch as TaskBatch
from asyncflow.data import TransferQueue
from asyncflow.data.batch import Asked
from asyncflow.data.log import LogMode

ARENA_BYTES = 1 << 28
DENSE_ARENA_BYTES = 1 << 30
"""A batch of D is larger than what a connection has by default."""
TASK = "train"


@contextlib.contextmanager
def serve(options: Options) -> Iterator[object]:
    """Its server for the columns of a workload; with a log in the folder that the option `log` names."""
    tasks = {TASK: COLUMNS[options["workload"]]}
    log = Path(options["log"]) if "log" in options else None
    with TransferQueue.start(tasks=tasks, arena_bytes=ARENA_BYTES, log=log, log_mode=LogMode.SYNC) as queue:
        yield queue.address


class Producer:
    """Puts, with a window of puts under way."""

    def __init__(self, queue: TransferQueue) -> None:
        self._queue = queue

    def put(self, rows: Rows) -> None:
        """One put, whatever its size."""
        self._queue.put_soon(rows)

    def flush(self) -> None:
        """Wait for those under way."""
        self._queue.flush()


class Consumer:
    """Asks for the next batch before it works on this one, as the loader does; that message acknowledges the last."""

    def __init__(self, queue: TransferQueue, job: Job) -> None:
        self._queue, self._columns = queue, job.columns
        self._batch: TaskBatch | None = None
        self._asked: Asked | None = None
        self._num_rows = 0

    def get(self, num_rows: int) -> Batch:
        """Views of shared memory."""
        asked = self._asked or self._ask(num_rows)
        if num_rows != self._num_rows:
            self._queue.withdraw(asked)
            asked = self._ask(num_rows)
        self._asked = self._ask(num_rows)
        batch = self._queue.answer(asked)
        assert batch is not None
        self._batch = batch
        found: Batch = {}
        for name in self._columns:
            column = batch[name]
            lengths = None if column.is_dense else column.lengths.astype(np.int64)
            found[name] = (column.values, lengths)
        return found

    def clear(self) -> None:
        """Acknowledge the last batch, and ask for no more."""
        if self._asked is not None:
            self._queue.withdraw(self._asked)
            self._asked = None
        if self._batch is not None:
            self._queue.acknowledge(self._batch)
            self._batch = None

    def _ask(self, num_rows: int) -> Asked:
        self._num_rows, done, self._batch = num_rows, self._batch, None
        return self._queue.ask(TASK, max_rows=num_rows, at_least=num_rows, done=done)


@contextlib.contextmanager
def open_producer(address: object, job: Job) -> Iterator[Producer]:
    """Connect."""
    with TransferQueue.connect(
        str(address), arena_bytes=DENSE_ARENA_BYTES if job.workload == "D" else ARENA_BYTES
    ) as queue:
        yield Producer(queue)


@contextlib.contextmanager
def open_consumer(address: object, job: Job) -> Iterator[Consumer]:
    """Connect."""
    with TransferQueue.connect(str(address)) as queue:
        consumer = Consumer(queue, job)
        yield consumer
        consumer.clear()
