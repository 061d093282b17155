"""The log read back: what became of every ticket, and where the rows of each still lie on the disk.

A fold over the records, through the same `Ledger` that made them: a log that breaks one of its
rules is damaged, and says so here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ConfigError, InvariantError, LogDamagedError, QueueError
from asyncflow.core.types import MicroBatch, Ragged, Rows, Ticket
from asyncflow.data import records
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnSpec, join, read, select
from asyncflow.data.ledger import Ledger, LedgerSnapshot, Offer, QueueTask
from asyncflow.data.log import Place, read_log, read_payload
from asyncflow.data.records import AnyRecord, read_rows, read_tickets
from asyncflow.data.tickets import TicketArray as Tickets

Places: TypeAlias = NDArray[np.intp]


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
    """What a log says. `blocks` and `writes` are by ticket; `steps` by the version that a step made.

    `served` are all fingerprints under which a version was live, the last one last; `epochs` says in
    which epoch a step was taken.
    """

    ledger: Ledger
    blocks: dict[int, StoredBlock] = field(default_factory=dict)
    writes: dict[int, list[StoredWrite]] = field(default_factory=dict)
    steps: dict[int, records.Trained] = field(default_factory=dict)
    opened: list[records.Opened] = field(default_factory=list)
    prompts: dict[int, records.Dispatched] = field(default_factory=dict)
    live: dict[int, records.Live] = field(default_factory=dict)
    served: dict[int, list[str]] = field(default_factory=dict)
    epochs: dict[int, int] = field(default_factory=dict)
    admitted_live: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)
    reissued: dict[int, list[str]] = field(default_factory=dict)
    num_records: int = 0

    @property
    def last_step(self) -> int:
        """The version that the last logged step made, or that the log begins with."""
        return max(self.steps, default=self.opened[0].restored_step if self.opened else 0)

    def micro_batches(self, step: int, columns: Sequence[str]) -> Iterator[MicroBatch]:
        """The micro-batches of the step that made this version, as they were trained on.

        Raises `RunFolderError` when the log does not hold their rows any more.
        """
        payloads = Payloads()
        for batch in self.steps[step].batches:
            rows = read_rows(batch)
            yield MicroBatch(rows=rows, columns={name: self.column(rows, name, payloads) for name in columns})

    def column(self, rows: Rows, name: str, payloads: Payloads | None = None) -> Ragged:
        """A column of rows, read from the disk, in their order; `payloads` keeps what is read for the next call."""
        payloads = payloads or Payloads()
        found: list[tuple[Ragged, Places]] = []
        late: dict[int, Places] = {}
        for block, at in self._blocks_of(rows).items():
            spec = next((spec for spec in block.columns if spec.name == name), None)
            if spec is None:
                late.update(_by_ticket(rows, at))
                continue
            places = (rows.tickets[at] - block.first) * block.group_size + rows.indices[at]
            column = read(spec, payloads[block.place])
            found.append((select(column, places // block.group_size if spec.is_shared else places), at))
        found += self._late(rows, late, name, payloads)
        order = np.concatenate([np.empty(0, np.intp), *(at for _, at in found)])
        missing = np.setdiff1d(np.arange(len(rows)), order)
        if len(missing):
            odd = rows[missing[:1]]
            raise LogDamagedError(f"row {odd.indices[0]} of ticket {odd.tickets[0]} has no column {name} in the log")
        return select(join([part for part, _ in found]), np.argsort(order, kind="stable"))

    def column_names(self, ticket: int) -> tuple[str, ...]:
        """The columns that the log holds for the rows of a ticket."""
        stored = [*self.blocks[ticket].columns] if ticket in self.blocks else []
        late = (column for write in self.writes.get(ticket, []) for column in write.columns)
        return tuple(dict.fromkeys(spec.name for spec in (*stored, *late)))

    def _blocks_of(self, rows: Rows) -> dict[StoredBlock, Places]:
        """The blocks in which rows were put, each with the places of these rows."""
        parts: dict[StoredBlock, list[Places]] = {}
        for ticket, at in _by_ticket(rows, np.arange(len(rows))).items():
            block = self.blocks.get(ticket)
            if block is None:
                raise LogDamagedError(f"ticket {ticket} has no rows in the log")
            parts.setdefault(block, []).append(at)
        return {block: np.concatenate(places) for block, places in parts.items()}

    def _late(
        self, rows: Rows, late: Mapping[int, Places], name: str, payloads: Payloads
    ) -> Iterator[tuple[Ragged, Places]]:
        """Rows whose column was written after they were put, by write: the values, and which rows they are of."""
        parts: dict[StoredWrite, list[Places]] = {}
        for ticket, at in late.items():
            for write in self.writes.get(ticket, []):
                if any(spec.name == name for spec in write.columns):
                    parts.setdefault(write, []).append(at)
        for write, several in parts.items():
            at = np.concatenate(several)
            wanted, written = _keys(rows[at]), _keys(write.rows)
            order = np.argsort(written, kind="stable")
            nearest = order[np.minimum(np.searchsorted(written, wanted, sorter=order), len(order) - 1)]
            is_here = written[nearest] == wanted
            spec = next(spec for spec in write.columns if spec.name == name)
            yield select(read(spec, payloads[write.place]), write.order[nearest[is_here]]), at[is_here]


class Payloads:
    """Payloads read from the log; those used last stay in memory, `max_bytes` of them at most."""

    def __init__(self, max_bytes: int = 256 << 20) -> None:
        self._max_bytes = max_bytes
        self._held: dict[Place, NDArray[np.uint8]] = {}

    def __getitem__(self, place: Place) -> NDArray[np.uint8]:
        """The payload that lies there. Raises `RunFolderError` when it was compacted away."""
        payload = self._held.pop(place, None)
        if payload is None:
            payload = read_payload(place)
        self._held[place] = payload
        while len(self._held) > 1 and sum(map(len, self._held.values())) > self._max_bytes:
            self._held.pop(next(iter(self._held)))
        return payload


def _by_ticket(rows: Rows, at: Places) -> dict[int, Places]:
    """The places of some rows, by ticket; of each ticket in their order."""
    order = at[np.argsort(rows.tickets[at], kind="stable")]
    tickets, starts = np.unique(rows.tickets[order], return_index=True)
    return dict(zip(tickets.tolist(), np.split(order, starts[1:]), strict=True))


def _keys(rows: Rows) -> NDArray[np.int64]:
    """One number for each row."""
    keys: NDArray[np.int64] = (rows.tickets << 24) + rows.indices
    return keys


def read_history(folder: Path, tasks: Sequence[QueueTask], gate: Gate | None) -> History:
    """Read a log. Raises `LogDamagedError` when it can't be read, or its records contradict each other.

    Raises `ConfigError` when it holds optimizer steps, and none of the tasks trains.
    """
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
        case records.Admitted(first=first, count=count, live_step=live):
            ledger.restore_admission(first, count)
            history.admitted_live.update(dict.fromkeys(range(first, first + count), live))
        case records.Reissued(tickets=tickets, reason=reason):
            _reissue(history, read_tickets(tickets), reason)
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
            _train(history, read_tickets(data))
            history.steps[step] = record
            history.epochs[step] = len(history.opened)
        case records.Dropped(tickets=data, reason=reason):
            dropped = read_tickets(data)
            ledger.drop(dropped, reason, also_trained=True)
            history.dropped.update(dict.fromkeys(dropped.tolist(), reason))
        case _:
            _note(history, record)


def _note(history: History, record: AnyRecord) -> None:
    """Records that move no ticket."""
    match record:
        case records.Opened(carried=carried):
            if carried is not None and not history.opened:
                history.ledger = _carried(history.ledger, carried)
            history.opened.append(record)
            history.ledger.live_step = None
        case records.Dispatched(ticket=ticket):
            history.prompts[ticket] = record
        case records.Live(step=step, fingerprint=fingerprint):
            history.live[step] = record
            history.served.setdefault(step, []).append(fingerprint)


def _carried(ledger: Ledger, carried: records.Carried) -> Ledger:
    """The ledger of a log that begins where a checkpoint left off."""
    snapshot = LedgerSnapshot(
        admitted=carried.admitted,
        trained=carried.trained,
        dropped=carried.dropped,
        pending=tuple(map(Ticket, read_tickets(carried.pending).tolist())),
        dropped_since=tuple(map(Ticket, read_tickets(carried.dropped_since).tolist())),
    )
    return Ledger(list(ledger.tasks.values()), ledger.gate, snapshot)


def _train(history: History, tickets: Tickets) -> None:
    """End tickets. Tasks that the queue did not have when they were trained do not need them."""
    ledger = history.ledger
    task = next((name for name, task in ledger.tasks.items() if task.trains), None)
    if task is None:
        raise ConfigError(
            f"the log holds optimizer steps, and none of the tasks {', '.join(ledger.tasks)} trains: name the task "
            f"that does, which was {history.opened[-1].trains if history.opened else ''!r}"
        )
    _finish(ledger, task, tickets)
    known = history.opened[-1].tasks if history.opened else ledger.tasks
    for name in ledger.tasks.keys() - known.keys() - {task}:
        held = tickets[ledger.is_in_use(tickets)]
        _finish(ledger, name, held[ledger.offered(name, held) != Offer.DONE])


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
    """The blocks of which some task still needs a ticket, in the order in which they were put."""
    found = dict.fromkeys(history.blocks[ticket] for ticket in _held(history))
    return sorted(found, key=lambda block: (block.place.segment, block.place.record))


def holds(history: History, block: StoredBlock) -> NDArray[np.bool_]:
    """Of which of its tickets a block has the rows that some task still needs; not of those put again since."""
    tickets = np.arange(block.first, block.first + block.count)
    is_own = [history.blocks.get(ticket) is block for ticket in tickets.tolist()]
    return history.ledger.is_in_use(tickets) & np.array(is_own, np.bool_)


def pending_writes(history: History) -> list[tuple[StoredWrite, NDArray[np.bool_]]]:
    """The writes of which some task still needs a row, and which rows: none of a ticket issued again since."""
    tickets: dict[StoredWrite, list[int]] = {}
    for ticket in _held(history):
        for write in history.writes.get(ticket, []):
            tickets.setdefault(write, []).append(ticket)
    return [(write, np.isin(write.rows.tickets, held)) for write, held in tickets.items()]


def _held(history: History) -> list[int]:
    """The tickets whose rows some task still needs."""
    tickets = np.arange(history.ledger.oldest, history.ledger.num_admitted)
    held: list[int] = tickets[history.ledger.is_in_use(tickets)].tolist()
    return held
