"""What is wrong is refused with a reason, and harms nobody else."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest

from asyncflow.core.errors import (
    AsyncFlowError,
    ColumnError,
    LeaseLostError,
    QueueError,
    QueueFullError,
    QueueLostError,
    StaleHandleError,
)
from asyncflow.core.types import Rows
from asyncflow.data import messages
from asyncflow.data.arena import Allocator, Arena
from asyncflow.data.directory import Extent
from asyncflow.data.layout import ColumnLike, ColumnSpec, Kind
from asyncflow.data.messages import Attach, Counts, Failed, Put, frame
from asyncflow.data.queue import TransferQueue
from tests.data.arenas import arenas_open
from tests.data.raw import Raw, close_all
from tests.data.stores import ThreadServer, thread_server

NEEDS = {"task": ["x"], "other": ["x", "y"]}
ARENA_BYTES = 1 << 20


@pytest.fixture
def server() -> Iterator[ThreadServer]:
    before = arenas_open()
    with thread_server(NEEDS) as server:
        yield server
    assert {*arenas_open()} <= {*before}


@pytest.fixture
def queue(server: ThreadServer) -> Iterator[TransferQueue]:
    with TransferQueue.connect(server.address, arena_bytes=ARENA_BYTES) as queue:
        yield queue


def still_serves(server: ThreadServer) -> None:
    """Rows go through, for somebody new, and with them what waited before."""
    with TransferQueue.connect(server.address, arena_bytes=ARENA_BYTES) as queue:
        rows = queue.put({"x": np.zeros(3, np.float32), "y": np.arange(3, dtype=np.float32)})
        assert queue.fetch(rows, ["y"])["y"].values.tolist() == [0, 1, 2]
        for task in NEEDS:
            seen: list[int] = []
            while not {*rows.tickets.tolist()} <= {*seen}:
                batch = queue.get(task, max_rows=99, timeout_s=10)
                assert batch is not None
                seen += batch.rows.tickets.tolist()
                queue.acknowledge(batch)
        with pytest.raises(StaleHandleError):
            queue.fetch(rows, ["x"])


# -- columns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"x": [np.zeros(2), np.zeros(2, np.int8)]}, "rows of column x differ in dtype or inner shape: float64"),
        ({"x": [np.zeros((2, 3)), np.zeros((2, 4))]}, "differ in dtype or inner shape"),
        ({"x": [np.zeros(2), None, np.zeros((2, 2))]}, "rows differ in dtype or inner shape"),
        ({"x": np.zeros(3)}, r"rows of column x are float32\[\] in this queue, these are float64\[\]"),
        ({"x": np.zeros((3, 2, 2), np.float32)}, r"these are float32\[2\]"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, "column y has 2 rows, the columns before it have 3"),
        ({"x": ["a", 1]}, "some rows are strings, one is int"),
        ({"x": "abc"}, "a column is a sequence of rows, this is"),
        ({"x": np.zeros(())}, "single value"),
        ({"x": np.array(["a", "b"], object)}, "can't be stored"),
        ({"x": np.array(["2020-01-01"], "datetime64[s]")}, "dtype datetime64.* can't be stored"),
        ({"x": [{"a": 1}]}, "can't be stored"),
        ({"x": []}, "no rows"),
        ({}, "nothing to put"),
        ({f"x{n}": np.zeros(1) for n in range(70)}, "at most 63 columns"),
    ],
)
def test_a_column_that_cannot_be_stored_is_refused_and_takes_nothing(
    server: ThreadServer, queue: TransferQueue, columns: Mapping[str, ColumnLike], match: str
) -> None:
    queue.put({"x": np.zeros(1, np.float32)})
    assert queue._memory._writer is not None
    free = queue._memory._writer.num_free
    with pytest.raises((ColumnError, QueueError, AsyncFlowError), match=match):
        queue.put(columns)
    assert queue._memory._writer.num_free == free
    assert queue.counts().admitted in (1, 2)
    still_serves(server)


def test_a_write_must_fit_its_rows(server: ThreadServer, queue: TransferQueue) -> None:
    rows = queue.put({"x": np.zeros(4, np.float32)}, group_size=2)
    free = queue._memory._writer.num_free if queue._memory._writer else 0
    for handle, column, match in (
        (rows, np.zeros(3), "a written column has 3 rows, the batch 4"),
        (rows[np.array([0, 1, 1])], np.zeros(3), "named twice"),
        (Rows(rows.tickets, rows.indices + 1), np.zeros(4), "another queue"),
        (Rows(rows.tickets, rows.indices + 1, rows.generation), np.zeros(4), "rows that its groups do not have"),
        (Rows(rows.tickets, rows.indices - 1, rows.generation), np.zeros(4), "rows that its groups do not have"),
        (Rows(rows.tickets + 50, rows.indices, rows.generation), np.zeros(4), "never admitted"),
        (Rows(rows.tickets - 9, rows.indices, rows.generation), np.zeros(4), "never admitted"),
    ):
        with pytest.raises(QueueError, match=match):
            queue.write(handle, {"y": column})
    queue.write(rows[:1], {"y": np.zeros(1)})
    with pytest.raises(ColumnError, match="have column y already"):
        queue.write(rows, {"y": np.zeros(4)})
    with pytest.raises(QueueError, match="column x"):
        queue.write(rows, {"x": np.zeros(4)})
    assert queue.write(rows[1:], {"y": np.ones(3)}) == 3
    assert queue.fetch(rows, ["y"])["y"].values.tolist() == [0, 1, 1, 1]
    assert queue._memory._writer is not None
    assert queue._memory._writer.num_free == free - 2 * 128  # of the writes that were done
    with pytest.raises(ColumnError, match="column z does not exist"):
        queue.fetch(rows, ["z"])


# -- handles and leases ----------------------------------------------------------------------


def test_a_handle_of_another_queue_or_of_rows_that_are_gone_is_stale(queue: TransferQueue) -> None:
    old = queue.put({"x": np.arange(4), "y": np.arange(4)})
    with pytest.raises(StaleHandleError, match="another queue"):
        queue.fetch(Rows(old.tickets, old.indices, old.generation + 1), ["x"])
    for task in NEEDS:
        batch = queue.get(task, max_rows=4)
        assert batch is not None
        queue.acknowledge(batch)
    new = queue.put({"x": -np.arange(1, 5), "y": np.arange(4)})  # in the same memory
    with pytest.raises(StaleHandleError, match="no longer in the queue"):
        queue.fetch(old, ["x"])
    with pytest.raises(StaleHandleError, match="no longer in the queue"):
        queue.write(old, {"z": np.arange(4)})
    assert queue.write(Rows.join([old, new]), {"z": np.arange(8)}, missing_ok=True) == 4
    assert queue.fetch(new, ["x", "z"])["z"].values.tolist() == [4, 5, 6, 7]


def test_a_lease_ends_once(queue: TransferQueue) -> None:
    queue.put({"x": np.arange(4)})
    batch, other = queue.get("task", max_rows=2), queue.get("task", max_rows=2)
    assert batch is not None
    assert other is not None
    queue.acknowledge(batch)
    queue.release(other)
    for each in (batch, other):
        with pytest.raises(LeaseLostError):
            queue.acknowledge(each)
        with pytest.raises(LeaseLostError):
            queue.release(each)
    again = queue.get("task", max_rows=9)
    assert again is not None
    assert again["x"].values.tolist() == [2, 3]
    with pytest.raises(QueueError, match="no task 'tusk' in this queue; it has task, other"):
        queue.get("tusk")


def test_a_lease_of_another_connection_is_not_ours(server: ThreadServer, queue: TransferQueue) -> None:
    queue.put({"x": np.arange(4)})
    batch = queue.get("task", max_rows=4)
    assert batch is not None
    with TransferQueue.connect(server.address) as thief, pytest.raises(LeaseLostError):
        thief.acknowledge(batch)
    queue.acknowledge(batch)


# -- memory ----------------------------------------------------------------------------------


def test_memory_that_the_system_does_not_have_is_an_error_and_not_a_signal(
    queue: TransferQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue.put({"x": np.zeros(10)})
    assert queue._memory._writer is not None
    queue._memory._writer.arena._num_backed = 8192

    def fail(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    free = queue._memory._writer.num_free
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fail)
        with pytest.raises(QueueFullError, match=r"no memory for .* No space left on device"):
            queue.put({"x": np.zeros(2_000)})
        queue.put({"x": np.zeros(10)})  # where there is memory already
    assert queue._memory._writer.num_free == free - 192
    queue.put({"x": np.zeros(2_000)})


def test_a_block_that_is_used_again_is_not_read_by_an_old_reference() -> None:
    arena, space = Arena.create(1 << 16, 3), Allocator(1 << 16)
    try:
        first = space.take(100, 3)
        assert first is not None
        arena.begin(first)[:] = 1
        with pytest.raises(StaleHandleError):
            arena.block(first)  # not whole yet
        arena.commit(first)
        assert arena.block(first).max() == 1
        space.give_back(first.offset, first.num_bytes)
        second = space.take(100, 3)
        assert second is not None
        assert second.offset == first.offset
        arena.begin(second)[:] = 2
        for old in (first, second):
            with pytest.raises(StaleHandleError, match="used again"):
                arena.block(old)
        arena.commit(second)
        with pytest.raises(StaleHandleError, match="used again"):
            arena.block(first)
        for offset, num_bytes in ((-64, 128), (0, 1 << 17), ((1 << 16) - 64, 128), (0, 0), (1 << 70, 64)):
            with pytest.raises(StaleHandleError, match="no block can lie"):
                arena.block(Extent(3, offset, num_bytes, 1))
    finally:
        arena.close()
    assert arenas_open() == []


def test_shared_memory_that_may_change_its_size_is_no_arena(tmp_path: Path) -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 16)
    with pytest.raises(QueueError, match="may change its size"):
        Arena.attach(fd, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)  # it was taken over
    with (tmp_path / "file").open("wb+") as file:
        file.write(bytes(1 << 16))
        file.flush()
        with pytest.raises(QueueError, match="no arena"):
            Arena.attach(os.dup(file.fileno()), 0)


# -- the wire --------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _raw_connections_are_closed() -> Iterator[None]:
    yield
    close_all()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(frame(Counts(1)), id="no greeting"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", id="http"),
        pytest.param((messages.MAX_FRAME_BYTES + 1).to_bytes(4, "little") + b"x", id="too large"),
        pytest.param(b"\x03\0\0\0abc", id="no message"),
        pytest.param(b"\0\0\0\0", id="empty"),
        pytest.param((2_000).to_bytes(4, "little") + b"\x91" * 2_000, id="deep"),
        pytest.param(frame(Counts(-1)).replace(b"Counts", b"Pickle"), id="unknown message"),
    ],
)
def test_who_speaks_otherwise_is_cut_off_and_others_are_served(server: ThreadServer, data: bytes) -> None:
    raw = Raw(server, greets=False)
    raw.send(data)
    assert raw.receive() is None
    raw.close()
    still_serves(server)


def test_a_truncated_frame_ends_with_its_connection(server: ThreadServer) -> None:
    raw = Raw(server)
    raw.send(frame(Counts(5))[:-1])
    raw.close()
    still_serves(server)
    assert server.ask(lambda s: len(s._clients)) == 0


def test_a_client_of_another_protocol_is_told_so(server: ThreadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncflow.data.connection.PROTOCOL", 99)
    with pytest.raises(QueueError, match="this server speaks protocol 1, the client 99"):
        TransferQueue.connect(server.address)
    monkeypatch.undo()
    still_serves(server)


def test_descriptors_that_are_no_arenas_are_refused(server: ThreadServer, tmp_path: Path) -> None:
    raw = Raw(server)
    with (tmp_path / "file").open("wb+") as file:
        for _ in range(20):
            socket.send_fds(raw.socket, [frame(Attach(1))], [file.fileno()])
            reply = raw.receive()
            assert isinstance(reply, Failed)
            assert "no arena" in reply.reason
    raw.send(frame(Attach(2)))
    reply = raw.receive()
    assert isinstance(reply, Failed)
    assert "did not come" in reply.reason
    still_serves(server)
    raw.close()
    still_serves(server)
    paths = [*Path("/proc/self/fd").iterdir()]
    assert str(tmp_path / "file") not in [str(path.readlink()) for path in paths if path.is_symlink()]


SPEC = ColumnSpec("x", "float32", Kind.DENSE, (), False, 4, 4, 0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "object"},
        {"shape": (-1,)},
        {"shape": (1 << 40,)},
        {"shape": (1,) * 9},
        {"num_rows": -4},
        {"num_rows": 5},
        {"num_values": 1 << 50},
        {"values_at": 1 << 20},
        {"values_at": 8},
        {"values_at": -64},
        {"kind": Kind.RAGGED, "lengths_at": 1 << 20},
        {"kind": Kind.RAGGED, "num_rows": 1 << 40},
        {"shape": (0,), "num_rows": 1 << 40, "num_values": 1 << 40},
        {"is_shared": True, "num_rows": 2, "num_values": 2},
    ],
)
def test_a_description_that_lies_about_its_block_is_refused(server: ThreadServer, change: dict[str, object]) -> None:
    """Also one whose number of rows is not that of its groups."""
    raw = Raw(server)
    arena, space = raw.attach(), Allocator(1 << 16)
    extent = space.take(256, arena.number)
    assert extent is not None
    arena.begin(extent)[:] = 0
    arena.commit(extent)
    raw.send(frame(Put(2, -1, 4, 1, extent, (msgspec.structs.replace(SPEC, **change),))))
    reply = raw.receive()
    assert isinstance(reply, Failed), reply
    for other in (
        msgspec.structs.replace(extent, stamp=9),
        msgspec.structs.replace(extent, arena=9),
        msgspec.structs.replace(extent, offset=1 << 15),
        msgspec.structs.replace(extent, num_bytes=1 << 20),
        msgspec.structs.replace(extent, num_bytes=0),
        msgspec.structs.replace(extent, offset=-64),
    ):
        raw.send(frame(Put(3, -1, 4, 1, other, (SPEC,))))
        assert isinstance(raw.receive(), Failed)
    for count, size in ((0, 1), (-4, 1), (4, 0), (4, -1), (1 << 40, 1), (1, 1 << 40), (3, 1), (2, 4)):
        raw.send(frame(Put(4, -1, count, size, extent, (SPEC,))))
        assert isinstance(raw.receive(), Failed), (count, size)
    empty = msgspec.structs.replace(SPEC, shape=(0,), num_rows=1 << 40, num_values=1 << 40)  # of no bytes
    raw.send(frame(Put(4, -1, 1 << 40, 1, extent, (empty,))))
    assert isinstance(raw.receive(), Failed)
    raw.send(frame(Put(5, -1, 4, 1, extent, (SPEC,))))
    assert isinstance(raw.receive(), messages.Done)
    arena.close()
    raw.close()
    still_serves(server)


def test_a_client_that_reads_no_answers_is_cut_off_and_harms_nobody(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asyncflow.data.server.MAX_OUTBOX_BYTES", 1 << 12)
    raw = Raw(server)
    with pytest.raises(ConnectionError):
        raw.send(frame(Counts(1)) * 1_000_000)
    raw.close()
    still_serves(server)


def test_a_reply_that_is_none_ends_the_client_with_an_error(server: ThreadServer, queue: TransferQueue) -> None:
    def answer_nonsense(s: object) -> None:
        (client,) = server.server._clients
        client._outbox += b"\x03\0\0\0abc"

    server.ask(answer_nonsense)
    with pytest.raises(QueueLostError, match="can't be understood"):
        queue.counts()
