"""The server: when it answers, what it says before it ends, and what does not keep it alive or busy."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.errors import QueueLostError
from asyncflow.core.world import World
from asyncflow.data import messages
from asyncflow.data.arena import Arena
from asyncflow.data.control import ControlPlane
from asyncflow.data.ledger import Ledger, QueueTask
from asyncflow.data.log import LogMode, MemoryLog
from asyncflow.data.messages import (
    Advance,
    Attach,
    BeginStep,
    Clear,
    Counts,
    Dispatch,
    Done,
    Drop,
    Failed,
    Finish,
    Frames,
    Given,
    Release,
    Take,
    frame,
    reply_decoder,
)
from asyncflow.data.queue import TransferQueue
from asyncflow.data.server import Server
from asyncflow.data.server_process import ServerProcess, ServerSettings, start_server
from tests.data.arenas import arenas_open
from tests.data.raw import Raw, close_all
from tests.data.stores import ThreadServer, thread_server

NEEDS = {"task": ["x"]}


@pytest.fixture(autouse=True)
def _connections_are_closed() -> Iterator[None]:
    yield
    close_all()


class HeldLog(MemoryLog):
    """From `hold` on nothing is safe before `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] | None = None

    def when_safe(self, lsn: int, action: Callable[[], None]) -> None:
        if self.waiting is None:
            action()
        else:
            self.waiting.append(action)

    def hold(self) -> None:
        self.waiting = []

    def release(self) -> None:
        waiting, self.waiting = self.waiting or [], None
        for action in waiting:
            action()


@pytest.mark.parametrize(
    "message",
    [
        Drop(9, np.array([3]).tobytes(), "why"),
        Release(9, 5),
        Clear(9),
        Advance(9, 1, "", ""),
        BeginStep(9, 1),
        Dispatch(9, 3, "prompt", 1),
        Finish(9),
    ],
    ids=lambda message: type(message).__name__,
)
def test_nothing_is_answered_before_it_is_safe(message: messages.AnyRequest) -> None:
    log = HeldLog()
    server = ThreadServer(lambda: ControlPlane(Ledger([QueueTask(name="task", needs=("x",))]), log, generation=7))
    with TransferQueue.connect(server.address) as queue:
        queue.put({"x": np.zeros(4)})
        raw = Raw(server)
        raw.send(frame(Take(5, "task", 2, 1)))
        while not isinstance(raw.receive(), Given):
            pass
        server.ask(lambda s: log.hold())
        raw.send(frame(message) + frame(messages.Ping(10)))
        reply = raw.receive()
        assert reply is not None
        assert reply.request == 10
        server.ask(lambda s: log.release())
        assert raw.receive() == Done(9, 0, ())
        raw.close()
    server.close()


def test_what_fails_for_no_known_reason_is_told_and_ends_that_client_only(caplog: pytest.LogCaptureFixture) -> None:
    with thread_server(NEEDS) as server, TransferQueue.connect(server.address) as queue:

        def fail() -> None:
            raise KeyError("lost")

        counts = server.ask(lambda s: s.control.counts)
        server.ask(lambda s: setattr(s.control, "counts", fail))
        raw = Raw(server)
        raw.send(frame(Counts(3)))
        assert raw.receive() == Failed(3, "QueueError", "the queue's server failed at Counts: KeyError: 'lost'")
        assert raw.receive() is None
        server.ask(lambda s: setattr(s.control, "counts", counts))
        assert queue.counts().admitted == 0
    assert "failed at Counts" in caplog.text


def test_a_message_of_another_version_is_answered_before_the_connection_ends() -> None:
    with thread_server(NEEDS) as server:
        for greets in (True, False):
            raw = Raw(server, greets=greets)
            raw.send(frame(Counts(3)).replace(b"Counts", b"Pickle"))
            reply = raw.receive()
            assert isinstance(reply, Failed)
            assert reply.request == 3
            assert "another version of asyncflow" in reply.reason
            assert raw.receive() is None
            raw.close()


def test_a_client_that_can_not_be_accepted_is_not_asked_about_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    accept = Server._accept

    def counted(self: Server) -> None:
        calls.append(None)
        accept(self)

    monkeypatch.setattr(Server, "_accept", counted)
    with thread_server(NEEDS) as server, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(client.fileno())
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        try:
            client.connect("\0" + server.address[1:])
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert len(calls) == 1
        client.settimeout(10)
        client.sendall(frame(messages.Hello(0, messages.PROTOCOL, "late")))
        assert client.recv(1 << 16)
        assert len(calls) == 2


def test_a_second_arena_is_closed() -> None:
    with thread_server(NEEDS) as server:
        raw = Raw(server)
        arenas = [Arena.create(1 << 16, 0), Arena.create(1 << 16, 0)]
        socket.send_fds(raw.socket, [frame(Attach(1)) + frame(Attach(2))], [arena.fd for arena in arenas])
        assert isinstance(raw.receive(), Done)
        reply = raw.receive()
        assert isinstance(reply, Failed)
        assert "has an arena already" in reply.reason
        assert len(server.ask(lambda s: arenas_open())) == 2 * 3  # each mapped too: ours, the server's of the first
        for arena in arenas:
            arena.close()
        raw.close()


# -- frames ----------------------------------------------------------------------------------


def test_a_large_frame_is_not_copied_with_each_piece() -> None:
    data = frame(Failed(1, "kind", "x" * 1_000_000))
    frames = Frames(reply_decoder)
    assert frames.feed(data[:9]) == []
    rest = frames._rest
    for start in range(9, len(data) - 1000, 1000):
        assert frames.feed(data[start : start + 1000]) == []
        assert frames._rest is rest
    assert frames.feed(data[len(rest) :] + data[:2]) == [Failed(1, "kind", "x" * 1_000_000)]
    assert frames.feed(data[2:]) == [Failed(1, "kind", "x" * 1_000_000)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 30, 1000])
def test_frames_come_whole_however_they_are_cut(size: int) -> None:
    expected = [Done(number, number, ()) for number in range(5)] + [Failed(9, "k" * number, "") for number in range(40)]
    data = b"".join(map(frame, expected))
    frames, found = Frames(reply_decoder), []
    for start in range(0, len(data), size):
        found += frames.feed(data[start : start + size])
    assert found == expected
    assert not frames._rest


# -- its process -----------------------------------------------------------------------------


@pytest.fixture
def stderr() -> Iterator[int]:
    """What processes started meanwhile say, to be read."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    saved = os.dup(2)
    os.dup2(theirs, 2)
    os.close(theirs)
    yield ours
    os.dup2(saved, 2)
    os.close(saved)
    os.close(ours)


@pytest.fixture
def process(stderr: int, tmp_path: Path) -> Iterator[ServerProcess]:
    settings = ServerSettings(tasks={"task": ("x",)}, log=str(tmp_path / "log"), log_mode=LogMode.SYNC)
    process = start_server(settings, World())
    try:
        yield process
    finally:
        process.stop()


def test_a_child_that_has_the_link_too_does_not_keep_the_server_alive(process: ServerProcess) -> None:
    link = process._link.fileno()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[link]) as child:
        process.stop()
        assert process._process.returncode == 0
        assert child.poll() is None
        child.kill()
    assert process.failure() == ""


def test_a_server_whose_disk_fails_says_why(stderr: int, process: ServerProcess) -> None:
    with TransferQueue.connect(process.address) as queue:
        queue.put({"x": np.zeros(4)})
        assert process.failure() == ""
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 12, 1 << 12))
        with pytest.raises(QueueLostError):
            queue.put({"x": np.zeros(4_000)})
        assert "can't be written: " in process.failure()
        assert "File too large" in process.failure()
    process.stop()
    assert process.failure() in os.read(stderr, 1 << 16).decode()
