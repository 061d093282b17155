"""What processes and the queue's server say to each other: closed types in MessagePack, in frames of bounded size.

A frame is its length as four little-endian bytes, then one message. Nothing in a message is
ever run; what does not decode ends the connection. Descriptors of shared memory travel beside
the frames that announce them (`Attach`, `ArenaIs`).
"""

from __future__ import annotations

from typing import Generic, TypeAlias, TypeVar

import msgspec

from asyncflow.core.errors import QueueLostError
from asyncflow.data.directory import Extent, Source
from asyncflow.data.layout import ColumnSpec
from asyncflow.data.records import RowBytes

PROTOCOL = 1
"""Both sides must speak the same."""
MAX_FRAME_BYTES = 1 << 26
HEADER_BYTES = 4


class Request(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A client wants something; the answer carries the same number."""

    request: int


class Hello(Request, frozen=True):
    """The first message of every connection."""

    protocol: int
    name: str


class Attach(Request, frozen=True):
    """The client's arena comes beside this message; answered with its number."""


class Reserve(Request, frozen=True):
    """A ticket, as soon as the gate allows it."""


class Put(Request, frozen=True):
    """`count` groups of `group_size` rows lie in this block. `ticket` -1: none was reserved."""

    ticket: int
    count: int
    group_size: int
    extent: Extent
    columns: tuple[ColumnSpec, ...]


class Write(Request, frozen=True):
    """These rows get columns, which lie in this block."""

    rows: RowBytes
    generation: int
    extent: Extent
    columns: tuple[ColumnSpec, ...]
    missing_ok: bool


class Room(Request, frozen=True):
    """The client's arena is full: answered as soon as something in it is free."""


class Take(Request, frozen=True):
    """Groups for a task, as soon as `at_least` are ready. The lease has the request's number.

    It runs out after `lease_s` seconds; 0: it lasts as long as the connection.
    """

    task: str
    max_groups: int
    at_least: int
    lease_s: float = 0.0


class Fetch(Request, frozen=True):
    """Where these columns of these rows lie."""

    rows: RowBytes
    generation: int
    names: tuple[str, ...]


class Acknowledge(Request, frozen=True):
    """All of a lease is done with; for the training task, by step `step`, on these micro-batches."""

    lease: int
    step: int
    batches: tuple[RowBytes, ...]
    threads: tuple[int, ...]


class Release(Request, frozen=True):
    """All of a lease is given back."""

    lease: int


class Drop(Request, frozen=True):
    """These tickets are given up."""

    tickets: bytes
    reason: str


class Dispatch(Request, frozen=True):
    """Which prompt a ticket is."""

    ticket: int
    prompt: str
    num_tokens: int


class Advance(Request, frozen=True):
    """These weights are live."""

    step: int
    lineage: str
    fingerprint: str


class BeginStep(Request, frozen=True):
    """The training task works at this version from now on."""

    step: int


class Settled(Request, frozen=True):
    """Answered once no rollout is under way or may begin under the live weights, and the log says so."""


class Finish(Request, frozen=True):
    """No more puts will come."""


class Clear(Request, frozen=True):
    """Drop everything."""


class Counts(Request, frozen=True):
    """How many tickets are where."""


class Cancel(Request, frozen=True):
    """Forget a parked request."""

    other: int


class Ping(Request, frozen=True):
    """Is anybody there?"""


AnyRequest: TypeAlias = (
    Hello | Attach | Reserve | Put | Write | Room | Take | Fetch | Acknowledge | Release | Drop | Dispatch | Advance
    | BeginStep | Settled | Finish | Clear | Counts | Cancel | Ping
)  # fmt: skip


class Reply(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The answer to the request of this number."""

    request: int


class Welcome(Reply, frozen=True):
    """To `Hello`."""

    generation: int
    tasks: dict[str, tuple[str, ...]]
    trains: str
    pid: int


class Done(Reply, frozen=True):
    """It is done. `freed`: offsets and sizes in the client's arena that may be written over."""

    value: int = 0
    freed: tuple[tuple[int, int], ...] = ()


class Given(Reply, frozen=True):
    """Groups and where they lie: `count` consecutive ones from `first` on, or `tickets` where they are given.

    `group_size` is the number of rows of each; where they differ it is 0, and `indices` are given.
    """

    first: int
    count: int
    group_size: int
    tickets: bytes
    indices: bytes
    sources: tuple[Source, ...]


class Accounts(Reply, frozen=True):
    """To `Counts`."""

    admitted: int
    trained: int
    dropped: dict[str, int]
    pending: int


class Failed(Reply, frozen=True):
    """It could not be done."""

    kind: str
    reason: str


class ArenaIs(Reply, frozen=True):
    """The arena of this number comes beside this message; it answers nothing."""

    number: int


AnyReply: TypeAlias = Welcome | Done | Given | Accounts | Failed | ArenaIs

MessageT = TypeVar("MessageT")

request_decoder: msgspec.msgpack.Decoder[AnyRequest] = msgspec.msgpack.Decoder(AnyRequest)
reply_decoder: msgspec.msgpack.Decoder[AnyReply] = msgspec.msgpack.Decoder(AnyReply)
_encoder = msgspec.msgpack.Encoder()


def frame(message: AnyRequest | AnyReply) -> bytes:
    """A message as it travels."""
    body = _encoder.encode(message)
    return len(body).to_bytes(HEADER_BYTES, "little") + body


class NotUnderstoodError(QueueLostError):
    """A message that is none of those known here. `request` is its number, where it has one, else -1."""

    def __init__(self, reason: str, request: int) -> None:
        super().__init__(reason)
        self.request = request


class Frames(Generic[MessageT]):
    """Puts bytes together to messages. Raises `QueueLostError` for what is none: nothing after it can be read."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[MessageT]) -> None:
        self._decoder = decoder
        self._rest = bytearray()
        self._needed = HEADER_BYTES
        """Of the rest and what follows, until it is worth looking at again: a large frame comes in many pieces."""

    def feed(self, data: bytes) -> list[MessageT]:
        """The messages that are whole now."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
        messages, start, self._needed = [], 0, HEADER_BYTES
        while len(data) - start >= HEADER_BYTES:
            size = int.from_bytes(data[start : start + HEADER_BYTES], "little")
            if size > MAX_FRAME_BYTES:
                raise QueueLostError(f"a frame of {size:,} bytes was announced; at most {MAX_FRAME_BYTES:,} are taken")
            if len(data) - start - HEADER_BYTES < size:
                self._needed += size
                break
            start += HEADER_BYTES + size
            messages.append(self._decode(data[start - size : start]))
        if start < len(data) or self._rest:
            self._rest = bytearray(data[start:])
        return messages

    def _decode(self, body: bytes) -> MessageT:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError, OverflowError, ValueError) as error:
            reason = f"a message can't be understood: {error}. Is the other side of another version of asyncflow?"
            raise NotUnderstoodError(reason, _number_of(body)) from error


def _number_of(body: bytes) -> int:
    """The request that a message is about, whatever it says; -1 where it is no message at all."""
    try:
        content = msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, RecursionError, OverflowError, ValueError):
        return -1
    is_message = isinstance(content, list) and len(content) > 1 and isinstance(content[1], int)
    return content[1] if is_message and abs(content[1]) < 1 << 62 else -1
