"""Checkpoint folders: drafted, made durable, published by one rename, verified when read.

Invariant: a folder named `step-000040` was complete and on the disk, with a manifest of
hashes, before it had that name. What a crash leaves is a draft, which nobody loads; what a
disk damages later, the manifest shows.

These calls hash and flush whole checkpoints: run them off the event loop.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import Disk, sync_folder

MANIFEST = "manifest.json"
_PUBLISHED = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """What a file of a checkpoint must be: its size and the BLAKE2b hash of its bytes."""

    num_bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All files of a checkpoint, by their path inside it."""

    step: int
    files: Mapping[str, FileEntry]


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after this many optimizer steps.

    >>> checkpoint_name(40)
    'step-000040'
    """
    return f"step-{step:06d}"


def checkpoint_step(folder: Path) -> int | None:
    """Optimizer steps of a published checkpoint, by its name; None for drafts and other folders."""
    match = _PUBLISHED.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(checkpoints: Path) -> list[Path]:
    """The published checkpoints, oldest first; not verified."""
    if not checkpoints.is_dir():
        return []
    found = [(step, folder) for folder in checkpoints.iterdir() if (step := checkpoint_step(folder)) is not None]
    return [folder for _, folder in sorted(found)]


def has_checkpoints(checkpoints: Path) -> bool:
    """Whether anything was ever published here, damaged or not."""
    return any(folder.suffix != ".draft" for folder in checkpoints.glob("step-*"))


def draft_of(checkpoints: Path, step: int) -> Path:
    """The folder that a checkpoint is written into before it has its name."""
    return checkpoints / f"{checkpoint_name(step)}.draft"


def begin_draft(checkpoints: Path, step: int) -> Path:
    """An empty folder to write the checkpoint into; what a crash left there is removed."""
    draft = draft_of(checkpoints, step)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def publish(draft: Path, disk: Disk) -> Path:
    """Make a draft durable and give it its name; the published folder.

    A checkpoint of the same step is replaced: a run only comes back to a step whose
    checkpoint it could not load.
    """
    target = draft.with_name(draft.name.removesuffix(".draft"))
    step = checkpoint_step(target)
    if step is None:
        raise RunFolderError(f"{draft} is not the draft of a checkpoint: expected a name such as step-000040.draft")
    _sync(draft)
    files = {str(path.relative_to(draft)): _entry(path) for path in _files(draft)}
    disk.write(draft / MANIFEST, msgspec.json.format(msgspec.json.encode(Manifest(step=step, files=files))))
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    sync_folder(target.parent)
    return target


def damage(folder: Path) -> list[str]:
    """What is wrong with a published checkpoint, one sentence each; empty when it is whole."""
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as error:
        return [f"{folder / MANIFEST}: cannot be read: {error}"]
    return [
        f"{folder / name}: {reason}"
        for name, expected in manifest.files.items()
        if (reason := _difference(folder / name, expected))
    ]


def newest_valid(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; None when there is none."""
    return next((folder for folder in reversed(list_checkpoints(checkpoints)) if not damage(folder)), None)


def set_aside_newer(checkpoints: Path, than: Path) -> list[str]:
    """Rename damaged checkpoints newer than `than` to `step-000040.damaged`; one sentence for each.

    A run that goes back to an older checkpoint will come to their steps again.
    """
    told = []
    for folder in list_checkpoints(checkpoints):
        if (checkpoint_step(folder) or 0) > (checkpoint_step(than) or 0) and (reasons := damage(folder)):
            aside = folder.with_name(f"{folder.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            told.append(f"the checkpoint {folder.name} is damaged and was set aside as {aside.name}: {reasons[0]}")
    return told


def prune(newest: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` >= 1 checkpoints up to `newest`, and every draft.

    `newest` was just published, so it is whole; checkpoints with a higher step are of a future
    that the run went back from, and do not count. Call it when no draft is being written.
    """
    found = list_checkpoints(newest.parent)
    older = found[: found.index(newest) + 1]
    for folder in [*older[:-keep], *newest.parent.glob("step-*.draft")]:
        shutil.rmtree(folder)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(num_bytes=path.stat().st_size, blake2b=hashlib.file_digest(file, "blake2b").hexdigest())


def _difference(path: Path, expected: FileEntry) -> str:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected.num_bytes:
        return f"has {path.stat().st_size} bytes, expected {expected.num_bytes}"
    return "" if _entry(path) == expected else "its content changed after it was written"


def _sync(folder: Path) -> None:
    """Flush every file and folder of a draft, so that the rename can not be durable before they are."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
