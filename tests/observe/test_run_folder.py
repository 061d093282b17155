"""The run folder: who may write it, how it ends, and how it is found."""

from __future__ import annotations

import asyncio
import itertools
import os
from pathlib import Path

import pytest

from asyncflow.core.config import RunConfig
from asyncflow.core.errors import EngineLostError, RolloutError, RunFolderError
from asyncflow.core.settings import resolve
from asyncflow.core.world import MemoryDisk, RealDisk, World
from asyncflow.observe.run_folder import CONFIG_FILE, RunFolder, check_free, find_run, list_runs, read_config
from asyncflow.observe.run_names import invent_names
from asyncflow.observe.run_state import RUN_FILE, RunState, read_state
from asyncflow.workflow.checkpoint_folder import begin_draft, publish

CONFIG = RunConfig(recipe="quickstart", name="one", seed=3)


def create(root: Path, name: str = "one") -> RunFolder:
    return RunFolder.create(CONFIG.model_copy(update={"name": name}), root=root, world=World(seed=3))


def state_of(folder: Path) -> RunState:
    return read_state(folder, RealDisk())


def test_a_new_folder_holds_the_configuration_and_a_running_state(tmp_path: Path) -> None:
    with create(tmp_path) as folder:
        state = state_of(folder.path)
        assert (state.name, state.recipe, state.seed, state.state) == ("one", "quickstart", 3, "running")
        assert state.pid == os.getpid()
        assert {"asyncflow", "python", "numpy"} <= set(state.versions)
        assert read_config(folder.path) == folder.config
        assert folder.checkpoints.is_dir()
        assert folder.logs.is_dir()


def test_names_are_invented_and_equal_for_equal_worlds() -> None:
    world = World(seed=3, is_real=False, disk=MemoryDisk())
    names = list(itertools.islice(invent_names(world), 3))
    assert names == list(itertools.islice(invent_names(world), 3))
    assert names[0] != next(invent_names(World(seed=4, is_real=False)))
    assert names[0].startswith("2000-01-01-")
    unnamed = RunConfig()
    runs = [RunFolder.create(unnamed, root=Path("runs"), world=world) for _ in range(3)]
    assert [run.name for run in runs] == names
    assert [run.config.name for run in runs] == names


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (KeyboardInterrupt(), "interrupted", ""),
        (asyncio.CancelledError(), "interrupted", ""),
        (EngineLostError("gone"), "failed", "EngineLostError: gone"),
        (ExceptionGroup("tasks", [RolloutError("x"), ValueError("bad")]), "failed", "ValueError: bad"),
    ],
)
def test_the_end_of_a_run_is_recorded(tmp_path: Path, error: BaseException | None, state: str, reason: str) -> None:
    folder = create(tmp_path)
    folder.__exit__(type(error) if error else None, error, None)
    ended = state_of(folder.path)
    assert (ended.state, ended.reason) == (state, reason)
    assert ended.ended_at is not None


def test_a_second_run_of_that_name_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with create(tmp_path) as folder:
        begin_draft(folder.checkpoints, 2)
        publish(begin_draft(folder.checkpoints, 0), RealDisk())
    with pytest.raises(
        RunFolderError, match=r"already holds a run\. Continue it: asyncflow resume \S*/one; or .* --name"
    ):
        create(tmp_path)


def test_a_run_that_came_to_no_checkpoint_makes_room_and_is_kept(tmp_path: Path) -> None:
    for number in (1, 2):
        with create(tmp_path) as folder:
            begin_draft(folder.checkpoints, 0)
            (folder.path / "note").write_text(f"attempt {number}")
            with pytest.raises(RunFolderError, match="is being run by another process"):
                create(tmp_path)
    with create(tmp_path) as third:
        assert third.moved_aside == tmp_path / "one.old-2"
        assert not (third.path / "note").exists()
        with pytest.raises(RunFolderError, match="is being run by another process"):  # the new lock holds
            RunFolder.reopen(third.path, world=World())
    assert [(tmp_path / f"one.old-{number}" / "note").read_text() for number in (1, 2)] == ["attempt 1", "attempt 2"]
    assert find_run("on", tmp_path) == tmp_path / "one"
    assert find_run("one.old-1", tmp_path) == tmp_path / "one.old-1"
    assert list_runs(tmp_path) == [tmp_path / "one"]


def test_the_file_in_the_folder_runs_again_with_and_without_a_name(tmp_path: Path) -> None:
    for name in ("", "one"):
        with create(tmp_path, name) as folder:
            publish(begin_draft(folder.checkpoints, 0), RealDisk())
        again = resolve(RunConfig(), file=folder.path / CONFIG_FILE)
        with RunFolder.create(again, root=tmp_path, world=World(seed=again.seed)) as second:
            assert second.path != folder.path
            assert second.moved_aside is None
            publish(begin_draft(second.checkpoints, 0), RealDisk())
        assert read_config(folder.path) == folder.config
        assert state_of(folder.path).name == folder.path.name


