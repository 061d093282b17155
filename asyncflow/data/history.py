"""The log read back: what became of every ticket, and where the rows of each still lie on the disk.

A fold over the records, through the same `Ledger` that made them: a log that breaks one of its
rules is damaged, and says so here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from asyncflow.core.errors import InvariantError, LogDamagedError, QueueError
from asyncflow.core.types import MicroBatch, Ragged, Rows
from asyncflow.data import records
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnSpec, join, read, select
from asyncflow.data.ledger import Ledger, QueueTask, State, Tickets
from asyncflow.data.log import Place, read_log, read_payload
from asyncflow.data.records import AnyRecord, read_rows, read_tickets


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredBlock:
    """The block of a put, in the log: groups of `count` tickets from `first` on."""

    place: Place
    columns: tuple[ColumnSpec, ...]
    first: int
    count: int
    group_size: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredWrite:
    """The block of a write, in the log: `order` says where in it each row stands."""

    place: Place
    columns: tuple[ColumnSpec, ...]
    rows: Rows
    order: np.ndarray[tuple[int], np.dtype[np.int32]]


@dataclass(slots=True, kw_only=True)
class History:
    """What a log says. `blocks` and `writes` are by ticket; `steps` by the version that a step made."""

    ledger: Ledger
    blocks: dict[int, StoredBlock] = field(default_factory=dict)
    writes: dict[int, list[StoredWrite]] = field(default_factory=dict)
    steps: dict[int, records.Trained] = field(default_factory=dict)
    opened: list[records.Opened] = field(default_factory=list)
    prompts: dict[int, records.Dispatched] = field(default_factory=dict)
    live: dict[int, records.Live] = field(default_factory=dict)
    admitted_live: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    reissued: dict[int, list[str]] = field(default_factory=dict)
    num_records: int = 0

    @property
    def last_step(self) -> int:
        """The version that the last logged step made; 0 where there is none."""
        return max(self.steps, default=0)

    def micro_batches(self, step: int, columns: Sequence[str]) -> Iterator[MicroBatch]:
        """The micro-batches of the step that made this version, as they were trained on.

        Raises `LogDamagedError` when the log does not hold their rows any more.
        """
        for batch in self.steps[step].batches:
            rows = read_rows(batch)
            yield MicroBatch(rows=rows, columns={name: self.column(rows, name) for name in columns})

    def column(self, rows: Rows, name: str) -> Ragged:
        """A column of rows, read from the disk, in their order."""
        parts: list[Ragged] = []
        start = 0
        changes = np.flatnonzero(rows.tickets[1:] != rows.tickets[:-1]) + 1
        for stop in [*changes.tolist(), len(rows)]:
            parts.append(self._column_of(int(rows.tickets[start]), rows.indices[start:stop], name))
            start = stop
        return join(parts)

    def column_names(self, ticket: int) -> tuple[str, ...]:
        """The columns that the log holds for the rows of a ticket."""
        stored = [*self.blocks[ticket].columns] if ticket in self.blocks else []
        return tuple(spec.name for spec in (*stored, *(c for w in self.writes.get(ticket, []) for c in w.columns)))

    def _column_of(self, ticket: int, indices: np.ndarray[tuple[int], np.dtype[np.int32]], name: str) -> Ragged:
        block = self.blocks.get(ticket)
        if block is None:
            raise LogDamagedError(f"ticket {ticket} has no rows in the log")
        spec = next((spec for spec in block.columns if spec.name == name), None)
        if spec is not None:
            places = (ticket - block.first) * block.group_size + indices
            column = read(spec, read_payload(block.place))
            return select(column, places // block.group_size if spec.is_shared else places)
        found: dict[int, Ragged] = {}
        for write in self.writes.get(ticket, []):
            spec = next((spec for spec in write.columns if spec.name == name), None)
            if spec is None:
                continue
            column = read(spec, read_payload(write.place))
            for place in np.flatnonzero(write.rows.tickets == ticket):
                found[int(write.rows.indices[place])] = select(column, write.order[place : place + 1])
        try:
            return join([found[int(index)] for index in indices])
        except KeyError as error:
            raise LogDamagedError(f"row {error} of ticket {ticket} has no column {name} in the log") from error


def read_history(folder: Path, tasks: Sequence[QueueTask], gate: Gate | None) -> History:
    """Read a log. Raises `LogDamagedError` when it can't be read, or its records contradict each other."""
    history = History(ledger=Ledger(tasks, gate))
    for logged in read_log(folder):
        try:
            record = records.decode(logged.meta)
            _apply(history, record, logged.place)
        except (msgspec.MsgspecError, InvariantError, QueueError, ValueError, KeyError, IndexError) as error:
            raise LogDamagedError(f"record {logged.lsn} of the log in {folder} can't be right: {error}") from error
        history.num_records += 1
    return history


