"""Messages that are nearly right: each is answered or cut off, and the server stays sound."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from asyncflow.data import messages
from asyncflow.data.arena import Allocator, Arena
from asyncflow.data.directory import Extent
from asyncflow.data.messages import Attach, Hello, Put, Write
from asyncflow.data.records import RowBytes
from tests.data.raw import Raw, close_all
from tests.data.stores import ThreadServer
from tests.data.test_bad_input import SPEC, server, still_serves

__all__ = ["server"]


@pytest.fixture(autouse=True)
def _raw_connections_are_closed() -> Iterator[None]:
    yield
    close_all()


def random_value(rng: np.random.Generator, value: object) -> object:
    """Something like this value, of a kind that a decoder may let through."""
    numbers = (0, 1, -1, 2, 7, 64, 1 << 31, -(1 << 31), 1 << 62, -(1 << 62), 1 << 63, (1 << 64) - 1)
    if isinstance(value, bool):
        return bool(rng.integers(2))
    if isinstance(value, int):
        return int(numbers[rng.integers(len(numbers))]) if rng.random() < 0.6 else int(rng.integers(-3, 300))
    if isinstance(value, bytes):
        return rng.bytes(int(rng.integers(0, 5)) * int(rng.choice([1, 4, 8])))
    if isinstance(value, str):
        return str(rng.choice(["task", "other", "x", "y", "late", "", "r", "d", "float32", "str", "\0", "é" * 99]))
    if isinstance(value, list | tuple):
        made = [random_value(rng, each) if rng.random() < 0.5 else each for each in value]
        return made * int(rng.integers(0, 3)) if rng.random() < 0.1 else made
    return value


def templates(arena: int, extent: Extent) -> list[messages.AnyRequest]:
    rows = RowBytes(np.arange(2).tobytes(), np.zeros(2, np.int32).tobytes())
    return [
        Hello(1, messages.PROTOCOL, "raw"),
        Attach(1),
        messages.Reserve(1),
        Put(1, -1, 4, 1, extent, (SPEC,)),
        Put(1, 3, 1, 4, extent, (SPEC, SPEC)),
        Write(1, rows, 7, extent, (msgspec.structs.replace(SPEC, name="y", num_rows=2, num_values=2),), False),
        messages.Room(1),
        messages.Take(1, "task", 3, 1),
        messages.Fetch(1, rows, 7, ("x",)),
        messages.Acknowledge(1, 3, 1, (rows,), (1,)),
        messages.Release(1, 3),
        messages.Drop(1, np.arange(2).tobytes(), "why"),
        messages.Dispatch(1, 3, "prompt", 4),
        messages.BeginStep(1, 3),
        messages.Counts(1),
        messages.Cancel(1, 3),
        messages.Ping(1),
    ]


@pytest.mark.parametrize("seed", range(6))
def test_a_million_bytes_of_nearly_right_messages_leave_the_server_sound(
    server: ThreadServer, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Fields are replaced by others of their kind, or bytes flipped; every request is answered or cut off."""
    still_serves(server)  # so that rows have their types
    rng = np.random.default_rng(seed)
    encoder, num_bytes = msgspec.msgpack.Encoder(), 0
    raw: Raw | None = None
    arenas: list[Arena] = []
    while num_bytes < 200_000:
        if raw is None:
            raw = Raw(server)
            arenas.append(raw.attach())
            space = Allocator(1 << 16)
        extent = space.take(256, arenas[-1].number) or Extent(arenas[-1].number, 0, 320, 1)
        arenas[-1].begin(extent)[:] = 0
        arenas[-1].commit(extent)
        kinds = templates(arenas[-1].number, extent)
        name, *fields = msgspec.msgpack.decode(encoder.encode(kinds[rng.integers(len(kinds))]))
        if rng.random() < 0.8:
            fields = [random_value(rng, each) if rng.random() < 0.3 else each for each in fields]
        body = bytearray(encoder.encode([name, *fields]))
        if rng.random() < 0.1:
            body[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
        data = len(body).to_bytes(4, "little") + bytes(body)
        num_bytes += len(data)
        is_whole = rng.random() < 0.98
        if not (raw.survives(data) if is_whole else raw.survives(data[: rng.integers(len(data))], is_whole=False)):
            raw.close()
            raw = None
    if raw is not None:
        raw.close()
    for arena in arenas:
        arena.close()
    assert [record.getMessage() for record in caplog.records] == []  # nothing went past the handlers
    still_serves(server)
    server.ask(lambda s: s.control.clear())
    assert server.ask(lambda s: (s.control.num_blocks, len(s.control.memory._held), len(s._clients))) == (0, 0, 0)
