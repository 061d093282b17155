"""Checkpoint folders through crashes and damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import RealDisk
from asyncflow.workflow.checkpoint_folder import (
    MANIFEST,
    begin_draft,
    checkpoint_step,
    damage,
    list_checkpoints,
    newest_valid,
    prune,
    publish,
    set_aside_newer,
)


def save(checkpoints: Path, step: int, content: bytes = b"weights") -> Path:
    draft = begin_draft(checkpoints, step)
    (draft / "optimizer").mkdir()
    (draft / "optimizer" / "state").write_bytes(content)
    (draft / "model").write_bytes(content * 2)
    return publish(draft, RealDisk())


def test_a_published_checkpoint_is_whole_and_named_by_its_step(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 40)
    assert folder.name == "step-000040"
    assert checkpoint_step(folder) == 40
    assert damage(folder) == []
    assert newest_valid(tmp_path / "checkpoints") == folder


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest_valid(tmp_path / "checkpoints") is None


def test_a_draft_is_never_found(tmp_path: Path) -> None:
    older = save(tmp_path, 10)
    draft = begin_draft(tmp_path, 20)
    (draft / "model").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == [older]
    assert list(begin_draft(tmp_path, 20).iterdir()) == []  # what the crash left is gone


@pytest.mark.parametrize("spoil", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(tmp_path: Path, spoil: str) -> None:
    older, newer = save(tmp_path, 10), save(tmp_path, 20)
    match spoil:
        case "flip":
            (newer / "model").write_bytes(b"weightsweightt")
        case "cut":
            (newer / "optimizer" / "state").write_bytes(b"weigh")
        case "remove":
            (newer / "model").unlink()
        case "manifest":
            (newer / MANIFEST).write_bytes((newer / MANIFEST).read_bytes()[:-20])
    assert len(damage(newer)) == 1
    assert newest_valid(tmp_path) == older


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 10, b"old")
    assert (save(tmp_path, 10, b"new") / "model").read_bytes() == b"newnew"


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 5):
        save(tmp_path, step)
    begin_draft(tmp_path, 7)
    prune(tmp_path / "step-1000000", keep=2)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    prune(tmp_path / "step-1000000", keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-1000000"]


def test_checkpoints_newer_than_the_one_just_published_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (10, 20, 30, 11):
        save(tmp_path, step)
    prune(tmp_path / "step-000011", keep=1)
    assert [checkpoint_step(folder) for folder in list_checkpoints(tmp_path)] == [11, 20, 30]


def test_damaged_checkpoints_are_set_aside_and_whole_ones_are_not(tmp_path: Path) -> None:
    folders = {step: save(tmp_path, step) for step in (10, 20, 30)}
    (folders[30] / "model").write_bytes(b"weightsweightt")
    (folders[10] / "model").write_bytes(b"")  # older: not in the way
    [told] = set_aside_newer(tmp_path, folders[20])
    assert told.startswith("the checkpoint step-000030 is damaged and was set aside as step-000030.damaged: ")
    assert told.endswith("its content changed after it was written")
    assert list_checkpoints(tmp_path) == [folders[10], folders[20]]
    assert (tmp_path / "step-000030.damaged" / "model").is_file()
    assert set_aside_newer(tmp_path, folders[20]) == []
    assert set_aside_newer(tmp_path, folders[10]) == []  # newer and whole


def test_only_drafts_are_published(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not the draft of a checkpoint"):
        publish(tmp_path, RealDisk())
