"""Frames: cut anywhere they arrive whole; anything else is refused."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.errors import EngineLostError
from asyncflow.core.types import FinishReason, PolicyVersion, SamplingParams, VersionSpan, WeightsRef
from asyncflow.engines.rollout.messages import (
    LENGTH_BYTES,
    MAX_FRAME_BYTES,
    Abort,
    Close,
    Finished,
    Frames,
    Generate,
    LoadWeights,
    ToWorker,
    completion,
    encode,
)

SENT: list[ToWorker] = [
    Generate(request=1, token_ids=b"\1\0\0\0", params=SamplingParams(max_tokens=3, seed=2**63 - 1), is_streamed=True),
    Abort(request=1),
    LoadWeights(request=2, weights=WeightsRef(version=PolicyVersion(step=3, lineage="a"), address="memory:1")),
    Close(),
]


@given(st.lists(st.integers(1, 200), max_size=8))
def test_frames_may_be_cut_anywhere(sizes: list[int]) -> None:
    data = encode(SENT) + encode([]) + encode(SENT[:1])
    frames, received, position = Frames.to_worker(), [], 0
    for size in [*sizes, len(data)]:
        received += list(frames.feed(data[position : position + size]))
        position += size
    assert received == [*SENT, SENT[0]]


def test_a_completion_survives_the_way() -> None:
    tokens, logprobs = np.array([3, 70_000], np.int32), np.array([-0.5, -2.25], np.float32)
    spans = (VersionSpan(step=1, num_tokens=1), VersionSpan(step=2, num_tokens=1))
    sent = Finished(
        request=7,
        token_ids=tokens.tobytes(),
        logprobs=logprobs.tobytes(),
        versions=spans,
        finish_reason=FinishReason.STOP,
    )
    (received,) = Frames.from_worker().feed(encode([sent]))
    assert isinstance(received, Finished)
    one = completion(received)
    assert one.token_ids.tolist() == tokens.tolist()
    assert one.logprobs.tolist() == logprobs.tolist()
    assert (one.versions, one.finish_reason) == (spans, FinishReason.STOP)
    one.token_ids[0] = 1  # an array of its own


@pytest.mark.parametrize("body", [b"\xc1", b"\x93\x01", b"\x91\x81\xa4type\xa4none", msgspec.msgpack.encode("text")])
def test_anything_but_a_known_message_is_refused(body: bytes) -> None:
    with pytest.raises(EngineLostError, match="damaged message"):
        list(Frames.to_worker().feed(len(body).to_bytes(LENGTH_BYTES, "little") + body))


def test_a_frame_that_announces_too_much_is_refused_before_it_comes() -> None:
    with pytest.raises(EngineLostError, match="at most"):
        list(Frames.to_worker().feed((MAX_FRAME_BYTES + 1).to_bytes(LENGTH_BYTES, "little")))


def test_a_frame_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncflow.engines.rollout.messages.MAX_FRAME_BYTES", 8)
    with pytest.raises(ValueError, match="at most 8"):
        encode(SENT)