def test_the_prompts_that_a_run_began_with_are_remembered_through_a_resume(tmp_path: Path) -> None:
    with RunFolder.create(CONFIG, root=tmp_path, world=World(), prompts="abc") as folder:
        pass
    with RunFolder.reopen(folder.path, world=World()) as again:
        assert again.state.prompts == state_of(folder.path).prompts == "abc"


def test_foreign_files_and_names_that_are_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "code.py").touch()
    with pytest.raises(RunFolderError, match="holds files that are not a run's"):
        create(tmp_path, "src")
    for name in ("../one", "a/b", "..", "/tmp", ".hidden", "red\x1b[31m"):
        with pytest.raises(RunFolderError, match="cannot name a run"):
            create(tmp_path, name)
        with pytest.raises(RunFolderError, match="cannot name a run"):
            check_free(tmp_path, name, World())


def test_a_folder_has_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = create(tmp_path)
    with pytest.raises(RunFolderError, match=rf"is being run by another process \({os.getpid()}\)"):
        RunFolder.reopen(folder.path, world=World())
    folder.close()
    with RunFolder.reopen(folder.path, world=World(seed=3)) as again:
        assert again.is_resumed
        assert again.state.num_starts == 2
        assert again.state.started_at == folder.state.started_at
        assert state_of(folder.path).state == "running"
    assert state_of(folder.path).state == "finished"


def test_a_run_goes_on_with_a_changed_configuration(tmp_path: Path) -> None:
    with create(tmp_path) as folder:
        pass
    changed = folder.config.model_copy(update={"steps": 99})
    with RunFolder.reopen(folder.path, world=World(seed=3), config=changed):
        assert read_config(folder.path).steps == 99


def test_environment_values_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_write_me")
    with create(tmp_path) as folder:
        pass
    assert all(b"hf_do_not_write_me" not in file.read_bytes() for file in folder.path.rglob("*") if file.is_file())


def test_runs_are_found_by_path_by_name_and_by_a_unique_part(tmp_path: Path) -> None:
    for name in ("2026-01-01-blue-fox", "2026-01-01-blue-fox-two", "2026-01-03-red-owl"):
        create(tmp_path, name).close()
    assert find_run("red", tmp_path).name == "2026-01-03-red-owl"
    assert find_run("2026-01-01-blue-fox", tmp_path).name == "2026-01-01-blue-fox"
    assert find_run(str(tmp_path / "2026-01-03-red-owl"), Path("elsewhere")).name == "2026-01-03-red-owl"
    with pytest.raises(RunFolderError, match=r"'blue' is part of 2 runs: .*two.*\. Write more"):
        find_run("blue", tmp_path)
    with pytest.raises(RunFolderError, match=r"no run in .* has 'gnu' in its name\. The latest: 2026"):
        find_run("gnu", tmp_path)
    with pytest.raises(RunFolderError, match="there are no runs"):
        find_run("gnu", tmp_path / "none")
    assert len(list_runs(tmp_path)) == 3


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        read_state(tmp_path, RealDisk())
    (tmp_path / RUN_FILE).write_text('{"name": 3}')
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        read_state(tmp_path, RealDisk())


def test_a_full_disk_does_not_hide_the_error_that_ended_the_run(tmp_path: Path) -> None:
    class FullDisk(RealDisk):
        is_full = False

        def write(self, path: Path, data: bytes) -> None:
            if self.is_full:
                raise OSError(28, "No space left on device")
            super().write(path, data)

    disk = FullDisk()
    folder = RunFolder.create(CONFIG, root=tmp_path, world=World(disk=disk))
    disk.is_full = True
    folder.__exit__(ValueError, ValueError("the first"), None)
    with pytest.raises(OSError, match="No space left"):
        folder.finish("finished")
    RunFolder.reopen(folder.path, world=World()).close()  # and the lock was let go


def test_a_full_disk_is_said_in_one_sentence(tmp_path: Path) -> None:
    class FullDisk(RealDisk):
        def write(self, path: Path, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    create(tmp_path).close()
    with pytest.raises(RunFolderError, match=r"one can't be written: no space is left on the disk: free some"):
        RunFolder.reopen(tmp_path / "one", world=World(disk=FullDisk()))
    with pytest.raises(RunFolderError, match=r"two can't be written: no space"):
        RunFolder.create(CONFIG.model_copy(update={"name": "two"}), root=tmp_path, world=World(disk=FullDisk()))
    RunFolder.reopen(tmp_path / "one", world=World()).close()  # and the lock was let go
