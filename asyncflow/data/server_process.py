"""A queue's server as a process, seen from its owner: started, and stopped. It runs `asyncflow.data.serve`."""

from __future__ import annotations

import select
import socket
import struct
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

import msgspec

from asyncflow.core.errors import QueueLostError, RunFolderError
from asyncflow.core.world import World
from asyncflow.data.gate import Gate
from asyncflow.data.log import LogMode

START_LIMIT_S = 30.0
STOP_LIMIT_S = 5.0
MAX_LINE_BYTES = 1 << 20
STDERR_FD = 2


class Peer(NamedTuple):
    """The process at the other end of a local socket, as the system says."""

    pid: int
    user: int


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a server is started with. `log` is a folder, or empty."""

    tasks: Mapping[str, tuple[str, ...]]
    trains: str = ""
    gate: Gate | None = None
    log: str = ""
    log_mode: LogMode = LogMode.OFF


class Started(msgspec.Struct, frozen=True, kw_only=True):
    """What the server says first: where it is, or why it is not."""

    address: str = ""
    error: str = ""


class ServerProcess:
    """A running server; its owner stops it."""

    def __init__(self, process: subprocess.Popen[bytes], link: socket.socket, address: str) -> None:
        self.address = address
        self._process = process
        self._link = link
        self._failure = ""

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def failure(self) -> str:
        """Why it ended by itself, where it said so; empty while it serves."""
        try:
            line = read_line(self._link) if select.select([self._link], [], [], 0)[0] else b""
            self._failure = self._failure or (msgspec.json.decode(line, type=Started).error if line else "")
        except (OSError, ValueError, msgspec.MsgspecError):  # it ended without a word, or is closed here
            pass
        return self._failure

    def stop(self) -> None:
        """End it, and wait until it has ended. May be called twice."""
        self.failure()
        with suppress(OSError):  # a child that was forked here has the link too: closed here, it would stay open
            self._link.shutdown(socket.SHUT_RDWR)
        self._link.close()
        try:
            self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_LIMIT_S)


def start_server(settings: ServerSettings, world: World) -> ServerProcess:
    """Start a server. Raises `QueueLostError` when it does not come up, with what it said."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = world.start_python(
            "asyncflow.data.serve",
            [str(theirs.fileno())],
            environment={},
            pass_fds=[theirs.fileno()],
            stderr=STDERR_FD,
        )
    ours.settimeout(START_LIMIT_S)
    try:
        ours.sendall(msgspec.json.encode(settings) + b"\n")
        started = msgspec.json.decode(read_line(ours), type=Started)
        if started.error:
            raise RunFolderError(started.error)
    except (OSError, msgspec.MsgspecError) as error:
        process.kill()
        process.wait()
        raise QueueLostError(f"the transfer queue's server did not come up: {error}") from error
    except BaseException:
        process.kill()
        process.wait()
        raise
    return ServerProcess(process, ours, started.address)


def read_line(link: socket.socket) -> bytes:
    """One line from the other side. Raises `OSError` when it ends before."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
        data = link.recv(1 << 16)
        if not data:
            raise OSError("it ended before it could serve")
        line += data
    return line


def peer(connection: socket.socket) -> Peer:
    """The process that connected."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, user, _ = struct.unpack("3i", data)
    return Peer(pid, user)
