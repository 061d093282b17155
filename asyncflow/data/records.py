"""The records of the durable log: every transition of a ticket, in the order in which they happened.

A record's *meta* is one of these structs in MessagePack; a record may carry a *payload*, the
bytes of a block of columns (`asyncflow.data.layout`), whose columns the meta describes. The
log (`asyncflow.data.log`) neither knows nor cares what either means.

Arrays travel as little-endian bytes: `tickets` int64, `indices` int32, of equal number.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.types import Rows
from asyncflow.data.layout import ColumnSpec
from asyncflow.data.tickets import Tickets, as_array


class Record(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What happened."""


class Carried(msgspec.Struct, frozen=True, array_like=True):
    """What a checkpoint's ledger says of the tickets before a log that begins in the middle of a run."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    pending: bytes
    dropped_since: bytes


class Opened(Record, frozen=True, kw_only=True):
    """A process took the log over. `epoch` counts the processes that did; what an older one writes is void.

    The gate's numbers are 0 where there is none. `restored_step` is the version of the
    checkpoint that the trainer went back to; trained steps after it stay trained, and are
    replayed from here. `carried` is what came before the first record, where that is not the
    beginning of the run.
    """

    epoch: int
    tasks: dict[str, tuple[str, ...]]
    trains: str
    groups_per_step: int = 0
    max_staleness: int = 0
    look_ahead: int = 0
    steps: int = 0
    restored_step: int = 0
    wall_clock: str = ""
    carried: Carried | None = None


class Admitted(Record, frozen=True, kw_only=True):
    """`count` tickets from `first` on were issued, while the weights of `live_step` were live (-1: no gate)."""

    first: int
    count: int
    live_step: int


class Reissued(Record, frozen=True, kw_only=True):
    """Tickets whose rollout was lost, or can no longer be used, wait to be rolled out again."""

    tickets: bytes
    reason: str


class Dispatched(Record, frozen=True, kw_only=True):
    """Which prompt a ticket is, and how many tokens it has."""

    ticket: int
    prompt: str
    num_tokens: int


class Produced(Record, frozen=True, kw_only=True):
    """`count` groups from ticket `first` on exist, of `group_size` rows each. The payload is their block."""

    first: int
    count: int
    group_size: int
    columns: tuple[ColumnSpec, ...]


class RowBytes(msgspec.Struct, frozen=True, array_like=True):
    """Rows in order."""

    tickets: bytes
    indices: bytes


class Written(Record, frozen=True, kw_only=True):
    """Rows got more columns. The payload is their block; `places` (int32) says where in it, empty: in this order."""

    rows: RowBytes
    places: bytes
    columns: tuple[ColumnSpec, ...]


class Taken(Record, frozen=True, kw_only=True):
    """A task was handed groups."""

    task: str
    tickets: bytes


class Released(Record, frozen=True, kw_only=True):
    """A task gave groups back, or was lost: they are offered again."""

    task: str
    tickets: bytes
    reason: str


class Done(Record, frozen=True, kw_only=True):
    """A task that does not train acknowledged groups."""

    task: str
    tickets: bytes


class Trained(Record, frozen=True, kw_only=True):
    """The step that made version `step` was taken on these micro-batches, in this order: it ends their tickets.

    `threads` is how many threads computed each micro-batch where the trainer said so (0: unknown).
    """

    step: int
    tickets: bytes
    batches: tuple[RowBytes, ...]
    threads: tuple[int, ...] = ()


class Dropped(Record, frozen=True, kw_only=True):
    """Tickets were given up for a stated reason."""

    tickets: bytes
    reason: str


class Live(Record, frozen=True, kw_only=True):
    """The rollout engines serve these weights from now on."""

    step: int
    lineage: str
    fingerprint: str


class Checkpointed(Record, frozen=True, kw_only=True):
    """The checkpoint after `step` steps is on the disk: payloads of steps before the oldest kept one may go."""

    step: int
    oldest_kept: int


AnyRecord: TypeAlias = (
    Opened
    | Admitted
    | Reissued
    | Dispatched
    | Produced
    | Written
    | Taken
    | Released
    | Done
    | Trained
    | Dropped
    | Live
    | Checkpointed
)

_decoder = msgspec.msgpack.Decoder(AnyRecord)
_encoder = msgspec.msgpack.Encoder()


def ticket_bytes(tickets: Tickets) -> bytes:
    """Tickets, as they travel."""
    return as_array(tickets).astype("<i8", copy=False).tobytes()


def read_tickets(data: bytes) -> NDArray[np.int64]:
    """What `ticket_bytes` made."""
    return np.frombuffer(data, "<i8")


def row_bytes(rows: Rows) -> RowBytes:
    """Rows, as they travel; the generation is the queue's."""
    return RowBytes(ticket_bytes(rows.tickets), rows.indices.astype("<i4", copy=False).tobytes())


def read_rows(data: RowBytes, generation: int = 0) -> Rows:
    """What `row_bytes` made. Raises `ValueError` when it is something else."""
    tickets, indices = read_tickets(data.tickets), np.frombuffer(data.indices, "<i4")
    if len(tickets) != len(indices):
        raise ValueError(f"{len(tickets)} tickets with {len(indices)} indices")
    return Rows(tickets, indices, generation)


def encode(record: AnyRecord) -> bytes:
    """The meta of a record."""
    return _encoder.encode(record)


def decode(meta: bytes | memoryview) -> AnyRecord:
    """What `encode` wrote. Raises `msgspec.MsgspecError` for anything else."""
    record: AnyRecord = _decoder.decode(meta)
    return record
