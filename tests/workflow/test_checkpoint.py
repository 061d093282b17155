"""Checkpoints of a run: saved whole, found again, the ledger read back, the oldest removed."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from asyncflow.core.errors import RunFolderError
from asyncflow.core.types import Ticket
from asyncflow.core.world import World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.engines.scripted import Script, ScriptedTrainer
from asyncflow.workflow import checkpoint
from asyncflow.workflow.checkpoint import EMPTY_LEDGER, LEDGER_FILE, newest_checkpoint, read_ledger, save_checkpoint
from asyncflow.workflow.checkpoint_folder import damage, list_checkpoints

WORLD = World()
LEDGER = LedgerSnapshot(admitted=9, trained=4, dropped={"no signal": 2}, pending=(Ticket(5), Ticket(7), Ticket(8)))


async def save(run: Path, step: int, *, ledger: LedgerSnapshot = LEDGER, keep: int = 2) -> Path:
    trainer = ScriptedTrainer(world=WORLD, script=Script(), step=step)
    return await save_checkpoint(run / "checkpoints", trainer, step, ledger, keep, WORLD)


async def test_what_is_saved_is_found_and_read_back(tmp_path: Path) -> None:
    folder = await save(tmp_path, 40)
    assert newest_checkpoint(tmp_path) == folder == tmp_path / "checkpoints" / "step-000040"
    assert damage(folder) == []
    assert read_ledger(folder, WORLD) == LEDGER
    trainer = ScriptedTrainer(world=WORLD, script=Script())
    await trainer.load(folder)
    assert trainer.version.step == 40


async def test_the_empty_ledger_is_read_back_too(tmp_path: Path) -> None:
    assert read_ledger(await save(tmp_path, 0, ledger=EMPTY_LEDGER), WORLD) == EMPTY_LEDGER


async def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        await save(tmp_path, step, keep=3)
    kept = [folder.name for folder in list_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["step-000004", "step-000006", "step-000008"]


class FilledUpError(Exception):
    """Something that no disk says."""


async def test_a_trainer_that_fails_to_save_leaves_the_older_checkpoint_the_newest(tmp_path: Path) -> None:
    class Full(ScriptedTrainer):
        async def save(self, folder: Path) -> None:
            (folder / "weights").write_bytes(b"half")
            raise FilledUpError("a bug, not the disk")

    older = await save(tmp_path, 2)
    trainer = Full(world=WORLD, script=Script(), step=4)
    with pytest.raises(FilledUpError, match="bug"):
        await save_checkpoint(tmp_path / "checkpoints", trainer, 4, LEDGER, 2, WORLD)
    assert newest_checkpoint(tmp_path) == older
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == [older.name]


class SerializationError(Exception):
    """As libraries raise that are not written in Python: not an `OSError`."""


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SerializationError("I/O error: No space left (os error 28)")]
)
async def test_a_full_disk_is_said_in_one_sentence_and_leaves_no_draft(tmp_path: Path, error: Exception) -> None:
    class Full(ScriptedTrainer):
        async def save(self, folder: Path) -> None:
            (folder / "weights").write_bytes(b"half")
            raise error

    older = await save(tmp_path / "blue-fox", 2)
    said = r"the checkpoint of step 4 could not be written: no space .* free some.* asyncflow resume \S*/blue-fox$"
    with pytest.raises(RunFolderError, match=said) as caught:
        await save_checkpoint(older.parent, Full(world=WORLD, script=Script(), step=4), 4, LEDGER, 2, WORLD)
    assert caught.value.__cause__ is error
    assert list(older.parent.iterdir()) == [older]


@pytest.mark.parametrize("place", ["begin_draft", "publish"])
async def test_a_cancelled_save_leaves_a_whole_checkpoint_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The thread that writes can't be stopped; its files must not be removed while it publishes them."""
    begun, release, real = threading.Event(), threading.Event(), getattr(checkpoint, place)

    def slow(*arguments: object) -> object:
        begun.set()
        release.wait(30)
        return real(*arguments)

    older = await save(tmp_path, 2)
    monkeypatch.setattr(checkpoint, place, slow)
    async with asyncio.TaskGroup() as group:
        saving = group.create_task(save(tmp_path, 4), name="save")
        await asyncio.to_thread(begun.wait, 30)
        saving.cancel()
        await asyncio.sleep(0.05)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await saving
    names = {folder.name for folder in older.parent.iterdir()}
    assert names == ({older.name} if place == "begin_draft" else {older.name, "step-000004"})
    assert [damage(folder) for folder in list_checkpoints(older.parent)] == [[]] * len(names)


async def test_going_back_from_a_damaged_checkpoint_never_costs_the_good_one(tmp_path: Path) -> None:
    good, damaged = await save(tmp_path, 10), await save(tmp_path, 20)
    (damaged / LEDGER_FILE).write_bytes(b"")
    assert newest_checkpoint(tmp_path) == good
    newer = await save(tmp_path, 11)  # the damaged one is still in its place
    assert newest_checkpoint(tmp_path) == newer
    assert good in list_checkpoints(tmp_path / "checkpoints")


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=rf"holds no checkpoint.* asyncflow resume {tmp_path}$"):
        newest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"admitted": 9}', b'{"admitted":"9","trained":0,"dropped":{},"pending":[]}', b"\xff"],
)
async def test_a_damaged_ledger_is_never_read_as_another(tmp_path: Path, content: bytes) -> None:
    folder = await save(tmp_path, 2)
    (folder / LEDGER_FILE).write_bytes(content)
    with pytest.raises(RunFolderError, match=r"step-000002 has no readable ledger\.json"):
        read_ledger(folder, WORLD)
    with pytest.raises(RunFolderError, match="every one of them is damaged"):  # the manifest shows it first
        newest_checkpoint(tmp_path)


async def test_a_missing_ledger_is_an_error(tmp_path: Path) -> None:
    folder = await save(tmp_path, 2)
    (folder / LEDGER_FILE).unlink()
    with pytest.raises(RunFolderError, match="has no readable ledger"):
        read_ledger(folder, WORLD)
