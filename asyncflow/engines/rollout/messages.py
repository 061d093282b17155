"""What the engine and its process say to each other: msgpack frames over a Unix socket pair.

A frame is its length in 4 little-endian bytes, then a list of messages. Both sides decode
into these closed types and nothing else; arrays travel as raw little-endian bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Literal, TypeVar

import msgspec
import numpy as np

from asyncflow.core.errors import EngineLostError
from asyncflow.core.types import Completion, FinishReason, FloatArray, IntArray, SamplingParams, VersionSpan, WeightsRef

MAX_FRAME_BYTES = 256 * 1024 * 1024
LENGTH_BYTES = 4


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message: which model to serve, and how. `manifest` is empty without a weight channel.

    With `deterministic`, a completion's bits follow from its request and the weights alone.
    """

    model: str
    device: str
    dtype: str
    max_running: int
    threads: int
    channel_fd: int
    manifest: bytes
    deterministic: bool


class Generate(msgspec.Struct, frozen=True, tag="generate"):
    """Sample a completion; `token_ids` are int32. Answered by `Finished` or `Failed`."""

    request: int
    token_ids: bytes
    params: SamplingParams
    is_streamed: bool


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget a request, which is not answered any more."""

    request: int


class LoadWeights(msgspec.Struct, frozen=True, tag="load_weights"):
    """Serve these weights. Answered by `WeightsLive` or `Failed`."""

    request: int
    weights: WeightsRef


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Is anyone there? Answered by `Alive`, between two decode steps or at once."""


class Close(msgspec.Struct, frozen=True, tag="close"):
    """End the process."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Answer to `Start`: token ids are below `vocabulary`, sequences at most `context` tokens long."""

    device: str
    vocabulary: int
    context: int


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Answer to `Start`: the settings can't work, and the process ends."""

    problems: tuple[str, ...]


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """A completion: `token_ids` int32 `[n]`, `logprobs` float32 `[n]`."""

    request: int
    token_ids: bytes
    logprobs: bytes
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason


class Chunk(msgspec.Struct, frozen=True, tag="chunk"):
    """Tokens of a streamed completion."""

    request: int
    token_ids: bytes
    logprobs: bytes
    step: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """This request can't be served; `kind` names the error to raise."""

    request: int
    kind: Literal["non_finite", "weights"]
    reason: str


class WeightsLive(msgspec.Struct, frozen=True, tag="weights_live"):
    """The model now holds weights with this fingerprint; loading took from `start_s` to `end_s`."""

    request: int
    fingerprint: str
    start_s: float
    end_s: float


class Busy(msgspec.Struct, frozen=True, tag="busy"):
    """The process computed from `start_s` to `end_s` of the monotonic clock and sampled `num_tokens`."""

    start_s: float
    end_s: float
    num_tokens: int


class Alive(msgspec.Struct, frozen=True, tag="alive"):
    """Answer to `Ping`; also sent unasked in the middle of a long step."""


ToWorker = Start | Generate | Abort | LoadWeights | Ping | Close
FromWorker = Ready | Refused | Finished | Chunk | Failed | WeightsLive | Busy | Alive

MessageT = TypeVar("MessageT")
_encoder = msgspec.msgpack.Encoder()


def encode(messages: Sequence[ToWorker] | Sequence[FromWorker]) -> bytes:
    """One frame."""
    body = _encoder.encode(messages)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {len(body)} bytes, at most {MAX_FRAME_BYTES} are sent")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


class Frames(Generic[MessageT]):
    """Cuts a byte stream into messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[list[MessageT]]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    @classmethod
    def to_worker(cls) -> Frames[ToWorker]:
        """What a worker reads."""
        return Frames(msgspec.msgpack.Decoder(list[ToWorker]))

    @classmethod
    def from_worker(cls) -> Frames[FromWorker]:
        """What a worker writes."""
        return Frames(msgspec.msgpack.Decoder(list[FromWorker]))

    def feed(self, data: bytes) -> Iterator[MessageT]:
        """The messages that these bytes complete. Raises `EngineLostError` for a damaged stream."""
        self._buffer += data
        while (body := self._take_frame()) is not None:
            try:
                yield from self._decoder.decode(body)
            except msgspec.MsgspecError as error:
                raise EngineLostError(f"damaged message between engine and worker: {error}") from error

    def _take_frame(self) -> bytes | None:
        size = int.from_bytes(self._buffer[:LENGTH_BYTES], "little")
        if size > MAX_FRAME_BYTES:
            raise EngineLostError(f"a frame announces {size} bytes, at most {MAX_FRAME_BYTES} are accepted")
        end = LENGTH_BYTES + size
        if len(self._buffer) < max(end, LENGTH_BYTES + 1):
            return None
        body = bytes(self._buffer[LENGTH_BYTES:end])
        del self._buffer[:end]
        return body


def ints(data: bytes) -> IntArray:
    """An int32 array of its own."""
    return np.frombuffer(data, "<i4").astype(np.int32)


def floats(data: bytes) -> FloatArray:
    """A float32 array of its own."""
    return np.frombuffer(data, "<f4").astype(np.float32)


def completion(message: Finished) -> Completion:
    """What a caller gets."""
    return Completion(
        token_ids=ints(message.token_ids),
        logprobs=floats(message.logprobs),
        versions=message.versions,
        finish_reason=message.finish_reason,
    )
