"""The transfer queue in each of its forms behind one blocking face, so that each shows the same behaviour."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from asyncflow.core.types import MicroBatch, Ragged, Rows
from asyncflow.data.batch import Batch
from asyncflow.data.control import ControlPlane
from asyncflow.data.layout import ColumnLike
from asyncflow.data.ledger import Ledger, LedgerCounts, QueueTask
from asyncflow.data.local_queue import Lease, LocalQueue
from asyncflow.data.log import NoLog
from asyncflow.data.plane import read_columns
from asyncflow.data.queue import TransferQueue
from asyncflow.data.server import Server

ResultT = TypeVar("ResultT")
Needs = Mapping[str, Sequence[str]]
ARENA_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Got:
    """What a consumer was given. `lease` is the store's own affair."""

    rows: Rows
    columns: Mapping[str, Ragged]
    lease: Lease | Batch


class Store(Protocol):
    """A queue without a gate."""

    def put(self, columns: Mapping[str, ColumnLike], *, group_size: int = 1) -> Rows: ...
    def get(self, task: str, *, max_groups: int = 99) -> Got | None:
        """None when nothing is ready now."""

    def write(self, rows: Rows, name: str, column: ColumnLike) -> None: ...
    def fetch(self, rows: Rows, names: Sequence[str]) -> Mapping[str, Ragged]: ...
    def acknowledge(self, got: Got) -> None: ...
    def release(self, got: Got) -> None: ...
    def clear(self) -> None: ...
    def counts(self) -> LedgerCounts: ...
    def num_free(self) -> int: ...


class LocalStore:
    """`LocalQueue`, on an event loop of its own."""

    def __init__(self, needs: Needs, control: ControlPlane | None = None) -> None:
        self.runner = asyncio.Runner()
        tasks = [QueueTask(name=name, needs=tuple(columns)) for name, columns in needs.items()]
        self.queue = LocalQueue(tasks, control=control, memory_bytes=ARENA_BYTES)

    def put(self, columns: Mapping[str, ColumnLike], *, group_size: int = 1) -> Rows:
        """Group by group, as rollouts finish."""
        num_rows = len(next(iter(columns.values())))  # type: ignore[arg-type]

        async def put() -> Rows:
            parts = []
            for start in range(0, num_rows, group_size):
                ticket = await self.queue.reserve()
                part = {name: column[start : start + group_size] for name, column in columns.items()}  # type: ignore[index]
                await self.queue.put(ticket, part)  # type: ignore[arg-type]
                parts.append(Rows.of_groups(np.array([ticket]), group_size, self.queue.control.generation))
            return Rows.join(parts)

        return self.runner.run(put())

    def get(self, task: str, *, max_groups: int = 99) -> Got | None:
        lease = self.queue.lease(task)

        async def get() -> MicroBatch | None:
            async with asyncio.TaskGroup() as group:
                taking = group.create_task(self.queue.take(lease, max_groups=max_groups), name="take")
                for _ in range(4):
                    await asyncio.sleep(0)
                taking.cancel()
            return None if taking.cancelled() else taking.result()

        batch = self.runner.run(get())
        return None if batch is None else Got(rows=batch.rows, columns=batch.columns, lease=lease)

    def write(self, rows: Rows, name: str, column: ColumnLike) -> None:
        lease = Lease(task="writer", number=-1)  # there is room, so nobody asks under which it waits
        batch = MicroBatch(rows=rows, columns={})
        self.runner.run(self.queue.write(lease, batch, name, column))  # type: ignore[arg-type]

    def fetch(self, rows: Rows, names: Sequence[str]) -> Mapping[str, Ragged]:
        control = self.queue.control
        return read_columns(control.locate(rows, names), names, control.memory.arena, is_copied=True)

    def acknowledge(self, got: Got) -> None:
        assert isinstance(got.lease, Lease)
        self.runner.run(self.queue.acknowledge(got.lease))

    def release(self, got: Got) -> None:
        assert isinstance(got.lease, Lease)
        self.queue.release(got.lease)

    def clear(self) -> None:
        self.queue.control.clear()

    def counts(self) -> LedgerCounts:
        return self.queue.counts()

    def num_free(self) -> int:
        return self.queue._memory._writer.num_free

    def close(self) -> None:
        self.queue.close()
        self.runner.close()


