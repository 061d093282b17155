"""The run folder: created, locked, written and closed by one process; found again by its name.

runs/2026-11-20-blue-fox/
    run.json        state, versions, seed, how it ended
    config.toml     every setting as run but the name, so that it runs again
    metrics.jsonl   one line a step, evaluation, warm-up step or warning
    spans.jsonl     who was busy with what, and when
    rollouts/       what the model wrote, readable
    checkpoints/    step-000040/ …
    model/          what the recipe built, where it built one
    logs/           what the engines' processes said
    lock            held by the process that writes
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from asyncio import CancelledError
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import Self

from asyncflow.core.causes import disk_reason, first_cause
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import RunFolderError
from asyncflow.core.settings import resolve, to_toml
from asyncflow.core.world import World
from asyncflow.observe.run_names import invent_names
from asyncflow.observe.run_state import RUN_FILE, RunState, State, first_state, read_state, write_state
from asyncflow.workflow.checkpoint_folder import has_checkpoints

CONFIG_FILE = "config.toml"
LOCK_FILE = "lock"
NAMES_TRIED = 1000
MOVED_ASIDE = re.compile(r"\.old-\d+$")


class RunFolder:
    """A run folder that this process may write, until `close` or the end of its `with` block.

    Leaving the block records how the run ended: finished, interrupted, or failed and why.
    `moved_aside` is where an earlier run of this name went that had nothing to go on from.
    """

    moved_aside: Path | None = None

    def __init__(self, path: Path, *, config: RunConfig, state: RunState, world: World, lock: int | None) -> None:
        self.path = path
        self.config = config
        self.state = state
        self._world = world
        self._lock = lock

    @classmethod
    def create(cls, config: RunConfig, *, root: Path, world: World, prompts: str = "") -> Self:
        """A new folder under `root`, named by the configuration or by an invented name.

        `prompts` is the fingerprint of what is trained on. A run of this name that ended before
        its first checkpoint is moved aside. Raises `RunFolderError` when the folder holds any
        other run, or can't be written.
        """
        if config.name:
            check_free(root, config.name, world)
            return cls._claim(root / config.name, config, world, prompts)
        for name in islice(invent_names(world), NAMES_TRIED):
            if not _is_taken(root / name, world):
                return cls._claim(root / name, config.model_copy(update={"name": name}), world, prompts)
        raise RunFolderError(f"{root} holds so many runs of today that no name is left: choose one with --name")

    @classmethod
    def reopen(cls, path: Path, *, world: World, config: RunConfig | None = None) -> Self:
        """The folder of a run that goes on, with its own configuration or a changed one.

        Raises `RunFolderError` when it holds no run or another process runs it.
        """
        state = read_state(path, world.disk)
        lock = _lock(path, world)
        again = dataclasses.replace(
            first_state(state.name, state.recipe, world),
            started_at=state.started_at,
            num_starts=state.num_starts + 1,
            prompts=state.prompts,
        )
        folder = cls(path, config=config or read_config(path), state=again, world=world, lock=lock)
        folder._write()
        return folder

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are published."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Where the output of engine processes goes."""
        return self.path / "logs"

    @property
    def is_resumed(self) -> bool:
        """Whether the run had started before."""
        return self.state.num_starts > 1

    def finish(self, state: State, reason: str = "") -> None:
        """Record how the run ended."""
        self.state = dataclasses.replace(
            self.state, state=state, reason=reason[:4000], ended_at=self._world.wall_clock()
        )
        write_state(self.path, self.state, self._world.disk)

    def close(self) -> None:
        """Let other processes have the folder. May be called twice."""
        lock, self._lock = self._lock, None
        _unlock(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A full disk must not hide the error that ended the run.
        with contextlib.suppress(*[OSError] if error else []):
            if self.state.state == "running":
                self.finish(*_ending(error))
        self.close()

    @classmethod
    def _claim(cls, path: Path, config: RunConfig, world: World, prompts: str) -> Self:
        """Take a folder that `check_free` found free, unless a second process came first."""
        lock = _lock(path, world)
        aside = None
        try:
            if _is_taken(path, world):
                _check_nothing_to_keep(path, world)
                aside = _free_name(path)
                shutil.move(path, aside)  # its lock is still ours, so nobody resumes it meanwhile
                held, lock = lock, _lock(path, world)
                _unlock(held)
                if _is_taken(path, world):
                    raise RunFolderError(f"{path} was just taken by another process")
        except RunFolderError:
            _unlock(lock)
            raise
        state = dataclasses.replace(first_state(path.name, config.recipe, world), prompts=prompts)
        folder = cls(path, config=config, state=state, world=world, lock=lock)
        folder.moved_aside = aside
        folder._write()
        return folder

    def _write(self) -> None:
        unnamed = self.config.model_copy(update={"name": ""})  # with its name, it would not run again
        try:
            self._world.disk.write(self.path / CONFIG_FILE, to_toml(unnamed).encode())
            write_state(self.path, self.state, self._world.disk)
            if self._world.is_real:
                for folder in (self.checkpoints, self.logs, self.path / "rollouts"):
                    folder.mkdir(exist_ok=True)
        except OSError as error:
            self.close()
            raise RunFolderError(f"{self.path} can't be written: {disk_reason(error)}") from error


def check_free(root: Path, name: str, world: World) -> None:
    """Raise `RunFolderError` where a new run cannot have this name."""
    if name.startswith(".") or Path(name).name != name or not name.isprintable():
        raise RunFolderError(f"{name!r} cannot name a run: it must be the name of one folder")
    path = root / name
    if _is_taken(path, world):
        _check_nothing_to_keep(path, world)
        _unlock(_lock(path, world))  # raises where somebody runs it
    elif path.is_dir() and not (path / LOCK_FILE).exists() and any(path.iterdir()):
        raise RunFolderError(f"{path} holds files that are not a run's: choose another name: --name NAME")


def _check_nothing_to_keep(path: Path, world: World) -> None:
    """Raise `RunFolderError` where a run can be continued; under simulation, always."""
    if not world.is_real or has_checkpoints(path / "checkpoints"):
        raise RunFolderError(
            f"{path} already holds a run. Continue it: asyncflow resume {path}; or choose another name: --name NAME"
        )


def _free_name(path: Path) -> Path:
    """Where an earlier run goes: NAME.old-1, or the next such name that is free."""
    names = (path.with_name(f"{path.name}.old-{number}") for number in count(1))
    return next(name for name in names if not name.exists())


def find_run(word: str, root: Path) -> Path:
    """The run folder at this path, or the one under `root` whose name contains the word.

    A run that was moved aside has to be named in full. Raises `RunFolderError`, with the
    candidates, when there is none or more than one.
    """
    for path in (Path(word), root / word):
        if word and (path / RUN_FILE).is_file():
            return path
    runs = list_runs(root)
    if not runs:
        raise RunFolderError(f"there are no runs in {root}{os.sep}. Start one: asyncflow run quickstart")
    found = [run for run in runs if word in run.name]
    if len(found) == 1:
        return found[0]
    some = ", ".join(run.name for run in (found or runs)[:8])
    if found:
        raise RunFolderError(f"{word!r} is part of {len(found)} runs: {some}. Write more of the name")
    raise RunFolderError(f"no run in {root}{os.sep} has {word!r} in its name. The latest: {some}")


def list_runs(root: Path) -> list[Path]:
    """The run folders under `root`, the latest first, without those that were moved aside."""
    runs = [file for file in root.glob(f"*/{RUN_FILE}") if file.is_file() and not MOVED_ASIDE.search(file.parent.name)]
    return [file.parent for file in sorted(runs, key=lambda file: (file.stat().st_mtime, file.parent.name))[::-1]]


def read_config(folder: Path) -> RunConfig:
    """The configuration that a run was started with, and its name. Raises `ConfigError` when it is damaged."""
    return resolve(RunConfig(), file=folder / CONFIG_FILE).model_copy(update={"name": folder.resolve().name})


def _lock(path: Path, world: World) -> int | None:
    """Hold the folder against a second process, `run` or `resume`, that would write to it too.

    The system lets go when this process ends, however it ends. A simulated world has one process.
    """
    try:
        world.disk.append(path / LOCK_FILE, b"")
    except OSError as error:
        raise RunFolderError(f"{path} can't be written: {disk_reason(error)}") from error
    if not world.is_real:
        return None
    descriptor = os.open(path / LOCK_FILE, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RunFolderError(f"{path} is being run by another process{_owner(path, world)}") from None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _owner(path: Path, world: World) -> str:
    try:
        return f" ({read_state(path, world.disk).pid})"
    except RunFolderError:
        return ""


def _is_taken(path: Path, world: World) -> bool:
    try:
        world.disk.read(path / RUN_FILE)
    except FileNotFoundError:
        return False
    return True


def _ending(error: BaseException | None) -> tuple[State, str]:
    if error is None:
        return "finished", ""
    cause = first_cause(error)
    if isinstance(cause, KeyboardInterrupt | CancelledError | SystemExit):
        return "interrupted", ""
    return "failed", f"{type(cause).__name__}: {cause}"
