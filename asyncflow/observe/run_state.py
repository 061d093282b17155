"""`run.json`: what a run is, what it ran with, and how it ended.

Only what is listed here is written: never the environment, which holds secrets.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

import asyncflow
from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import Disk, World

State = Literal["running", "finished", "failed", "interrupted"]

RUN_FILE = "run.json"
PACKAGES = ("torch", "numpy", "transformers", "vllm", "ray")
"""Packages whose versions decide what a run computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The content of `run.json`. A run that says `running` without a live process crashed.

    `reason` is the error that ended a failed run. `num_starts` counts the first start and
    every resume. `prompts` is the fingerprint of what is trained on and held out; empty where
    nobody gave one.
    """

    name: str
    recipe: str
    seed: int
    state: State
    started_at: datetime
    ended_at: datetime | None = None
    reason: str = ""
    pid: int
    num_starts: int = 1
    prompts: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def first_state(name: str, recipe: str, world: World) -> RunState:
    """The state of a run that starts now, in this process."""
    return RunState(
        name=name,
        recipe=recipe,
        seed=world.seed,
        state="running",
        started_at=world.wall_clock(),
        pid=os.getpid(),
        versions=installed_versions(),
    )


def installed_versions() -> dict[str, str]:
    """Versions of Python, asyncflow and what a run depends on; read without importing them."""
    versions = {"asyncflow": asyncflow.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read_state(folder: Path, disk: Disk) -> RunState:
    """The state of the run in a folder. Raises `RunFolderError` when it holds none."""
    try:
        return msgspec.json.decode(disk.read(folder / RUN_FILE), type=RunState)
    except FileNotFoundError:
        raise RunFolderError(f"{folder} is not a run folder: it has no {RUN_FILE}") from None
    except msgspec.DecodeError as error:
        raise RunFolderError(f"{folder / RUN_FILE} is damaged: {error}") from None


def write_state(folder: Path, state: RunState, disk: Disk) -> None:
    """Replace `run.json`, durably."""
    disk.write(folder / RUN_FILE, msgspec.json.format(msgspec.json.encode(state)) + b"\n")