def _apply(history: History, record: AnyRecord, place: Place) -> None:
    ledger = history.ledger
    match record:
        case records.Opened():
            history.opened.append(record)
            ledger.live_step = None
        case records.Admitted(first=first, count=count, live_step=live):
            ledger.restore_admission(first, count)
            history.admitted_live.update(dict.fromkeys(range(first, first + count), live))
        case records.Reissued(tickets=tickets, reason=reason):
            _reissue(history, read_tickets(tickets), reason)
        case records.Dispatched(ticket=ticket):
            history.prompts[ticket] = record
        case records.Produced(first=first, count=count, group_size=size, columns=columns):
            ledger.produce(first, count, size, [spec.name for spec in columns])
            block = StoredBlock(place=place, columns=columns, first=first, count=count, group_size=size)
            history.blocks.update(dict.fromkeys(range(first, first + count), block))
        case records.Written(rows=data, places=places, columns=columns):
            _write(history, read_rows(data), places, columns, place)
        case records.Done(task=task, tickets=data):
            if task in ledger.tasks:
                _finish(ledger, task, read_tickets(data))
        case records.Trained(step=step, tickets=data):
            task = next(name for name, task in ledger.tasks.items() if task.trains)
            _finish(ledger, task, read_tickets(data))
            history.steps[step] = record
        case records.Dropped(tickets=data, reason=reason):
            dropped = read_tickets(data)
            ledger.drop(dropped, reason, also_trained=True)
            history.dropped.update(dict.fromkeys(dropped.tolist(), reason))
        case records.Live(step=step):
            history.live[step] = record
        case records.Taken() | records.Released() | records.Checkpointed():
            pass


def _finish(ledger: Ledger, task: str, tickets: Tickets) -> None:
    ledger.lease(task, tickets)
    ledger.acknowledge(task, tickets)


def _reissue(history: History, tickets: Tickets, reason: str) -> None:
    history.ledger.readmit(tickets)
    for ticket in tickets.tolist():
        history.reissued.setdefault(ticket, []).append(reason)
        history.blocks.pop(ticket, None)
        history.writes.pop(ticket, None)


def _write(history: History, rows: Rows, places: bytes, columns: tuple[ColumnSpec, ...], place: Place) -> None:
    tickets, counts = np.unique(rows.tickets, return_counts=True)
    for spec in columns:
        history.ledger.write(tickets, counts, spec.name)
    order = np.frombuffer(places, "<i4") if places else np.arange(len(rows), dtype=np.int32)
    stored = StoredWrite(place=place, columns=columns, rows=rows, order=order)
    for ticket in tickets.tolist():
        history.writes.setdefault(ticket, []).append(stored)


def tasks_of(folder: Path) -> tuple[list[QueueTask], Mapping[str, int]]:
    """The tasks that the log in a folder was last opened with, and the gate's numbers."""
    opened: records.Opened | None = None
    for logged in read_log(folder):
        record = records.decode(logged.meta)
        opened = record if isinstance(record, records.Opened) else opened
    if opened is None:
        raise LogDamagedError(f"{folder} holds no log of a transfer queue")
    tasks = [QueueTask(name=name, needs=needs, trains=name == opened.trains) for name, needs in opened.tasks.items()]
    return tasks, {
        "groups_per_step": opened.groups_per_step,
        "max_staleness": opened.max_staleness,
        "look_ahead": opened.look_ahead,
        "steps": opened.steps,
    }


def pending_blocks(history: History) -> list[StoredBlock]:
    """The blocks in which some ticket is produced and not ended, in the order in which they were put."""
    pending = history.ledger.pending()
    held = pending[history.ledger.state_of(pending) == State.PRODUCED]
    return list(dict.fromkeys(history.blocks[ticket] for ticket in held.tolist()))