class RemoteStore:
    """`TransferQueue`; a producer's and a consumer's connection."""

    def __init__(self, address: str) -> None:
        self.producer = TransferQueue.connect(address, arena_bytes=ARENA_BYTES)
        self.consumer = TransferQueue.connect(address, arena_bytes=ARENA_BYTES)

    def put(self, columns: Mapping[str, ColumnLike], *, group_size: int = 1) -> Rows:
        return self.producer.put(columns, group_size=group_size)

    def get(self, task: str, *, max_groups: int = 99) -> Got | None:
        try:
            batch = self.consumer.get(task, max_rows=max_groups, timeout_s=0)
        except TimeoutError:
            return None
        assert batch is not None
        return Got(rows=batch.rows, columns=batch.columns, lease=batch)

    def write(self, rows: Rows, name: str, column: ColumnLike) -> None:
        self.consumer.write(rows, {name: column})

    def fetch(self, rows: Rows, names: Sequence[str]) -> Mapping[str, Ragged]:
        return self.consumer.fetch(rows, names)

    def acknowledge(self, got: Got) -> None:
        assert isinstance(got.lease, Batch)
        self.consumer.acknowledge(got.lease)

    def release(self, got: Got) -> None:
        assert isinstance(got.lease, Batch)
        self.consumer.release(got.lease)

    def clear(self) -> None:
        self.producer.clear()

    def counts(self) -> LedgerCounts:
        return self.consumer.counts()

    def num_free(self) -> int:
        self.producer.counts()  # what is freed comes with an answer
        return self.producer._memory._writer.num_free if self.producer._memory._writer is not None else ARENA_BYTES

    def close(self) -> None:
        self.consumer.close()
        self.producer.close()


class ThreadServer:
    """A server on an event loop in a thread of this process, where tests can look at it."""

    def __init__(self, make_control: Callable[[], ControlPlane]) -> None:
        self._is_up = threading.Event()
        self._thread = threading.Thread(target=self._work, args=[make_control], name="server", daemon=True)
        self._thread.start()
        assert self._is_up.wait(30)

    def _work(self, make_control: Callable[[], ControlPlane]) -> None:
        asyncio.run(self._serve(make_control))

    async def _serve(self, make_control: Callable[[], ControlPlane]) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        self.server = Server(make_control())
        self._is_up.set()
        await self._over.wait()
        self.server.close()
        self.server.control.close()

    @property
    def address(self) -> str:
        return self.server.address

    def ask(self, look: Callable[[Server], ResultT]) -> ResultT:
        """What `look` finds, on the server's own thread."""

        async def ask() -> ResultT:
            return look(self.server)

        return asyncio.run_coroutine_threadsafe(ask(), self.loop).result(30)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)


@contextmanager
def thread_server(needs: Needs) -> Iterator[ThreadServer]:
    tasks = [QueueTask(name=name, needs=tuple(columns)) for name, columns in needs.items()]
    server = ThreadServer(lambda: ControlPlane(Ledger(tasks), NoLog(), generation=7))
    try:
        yield server
    finally:
        server.close()


@contextmanager
def local_store(needs: Needs) -> Iterator[Store]:
    store = LocalStore(needs)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def thread_store(needs: Needs) -> Iterator[Store]:
    with thread_server(needs) as server:
        store = RemoteStore(server.address)
        try:
            yield store
        finally:
            store.close()


@contextmanager
def process_store(needs: Needs) -> Iterator[Store]:
    with TransferQueue.start(needs) as queue:
        store = RemoteStore(queue.address)
        try:
            yield store
        finally:
            store.close()
