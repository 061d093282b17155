"""The transfer queue for any process: rows in, batches out, each exactly once.

::

    with TransferQueue.start({"train": ("prompt", "response", "reward")}) as queue:
        queue.put({"prompt": [...], "response": [...], "reward": rewards})   # one row each
        batch = queue.get("train", max_rows=32)                              # leased, as views
        ...
        queue.acknowledge(batch)                                             # now it is consumed

Other processes connect with `TransferQueue.connect(queue.address)`. Rows lie in shared memory and are never
copied to be sent: a put writes them once, a get gives views where they lie together. A put
and a get are one message and one answer. A task is offered a row the moment all columns that it needs exist;
its workers get disjoint rows, and a row is gone when every task has acknowledged it. What a
consumer has not acknowledged when it ends is given to another.

Calls block. A connection is for one thread; each thread and process makes its own. numpy only:
torch tensors may be put, and `StreamingLoader` feeds them to a training loop.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncflow.core import errors
from asyncflow.core.errors import AsyncFlowError, QueueError, QueueFullError, QueueLostError
from asyncflow.core.types import Ragged, Rows, Ticket
from asyncflow.core.world import World
from asyncflow.data.arena import Arena
from asyncflow.data.batch import Batch
from asyncflow.data.directory import Extent
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnLike, ColumnSpec, Draft, lay_out
from asyncflow.data.ledger import LedgerCounts
from asyncflow.data.log import LogMode
from asyncflow.data.messages import (
    PROTOCOL,
    Accounts,
    Acknowledge,
    Advance,
    AnyReply,
    AnyRequest,
    ArenaIs,
    Attach,
    BeginStep,
    Cancel,
    Clear,
    Counts,
    Dispatch,
    Done,
    Drop,
    Failed,
    Fetch,
    Finish,
    Frames,
    Given,
    Hello,
    Ping,
    Put,
    Release,
    Reserve,
    Room,
    Settled,
    Take,
    Welcome,
    Write,
    frame,
    reply_decoder,
)
from asyncflow.data.plane import Writer, read_columns
from asyncflow.data.records import row_bytes, ticket_bytes
from asyncflow.data.server_process import ServerSettings, start_server

ARENA_BYTES = 1 << 28
"""Memory for the rows of one process that puts, if nobody says otherwise; taken from the system as it is used."""
WINDOW = 16
"""Puts on their way at most, with `wait=False`."""
PATIENCE_S = 10.0
"""How long a server may say nothing, although asked, before it is taken for lost."""
RECEIVE_BYTES = 1 << 18

ReplyT = TypeVar("ReplyT", bound=AnyReply)


class TransferQueue:
    """A connection to a queue. Made by `start` or `connect`; ends with `close` or the end of a `with` block."""

    def __init__(self, address: str, *, arena_bytes: int = ARENA_BYTES, name: str = "") -> None:
        self.address = address
        self._arena_bytes = arena_bytes
        self._name = name
        self._on_close: Callable[[], None] | None = None
        self._is_open = False
        self._open()

    @classmethod
    def connect(cls, address: str, *, arena_bytes: int = ARENA_BYTES, name: str = "") -> Self:
        """Use the queue at this address, of a server on this machine.

        `arena_bytes` bounds the rows that this connection has put and that are not acknowledged
        yet: a put waits for room. Raises `QueueLostError` when nobody is there.
        """
        return cls(address, arena_bytes=arena_bytes, name=name)

    @classmethod
    def start(
        cls,
        tasks: Mapping[str, Sequence[str]],
        *,
        trains: str = "",
        gate: Gate | None = None,
        log: Path | None = None,
        log_mode: LogMode = LogMode.SYNC,
        arena_bytes: int = ARENA_BYTES,
        world: World | None = None,
    ) -> Self:
        """Start a server in a process of its own, and connect to it; it ends when this connection is closed.

        `tasks` are the consumers, and the columns that each needs. With `log`, a folder, every
        transition and every row is on the disk before it is acted upon (`log_mode`), and a queue started on a
        folder that holds a log goes on where that one ended. In a queue with a `gate`, `trains`
        names the task whose acknowledgements are optimizer steps.
        """
        settings = ServerSettings(
            tasks={name: tuple(needs) for name, needs in tasks.items()},
            trains=trains,
            gate=gate,
            log="" if log is None else str(log),
            log_mode=log_mode if log is not None else LogMode.OFF,
        )
        process = start_server(settings, world or World())
        try:
            queue = cls(process.address, arena_bytes=arena_bytes)
        except BaseException:
            process.stop()
            raise
        queue._on_close = process.stop
        return queue

    # -- producers ---------------------------------------------------------------------------

    def put(
        self,
        columns: Mapping[str, ColumnLike],
        *,
        group_size: int = 1,
        shared: Sequence[str] = (),
        ticket: Ticket | None = None,
        wait: bool = True,
        timeout_s: float | None = None,
    ) -> Rows:
        """Put rows in; their handle. Returns when they are safe: in mode `sync` of the log, on the disk.

        Each column is one array for each row, one array `[S, ...]`, a `Ragged`, strings or None; see
        `asyncflow.data.layout`. With `group_size`, so many consecutive rows are one group, offered whole;
        columns named in `shared` have one row for each group. `ticket` is of `reserve`, in a queue with a gate.

        With `wait=False` it returns at once, with an empty handle: up to 16 puts are under way, `flush` waits for
        them, and an error is raised by the next call. Waits for room when the arena is full;
        raises `QueueFullError` when none came in `timeout_s`, or can never come, and `ColumnError`
        for columns that can't be stored.
        """
        drafts, num_bytes, num_rows = lay_out(columns, group_size=group_size, shared=shared)
        size = group_size if ticket is None else num_rows
        count = num_rows // size
        extent, specs = self._write(drafts, num_bytes, timeout_s)
        message = Put(self._next(), -1 if ticket is None else ticket, count, size, extent, specs)
        if not wait:
            self._under_way[message.request] = extent
            self._send(message)
            while len(self._under_way) >= WINDOW:
                self._receive(PATIENCE_S)
            self._raise_failure()
            return Rows.of_groups(np.empty(0, np.int64), 1, self._generation)
        first = self._ask_with(message, extent)
        return Rows.of_groups(np.arange(first, first + count), size, self._generation)

    def flush(self) -> None:
        """Wait until every put is safe. Raises what one of them failed for."""
        while self._under_way:
            self._receive(PATIENCE_S)
        self._raise_failure()

    def reserve(self, *, timeout_s: float | None = None) -> Ticket | None:
        """Admit a group, in a queue with a gate; None when it did not allow it within `timeout_s`."""
        reply = self._ask_parked(Reserve(self._next()), Done, timeout_s)
        return None if reply is None else Ticket(reply.value)

    def drop(self, tickets: Sequence[int] | NDArray[np.int64], reason: str) -> None:
        """Give tickets up for a stated reason."""
        self._ask(Drop(self._next(), ticket_bytes(np.asarray(tickets, np.int64)), reason), Done)

    def dispatch(self, ticket: int, prompt: str, num_tokens: int) -> None:
        """Note in the log which prompt a ticket is."""
        self._ask(Dispatch(self._next(), ticket, prompt, num_tokens), Done)

    def advance(self, step: int, *, lineage: str = "", fingerprint: str = "") -> None:
        """The weights after `step` optimizer steps are live now; opens the gate."""
        self._ask(Advance(self._next(), step, lineage, fingerprint), Done)

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on."""
        self._ask(BeginStep(self._next(), step), Done)

    def settled(self) -> None:
        """Wait until no rollout is under way or may begin under the live weights, and all rows are whole and safe."""
        self._ask_parked(Settled(self._next()), Done, None)

    def finish(self) -> None:
        """No more rows will come: consumers get what is left, then None."""
        self.flush()
        self._ask(Finish(self._next()), Done)

    def clear(self) -> None:
        """Drop everything in the queue. Handles and leases are void; memory comes back as leases end."""
        self._ask(Clear(self._next()), Done)

    # -- consumers ---------------------------------------------------------------------------

    def get(
        self, task: str, *, max_rows: int = 1, at_least: int = 1, group_size: int = 1, timeout_s: float | None = None
    ) -> Batch | None:
        """Rows for a task, leased until they are acknowledged: `at_least` to `max_rows`; None at the stream's end.

        Waits until so many have all columns that the task needs; what is left after `finish` may
        be fewer. In a queue of groups, rows come in whole groups of `group_size`. Raises `TimeoutError`
        after `timeout_s`. The columns are views where rows lie together, read-only, and valid until `acknowledge`.
        """
        message = Take(self._next(), task, -(-max_rows // group_size), -(-at_least // group_size))
        reply = self._ask_parked(message, Given, timeout_s)
        if reply is None:
            raise TimeoutError(f"no {at_least} rows for task {task} in {timeout_s:g} s")
        if not reply.tickets:
            return None
        rows = self._rows(reply)
        try:
            columns = read_columns(reply.sources, self._tasks[task], self._arena)
        except BaseException:
            self._ask(Release(self._next(), message.request), Done)
            raise
        return Batch(rows=rows, columns=columns, task=task, lease=message.request)

    def fetch(self, rows: Rows, names: Sequence[str]) -> dict[str, Ragged]:
        """Columns of rows by their handle, as copies, in the handle's order.

        Raises `StaleHandleError` when some are no longer there.
        """
        reply = self._ask(Fetch(self._next(), row_bytes(rows), rows.generation, tuple(names)), Given)
        return read_columns(reply.sources, names, self._arena, is_copied=True)

    def write(self, rows: Rows | Batch, columns: Mapping[str, ColumnLike], *, missing_ok: bool = False) -> int:
        """Add columns to rows, in the order of the handle or batch; how many rows got them.

        Raises `StaleHandleError` when some rows are no longer there, unless `missing_ok`, and
        `ColumnError` when a row has the column already.
        """
        handle = rows.rows if isinstance(rows, Batch) else rows
        drafts, num_bytes, _ = lay_out(columns)
        extent, specs = self._write(drafts, num_bytes, None)
        return self._ask_with(
            Write(self._next(), row_bytes(handle), handle.generation, extent, specs, missing_ok), extent
        )

    def acknowledge(
        self, batch: Batch, *, step: int = 0, batches: Sequence[Rows] = (), threads: Sequence[int] = ()
    ) -> None:
        """All of a batch is consumed. Its views must not be used any more: copy what you keep.

        The training task says which step it made, of which micro-batches. Raises
        `LeaseLostError` when the batch was given to somebody else meanwhile.
        """
        composition = tuple(map(row_bytes, batches or (batch.rows,))) if batch.task == self._trains else ()
        self._ask(Acknowledge(self._next(), batch.lease, step, composition, tuple(threads)), Done)

    def release(self, batch: Batch) -> None:
        """Give a batch back: it is offered again."""
        self._ask(Release(self._next(), batch.lease), Done)

    # -- looking in --------------------------------------------------------------------------

    @property
    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """The tasks of the queue and the columns that each needs."""
        return self._tasks

    @property
    def server_pid(self) -> int:
        """Process id of the server."""
        return self._server_pid

    def counts(self) -> LedgerCounts:
        """Where all tickets are; raises `QueueError` if one went missing."""
        reply = self._ask(Counts(self._next()), Accounts)
        return LedgerCounts(
            admitted=reply.admitted, trained=reply.trained, dropped=reply.dropped, pending=reply.pending
        )

    def close(self) -> None:
        """End the connection: what was not acknowledged is offered again. May be called twice."""
        if self._is_open:
            self._is_open = False
            with suppress(QueueError, OSError):
                self.flush()
            self._disconnect()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None

    def __enter__(self) -> Self:
        """The queue itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    # -- inside ------------------------------------------------------------------------------

    def _open(self) -> None:
        self._pid = os.getpid()
        self._is_open = True
        self._arenas: dict[int, Arena] = {}
        self._writer: Writer | None = None
        self._frames = Frames(reply_decoder)
        self._replies: dict[int, AnyReply] = {}
        self._under_way: dict[int, Extent] = {}
        self._abandoned: set[int] = set()
        self._failure: Failed | None = None
        self._num_requests = self._server_pid = 0
        self._fds: list[int] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(f"\0{self.address[1:]}" if self.address.startswith("@") else self.address)
        except OSError as error:
            self._socket.close()
            raise QueueLostError(f"no transfer queue answers at {self.address}: {error}. Has it ended?") from error
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        try:
            welcome = self._ask(Hello(self._next(), PROTOCOL, self._name), Welcome)
        except BaseException:
            self._socket.close()
            raise
        self._generation = welcome.generation
        self._tasks = welcome.tasks
        self._trains = welcome.trains
        self._server_pid = welcome.pid

    def _disconnect(self) -> None:
        self._socket.close()
        for arena in self._arenas.values():
            arena.close()
        if self._writer is not None:
            self._writer.arena.close()

    def _next(self) -> int:
        if self._pid != os.getpid():  # forked, as PyTorch's loaders do: this process needs a connection of its own
            self._open()
        self._num_requests += 1
        return self._num_requests

    def _write(
        self, drafts: Sequence[Draft], num_bytes: int, timeout_s: float | None
    ) -> tuple[Extent, tuple[ColumnSpec, ...]]:
        if self._pid != os.getpid():
            self._open()
        writer = self._writer or self._attach()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while (written := writer.write(drafts, num_bytes)) is None:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if self._ask_parked(Room(self._next()), Done, left) is None:
                raise QueueFullError(
                    f"no room for {num_bytes:,} bytes in {timeout_s:g} s: {writer.num_free:,} of "
                    f"{writer.arena.num_bytes:,} are free, the rest waits for the tasks {', '.join(self._tasks)}"
                )
        return written

    def _attach(self) -> Writer:
        """Make this connection's arena, the first time it puts something."""
        arena = Arena.create(self._arena_bytes, 0)
        request = self._next()
        try:
            socket.send_fds(self._socket, [frame(Attach(request))], [arena.fd])
        except OSError as error:
            arena.close()
            raise self._lost(error) from error
        arena.number = self._wait(request, Done).value
        self._arenas[arena.number] = arena
        self._writer = Writer(arena)
        return self._writer

    def _arena(self, number: int) -> Arena:
        return self._arenas[number]

    def _rows(self, reply: Given) -> Rows:
        tickets = np.frombuffer(reply.tickets, "<i8")
        indices = np.frombuffer(reply.indices, "<i4") if reply.indices else np.zeros(len(tickets), np.int32)
        return Rows(tickets, indices, self._generation)

    def _send(self, message: AnyRequest) -> None:
        try:
            self._socket.sendall(frame(message))
        except OSError as error:
            raise self._lost(error) from error

    def _ask(self, message: AnyRequest, kind: type[ReplyT]) -> ReplyT:
        self._send(message)
        return self._wait(message.request, kind)

    def _ask_with(self, message: Put | Write, extent: Extent) -> int:
        """Send what refers to a block of ours, which is free again when the server refuses it."""
        try:
            return self._ask(message, Done).value
        except QueueLostError:
            raise
        except AsyncFlowError:
            if self._writer is not None:
                self._writer.free(extent)
            raise

    def _ask_parked(self, message: AnyRequest, kind: type[ReplyT], timeout_s: float | None) -> ReplyT | None:
        """The answer to a request that may wait; None when it took longer than `timeout_s`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._send(message)
        try:
            while message.request not in self._replies:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    if self._ask(Cancel(self._next(), message.request), Done).value:
                        return None
                    break  # it was granted: the answer is there, or comes once it is on the disk
                self._receive_or_ping(left)
        except KeyboardInterrupt:
            self._abandoned.add(message.request)
            self._send(Cancel(self._next(), message.request))
            raise
        return self._wait(message.request, kind)

    def _wait(self, request: int, kind: type[ReplyT]) -> ReplyT:
        while request not in self._replies:
            self._receive(PATIENCE_S)
        reply = self._replies.pop(request)
        if isinstance(reply, Failed):
            raise _error(reply)
        if not isinstance(reply, kind):
            raise QueueLostError(f"the server answered {type(reply).__name__} where {kind.__name__} was expected")
        return reply

    def _receive_or_ping(self, limit_s: float | None) -> None:
        """Take in what comes; when nothing came for long, ask whether the server is still there."""
        if limit_s is not None and limit_s < PATIENCE_S:
            if self._poll.poll(limit_s * 1000):
                self._receive(None)
        elif self._poll.poll(PATIENCE_S * 1000):
            self._receive(None)
        else:
            self._ask(Ping(self._next()), Done)

    def _receive(self, patience_s: float | None) -> None:
        """Take in what comes. Raises `QueueLostError` when nothing did for so long, or nothing can."""
        if patience_s is not None and not self._poll.poll(patience_s * 1000):
            raise QueueLostError(
                f"the transfer queue's server (process {self._server_pid}) has not answered "
                f"for {patience_s:g} s: is it stopped, or its disk?"
            )
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, RECEIVE_BYTES, 4)
        except OSError as error:
            raise self._lost(error) from error
        self._fds += fds
        if not data:
            raise self._lost(None)
        for reply in self._frames.feed(data):
            self._accept(reply)

    def _accept(self, reply: AnyReply) -> None:
        request = reply.request
        if isinstance(reply, ArenaIs):
            self._arenas[reply.number] = Arena.attach(self._fds.pop(0), reply.number)
            return
        if isinstance(reply, Done) and reply.freed and self._writer is not None:
            for offset, num_bytes in reply.freed:
                self._writer.free(Extent(self._writer.arena.number, offset, num_bytes, 0))
        extent = self._under_way.pop(request, None)
        if extent is not None:
            if isinstance(reply, Failed) and self._writer is not None:
                self._writer.free(extent)
                self._failure = self._failure or reply
        elif request in self._abandoned:
            self._abandoned.discard(request)
            if isinstance(reply, Given) and reply.tickets:
                self._send(Release(self._next(), request))
        else:
            self._replies[request] = reply

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise _error(failure)

    def _lost(self, error: OSError | None) -> QueueLostError:
        reason = f": {error}" if error else ""
        return QueueLostError(f"the transfer queue at {self.address} has ended{reason}. What was put and not taken is "
                              "in its log, where it has one")  # fmt: skip


def _error(failure: Failed) -> Exception:
    """The error that the server names, of the same kind."""
    kind = getattr(errors, failure.kind, QueueError)
    return kind(failure.reason) if issubclass(kind, AsyncFlowError) else QueueError(failure.reason)
