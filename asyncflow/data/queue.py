"""The transfer queue for any process: rows in, batches out, each exactly once.

::

    with TransferQueue.start({"train": ("prompt", "response", "reward")}) as queue:
        queue.put({"prompt": [...], "response": [...], "reward": rewards})   # one row each
        batch = queue.get("train", max_rows=32)                              # leased, as views
        ...
        queue.acknowledge(batch)                                             # now it is consumed

Other processes connect with `TransferQueue.connect(queue.address)`. A put writes rows once, into
shared memory, and a get gives views of them; each is one message and one answer. A task is offered a row the
moment all columns that it needs exist; its workers get disjoint rows, and a row is gone when every task has
acknowledged it. What a consumer has not acknowledged when it ends is given to another.

Calls block. A connection is for one thread; each thread and process makes its own. numpy only:
torch tensors may be put, and `StreamingLoader` feeds them to a training loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import AsyncFlowError, QueueError, QueueLostError
from asyncflow.core.types import Ragged, Rows, Ticket
from asyncflow.core.world import World
from asyncflow.data import messages
from asyncflow.data.batch import Asked, Batch
from asyncflow.data.client_memory import ClientMemory
from asyncflow.data.connection import Connection
from asyncflow.data.directory import Extent
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnLike, lay_out
from asyncflow.data.ledger import LedgerCounts
from asyncflow.data.log import LogMode
from asyncflow.data.plane import read_columns
from asyncflow.data.records import read_tickets, row_bytes, ticket_bytes
from asyncflow.data.server_process import ServerSettings, start_server

ARENA_BYTES = 1 << 28
"""Memory for the rows of one process that puts, if nobody says otherwise; taken from the system as it is used."""
WINDOW = 16
"""Puts of `put_soon` on their way at most."""


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
            log=str(log or ""),
            log_mode=log_mode if log else LogMode.OFF,
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
        timeout_s: float | None = None,
    ) -> Rows:
        """Put rows in; their handle. Returns when they are safe: in mode `sync` of the log, on the disk.

        Each column is one array for each row, one array `[S, ...]`, a `Ragged`, strings or None; see
        `asyncflow.data.layout`. With `group_size`, so many consecutive rows are one group, offered whole;
        columns named in `shared` have one row for each group. `ticket` is of `reserve`, in a queue with a gate.

        Waits for room when the arena is full; raises `QueueFullError` when none came in
        `timeout_s`, or can never come, and `ColumnError` for columns that can't be stored.
        """
        message = self._fill_put(columns, group_size, shared, ticket, timeout_s)
        first = self._ask_with(message, message.extent)
        return Rows.of_groups(np.arange(first, first + message.count), message.group_size, self._generation)

    def put_soon(
        self,
        columns: Mapping[str, ColumnLike],
        *,
        group_size: int = 1,
        shared: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> None:
        """The same without waiting for the answer, so that the next rows are made while these are written to the disk.

        Up to 16 puts are under way; `flush` waits for them. What one failed for is raised by a later call.
        """
        message = self._fill_put(columns, group_size, shared, None, timeout_s)
        self._link.begin(message, partial(self._memory.free, message.extent), window=WINDOW)

    def _fill_put(
        self,
        columns: Mapping[str, ColumnLike],
        group_size: int,
        shared: Sequence[str],
        ticket: Ticket | None,
        timeout_s: float | None,
    ) -> messages.Put:
        drafts, num_bytes, num_rows = lay_out(columns, group_size=group_size, shared=shared)
        size = group_size if ticket is None else num_rows
        extent, specs = self._memory.write(self._connection(), drafts, num_bytes, timeout_s)
        return messages.Put(self._link.next(), -1 if ticket is None else ticket, num_rows // size, size, extent, specs)

    def flush(self) -> None:
        """Wait until every put is safe. Raises what one of them failed for."""
        self._connection().flush()

    def reserve(self, *, timeout_s: float | None = None) -> Ticket | None:
        """Admit a group, in a queue with a gate; None when it did not allow it within `timeout_s`."""
        link = self._connection()
        reply = link.ask_parked(messages.Reserve(link.next()), messages.Done, timeout_s)
        return None if reply is None else Ticket(reply.value)

    def drop(self, tickets: Sequence[int] | NDArray[np.int64], reason: str) -> None:
        """Give tickets up for a stated reason."""
        self._do(messages.Drop, ticket_bytes(np.asarray(tickets, np.int64)), reason)

    def dispatch(self, ticket: int, prompt: str, num_tokens: int) -> None:
        """Note in the log which prompt a ticket is."""
        self._do(messages.Dispatch, ticket, prompt, num_tokens)

    def advance(self, step: int, *, lineage: str = "", fingerprint: str = "") -> None:
        """The weights after `step` optimizer steps are live now; opens the gate."""
        self._do(messages.Advance, step, lineage, fingerprint)

    def begin_step(self, step: int) -> None:
        """The training task works at version `step` from now on."""
        self._do(messages.BeginStep, step)

    def settled(self) -> None:
        """Wait until no rollout is under way or may begin under the live weights, and all rows are whole and safe."""
        link = self._connection()
        link.ask_parked(messages.Settled(link.next()), messages.Done, None)

    def finish(self) -> None:
        """No more rows will come: consumers get what is left, then None."""
        self.flush()
        self._do(messages.Finish)

    def clear(self) -> None:
        """Drop everything in the queue. Handles and leases are void; memory comes back as leases end."""
        self._do(messages.Clear)

    # -- consumers ---------------------------------------------------------------------------

    def get(
        self,
        task: str,
        *,
        max_rows: int = 1,
        at_least: int = 1,
        group_size: int = 1,
        timeout_s: float | None = None,
        lease_s: float | None = None,
        copy: bool = False,
        done: Batch | None = None,
    ) -> Batch | None:
        """Rows for a task, leased until they are acknowledged: `at_least` to `max_rows`; None at the stream's end.

        Waits until so many have all columns that the task needs; what is left after `finish` may
        be fewer. In a queue of groups, rows come in whole groups of `group_size`. Raises `TimeoutError`
        after `timeout_s`. With `lease_s`, rows that are not acknowledged so many seconds later are offered to others;
        without, when this connection ends. The columns are views where rows lie together, read-only, and
        valid until `acknowledge`; with `copy` they are copies, to be kept and written to. A batch that is `done` is
        acknowledged in the same message.
        """
        asked = self.ask(task, max_rows=max_rows, at_least=at_least, group_size=group_size, lease_s=lease_s, done=done)
        return self.answer(asked, timeout_s=timeout_s, copy=copy)

    def ask(
        self,
        task: str,
        *,
        max_rows: int = 1,
        at_least: int = 1,
        group_size: int = 1,
        lease_s: float | None = None,
        done: Batch | None = None,
    ) -> Asked:
        """The first half of `get`, which does not wait: `answer` does. What is never answered must be withdrawn."""
        link = self._connection()
        max_groups, groups = -(-max_rows // group_size), -(-at_least // group_size)
        message = messages.Take(link.next(), task, max_groups, groups, lease_s or 0.0)
        link.post(message, after=None if done is None else self._end_of(done))
        return Asked(task, message.request)

    def answer(self, asked: Asked, *, timeout_s: float | None = None, copy: bool = False) -> Batch | None:
        """The second half of `get`."""
        reply = self._connection().wait_parked(asked.request, messages.Given, timeout_s)
        if reply is None:
            raise TimeoutError(f"not enough rows for task {asked.task} in {timeout_s:g} s")
        if not reply.count:
            return None
        try:
            columns = read_columns(reply.sources, self.tasks[asked.task], self._memory.arena, is_copied=copy)
        except BaseException:
            self._do(messages.Release, asked.request)
            raise
        return Batch(rows=self._rows(reply), columns=columns, task=asked.task, lease=asked.request)

    def withdraw(self, asked: Asked) -> None:
        """Take an `ask` back; rows that it was given meanwhile are offered again."""
        self._connection().withdraw(asked.request)

    def fetch(self, rows: Rows, names: Sequence[str]) -> dict[str, Ragged]:
        """Columns of rows by their handle, as copies, in the handle's order.

        Raises `StaleHandleError` when some are no longer there.
        """
        link = self._connection()
        reply = link.ask(messages.Fetch(link.next(), row_bytes(rows), rows.generation, tuple(names)), messages.Given)
        return read_columns(reply.sources, names, self._memory.arena, is_copied=True)

    def write(self, rows: Rows | Batch, columns: Mapping[str, ColumnLike], *, missing_ok: bool = False) -> int:
        """Add columns to rows, in the order of the handle or batch; how many rows got them.

        Raises `StaleHandleError` when some rows are no longer there, unless `missing_ok`, and
        `ColumnError` when a row has the column already.
        """
        handle = rows.rows if isinstance(rows, Batch) else rows
        drafts, num_bytes, _ = lay_out(columns)
        extent, specs = self._memory.write(self._connection(), drafts, num_bytes, None)
        return self._ask_with(
            messages.Write(self._link.next(), row_bytes(handle), handle.generation, extent, specs, missing_ok), extent
        )

    def acknowledge(
        self, batch: Batch, *, step: int = 0, batches: Sequence[Rows] = (), threads: Sequence[int] = ()
    ) -> None:
        """All of a batch is consumed. Its views must not be used any more: copy what you keep.

        The training task says which step it made, of which micro-batches. Raises
        `LeaseLostError` when the batch was given to somebody else meanwhile.
        """
        self._link.ask(self._end_of(batch, step, batches, threads), messages.Done)

    def _end_of(
        self, batch: Batch, step: int = 0, batches: Sequence[Rows] = (), threads: Sequence[int] = ()
    ) -> messages.Acknowledge:
        link = self._connection()
        composition = tuple(map(row_bytes, batches or (batch.rows,))) if batch.task == link.welcome.trains else ()
        return messages.Acknowledge(link.next(), batch.lease, step, composition, tuple(threads))

    def release(self, batch: Batch) -> None:
        """Give a batch back: it is offered again."""
        self._do(messages.Release, batch.lease)

    # -- looking in --------------------------------------------------------------------------

    @property
    def tasks(self) -> Mapping[str, tuple[str, ...]]:
        """The tasks of the queue and the columns that each needs."""
        return self._link.welcome.tasks

    @property
    def server_pid(self) -> int:
        """The server's process."""
        return self._link.welcome.pid

    def counts(self) -> LedgerCounts:
        """Where all tickets are; raises `QueueError` if one went missing."""
        link = self._connection()
        reply = link.ask(messages.Counts(link.next()), messages.Accounts)
        return LedgerCounts(
            admitted=reply.admitted, trained=reply.trained, dropped=reply.dropped, pending=reply.pending
        )

    def close(self) -> None:
        """End the connection: what was not acknowledged is offered again. May be called twice."""
        if self._is_open:
            self._is_open = False
            with suppress(QueueError, OSError):
                self.flush()
            self._link.close()
            self._memory.close()
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()

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
        self._memory = ClientMemory(self._arena_bytes)
        self._link = Connection(self.address, self._name, on_freed=self._memory.free_at, on_arena=self._memory.hear_of)
        self._is_open = True
        self._generation = self._link.welcome.generation

    def _connection(self) -> Connection:
        if self._pid != os.getpid():  # forked, as PyTorch's loaders do: this process needs a connection of its own
            self._open()
        return self._link

    def _do(self, kind: Callable[..., messages.AnyRequest], *fields: object) -> None:
        """Ask for something that has no other answer than that it is done."""
        self._connection().ask(kind(self._link.next(), *fields), messages.Done)

    def _ask_with(self, message: messages.Put | messages.Write, extent: Extent) -> int:
        """Send what refers to a block of ours, which is free again when the server refuses it."""
        try:
            return self._link.ask(message, messages.Done).value
        except QueueLostError:
            raise
        except AsyncFlowError:
            self._memory.free(extent)
            raise

    def _rows(self, reply: messages.Given) -> Rows:
        given = reply.tickets
        tickets = read_tickets(given) if given else np.arange(reply.first, reply.first + reply.count)
        if reply.indices:
            return Rows(tickets, np.frombuffer(reply.indices, "<i4"), self._generation)
        return Rows.of_groups(tickets, reply.group_size, self._generation)
