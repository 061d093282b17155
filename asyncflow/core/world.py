"""The world outside: time, randomness, disk and process start come from one object.

Nothing else in the package reads a clock, draws a random number, opens a file for writing
or starts a process (a test enforces it). That is what lets one program run for real, under
simulation and under fault injection.

The event loop is the clock: `now_s` is the running loop's time, so a virtual-time loop
(`asyncflow.plan.virtual`) moves it, and `asyncio.sleep` needs no substitute.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from asyncflow.core.threads import DaemonThreads, outlast

ResultT = TypeVar("ResultT")


FOREIGN_THREADS = 16
"""Calls of `run_foreign` at once; one that never returns takes its place for good."""


def derive_seed(*keys: int | str) -> int:
    """A 63-bit seed that depends on every key and on their order.

    >>> derive_seed(7, "rollout", 3) == derive_seed(7, "rollout", 3)
    True
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Disk(Protocol):
    """The files a run writes. Paths are real `Path`s; whether they exist is the disk's affair."""

    def write(self, path: Path, data: bytes) -> None:
        """Replace the file: readers see the old or the new content, also after a crash."""
        ...

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of the file and hand it to the operating system."""
        ...

    def read(self, path: Path) -> bytes:
        """The whole file. Raises `FileNotFoundError`."""
        ...


class RealDisk:
    """The file system of this machine."""

    def write(self, path: Path, data: bytes) -> None:
        """Write beside the file, flush to the disk, rename over it, flush the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".draft")
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        sync_folder(path.parent)

    def append(self, path: Path, data: bytes) -> None:
        """Append in one write, so that lines of several writers do not mix."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as file:
            file.write(data)

    def read(self, path: Path) -> bytes:
        """The whole file."""
        return path.read_bytes()


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class MemoryDisk:
    """A disk for simulated runs: a dictionary."""

    def __init__(self) -> None:
        self.files: dict[Path, bytes] = {}

    def write(self, path: Path, data: bytes) -> None:
        """Replace the file."""
        self.files[path] = data

    def append(self, path: Path, data: bytes) -> None:
        """Add to the end of the file."""
        self.files[path] = self.files.get(path, b"") + data

    def read(self, path: Path) -> bytes:
        """The whole file."""
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One run's access to the outside. `seed` is the run's."""

    seed: int = 7
    disk: Disk = field(default_factory=RealDisk)
    is_real: bool = True
    _foreign: DaemonThreads = field(
        default_factory=lambda: DaemonThreads(name="asyncflow-foreign", max_threads=FOREIGN_THREADS),
        init=False,
        repr=False,
        compare=False,
    )

    @staticmethod
    def now_s() -> float:
        """Monotonic seconds of the running event loop; virtual under simulation."""
        return asyncio.get_running_loop().time()

    def wall_clock(self) -> datetime:
        """Date and time for people, in UTC; never used to measure. Fixed under simulation."""
        return datetime.now(UTC) if self.is_real else datetime(2000, 1, 1, tzinfo=UTC)

    def rng(self, *keys: int | str) -> np.random.Generator:
        """A generator of its own for every purpose, so that actors do not disturb each other."""
        return np.random.default_rng(derive_seed(self.seed, *keys))

    async def run_blocking(self, call: Callable[[], ResultT]) -> ResultT:
        """Run a call of ours that takes over 5 ms off the event loop; inline under simulation.

        When the awaited call is over, also by cancellation, no thread is working on it.
        """
        if not self.is_real:
            return call()
        return await outlast(asyncio.get_running_loop().run_in_executor(None, call))

    async def run_foreign(self, call: Callable[[], ResultT]) -> ResultT:
        """Run a call whose duration we can't know off the event loop: code of users. Inline under simulation.

        It has threads of its own, so that it holds up no work of ours, and the process does
        not wait for it when it ends. Give it a time limit: a call that is cancelled is abandoned.
        """
        return await self._foreign.run(call) if self.is_real else call()

    @staticmethod
    def start_python(
        module: str, arguments: Sequence[str], *, environment: dict[str, str], pass_fds: Sequence[int], stderr: int
    ) -> subprocess.Popen[bytes]:
        """Start `python -P -m MODULE ARGUMENTS` in a session of its own, so that Ctrl-C reaches only us.

        With -P the working folder is no place to import from: a `queue.py` that lies there would
        be taken for Python's own. Installed packages and `PYTHONPATH` are found as ever.
        """
        return subprocess.Popen(
            [sys.executable, "-P", "-m", module, *arguments],
            env=os.environ | environment,
            pass_fds=tuple(pass_fds),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
        )
