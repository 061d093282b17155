"""A child process that can't be lost: its end is an event, its last words are kept, it is always reaped.

The child and its owner talk over a Unix socket pair. Nothing here is a task: the event loop
calls back when bytes arrive and, through a pidfd, when the process ends, so that waiting
takes neither a thread nor polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

from asyncflow.core.errors import EngineLostError
from asyncflow.core.world import World
from asyncflow.engines.rollout.messages import Frames, FromWorker, ToWorker, encode

TERMINATE_LIMIT_S = 2.0
KILL_LIMIT_S = 5.0
ORPHAN_LIMIT_S = 0.5
"""How long a process may live on after it has closed its end of the connection."""
LAST_WORDS_BYTES = 2000
LAST_WORDS_LINES = 12


class Connection(asyncio.Protocol):  # asyncio demands the base class
    """The owner's end. Messages sent in one turn of the event loop travel in one frame."""

    def __init__(
        self,
        on_message: Callable[[FromWorker], None],
        on_damage: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._on_message = on_message
        self._on_damage = on_damage
        self._on_closed = on_closed
        self._frames = Frames.from_worker()
        self._outbox: list[ToWorker] = []
        self._transport: asyncio.WriteTransport | None = None

    def send(self, message: ToWorker) -> None:
        """Send soon; forgotten when the connection is closed."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def close(self) -> None:
        """Close this end. May be called twice."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop. What follows a damaged frame can't be read either, so the connection ends."""
        try:
            for message in self._frames.feed(data):
                self._on_message(message)
        except EngineLostError as error:
            self._on_damage(str(error))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._transport = None
        self._on_closed()

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(messages))


class ChildProcess:
    """A running child. `on_exit` is told once, when it has ended and is reaped, how it ended and its last words."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, on_exit: Callable[[str], None]) -> None:
        self._process = process
        self._log = log
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._exited = asyncio.Event()
        self._offence = ""
        self._pidfd = os.pidfd_open(process.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def condemn(self, offence: str) -> None:
        """Kill it for what it did, which its obituary will say."""
        if not self._exited.is_set():
            self._offence = self._offence or offence
            self._process.kill()

    def kernel_state(self) -> str:
        """What the kernel says it does, such as `T (stopped)`."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("State:"):
                    return line.removeprefix("State:").strip()
        return "unknown"

    def expect_exit(self) -> None:
        """It has hung up, so it should end now: kill it if it does not."""
        if not self._exited.is_set():
            self._loop.call_later(ORPHAN_LIMIT_S, self._kill)

    def _obituary(self) -> str:
        code = self._process.returncode
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        if self._offence:
            how = f"{self._offence} and was killed"
        words = last_words(self._log)
        return f"process {self.pid} {how}" + (f"; the end of {self._log}:\n{words}" if words else "")

    async def stop(self, grace_s: float) -> None:
        """Wait until it ends by itself, then terminate, then kill it. It is reaped even if this is cancelled."""
        try:
            if not await self._ends_within(grace_s):
                self._process.terminate()
                await self._ends_within(TERMINATE_LIMIT_S)
        finally:
            self._kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: nothing can end it
                self._process.wait(KILL_LIMIT_S)
            self._reap()

    async def _ends_within(self, limit_s: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._exited.wait()
        return self._exited.is_set()

    def _kill(self) -> None:
        if not self._exited.is_set():
            self._process.kill()

    def _reap(self) -> None:
        if not self._exited.is_set():
            self._process.poll()
            self._exited.set()
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._on_exit(self._obituary())


async def start_child(
    world: World,
    module: str,
    *,
    environment: Mapping[str, str],
    pass_fds: Sequence[int],
    log: Path,
    connection: Connection,
    on_exit: Callable[[str], None],
) -> ChildProcess:
    """Run `python -m MODULE SOCKET_FD PARENT_PID` with its output in `log`, connected to `connection`.

    The process is started by the calling thread, because the kernel ends it with that thread.
    """
    ours, theirs = socket.socketpair()
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        arguments = [str(theirs.fileno()), str(os.getpid())]
        fds = [theirs.fileno(), *pass_fds]
        process = world.start_python(module, arguments, environment=dict(environment), pass_fds=fds, stderr=output)
    finally:
        os.close(output)
        theirs.close()
    child = ChildProcess(process, log, on_exit)
    try:
        await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=ours)
    except BaseException:
        await child.stop(0)
        raise
    return child


def last_words(log: Path) -> str:
    """The last lines of a log; empty without one."""
    try:
        data = log.read_bytes()[-LAST_WORDS_BYTES:]
    except FileNotFoundError:
        return ""
    return "\n".join(data.decode(errors="replace").splitlines()[-LAST_WORDS_LINES:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
