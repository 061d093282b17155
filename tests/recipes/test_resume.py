"""Going on with real runs of a tiny recipe: what a resume keeps, refuses, sets aside and begins again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

from asyncflow.core.errors import ConfigError
from asyncflow.core.world import RealDisk, World
from asyncflow.data.audit import audit_log
from asyncflow.observe.records import Metric, read_metrics, read_rollouts
from asyncflow.observe.run_folder import read_config
from asyncflow.observe.run_state import read_state
from asyncflow.recipes import runner
from asyncflow.recipes.recipe import load_recipe
from asyncflow.workflow.checkpoint import newest_checkpoint, read_ledger
from asyncflow.workflow.checkpoint_folder import damage
from tests.recipes.copying import quiet, run_recipe, write_recipe

pytestmark = pytest.mark.slow

GROUPS = 4


def of_kind(metrics: list[Metric], kind: str) -> list[Metric]:
    return [metric for metric in metrics if metric.kind == kind]


def test_a_resumed_run_trains_no_ticket_twice(copied: Path) -> None:
    shutil.rmtree(copied / "checkpoints" / "step-000003")  # as if the run had died in its third step
    before = read_ledger(newest_checkpoint(copied), World())
    first_part = read_rollouts(copied)
    summary = runner.resume(copied, ["steps=5", "train.learning_rate=1e-3"], quiet())
    assert summary.steps == 5
    after = read_ledger(newest_checkpoint(copied), World())
    assert (before.trained, after.trained) == (2 * GROUPS, 5 * GROUPS)
    assert after.admitted == after.trained + sum(after.dropped.values()) + len(after.pending)
    second_part = {rollout.ticket for rollout in read_rollouts(copied)[len(first_part) :]}
    assert second_part == set(range(after.admitted)) - {
        rollout.ticket for rollout in first_part
    }  # step 3 is in the log
    steps = [metric.values["step"] for metric in of_kind(read_metrics(copied), "step")]
    assert steps == [1, 2, 3, 4, 5]
    assert len(of_kind(read_metrics(copied), "warmup")) == 4  # not again
    state = read_state(copied, RealDisk())
    assert (state.state, state.num_starts) == ("finished", 2)
    assert read_config(copied).steps == 5
    assert read_config(copied).train.learning_rate == 1e-3
    told = [str(metric.values["message"]) for metric in of_kind(read_metrics(copied), "health")]
    assert [
        text for text in told if "steps 3 to 3 are taken again" in text and "train.learning_rate=0.001 (was" in text
    ]


@pytest.mark.parametrize("word", ["seed=8", "group_size=8", "groups_per_step=2", "model=other", "data=other"])
def test_a_resumed_run_keeps_what_its_tickets_mean(copied: Path, word: str) -> None:
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=f"{word.partition('=')[0]} can't change in a resumed run"):
        runner.resume(copied, ["steps=5", word], quiet())
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before


def test_a_damaged_newest_checkpoint_is_set_aside_and_told_and_the_good_one_stays(copied: Path) -> None:
    (copied / "checkpoints" / "step-000003" / "model.safetensors").write_bytes(b"")
    runner.resume(copied, ["steps=3", "checkpoint.keep=2"], quiet())
    names = {folder.name for folder in (copied / "checkpoints").iterdir()}
    assert names == {"step-000002", "step-000003", "step-000003.damaged"}
    assert damage(copied / "checkpoints" / "step-000003") == []
    told = [str(metric.values["message"]) for metric in of_kind(read_metrics(copied), "health")]
    assert [text for text in told if "step-000003 is damaged and was set aside" in text and "from step-000002" in text]


def test_steps_below_the_checkpoint_are_refused_and_the_same_number_only_evaluates(copied: Path) -> None:
    with pytest.raises(ConfigError, match=r"steps=2 is below the 3 that are done: give at least steps=3"):
        runner.resume(copied, ["steps=2"], quiet())
    assert runner.resume(copied, ["steps=3"], quiet()).steps == 3


def test_a_resume_and_an_evaluation_refuse_other_prompts(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    folder = run_recipe(file, tmp_path / "runs", "steps=0", "warmup.steps=0").folder
    assert len(read_state(folder, RealDisk()).prompts) == 32
    write_recipe(tmp_path, ('answer=f"{i:02d}")', 'answer=f"{i + 1:02d}")'))
    with pytest.raises(ConfigError, match=r"the prompts are not those that .* was started with.*start a new run"):
        runner.resume(folder, ["steps=1"], quiet())
    with pytest.raises(ConfigError, match="the prompts are not those"):
        runner.evaluate(folder, num_prompts=1, temperature=0.0, samples=1, tell=print)


def test_an_evaluation_whose_checkpoint_is_pruned_takes_the_next_newest(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pruned_meanwhile(folder: Path) -> Path:
        found = newest_checkpoint(folder)
        if found.name == "step-000003":
            shutil.rmtree(found)
        return found

    monkeypatch.setattr(runner, "newest_checkpoint", pruned_meanwhile)
    assert runner.evaluate(copied, num_prompts=2, temperature=0.0, samples=1, tell=print)["step"] == 2


def test_a_run_that_came_to_no_checkpoint_is_resumed_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    file = write_recipe(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(file, tmp_path / "runs", "name=one", "steps=1")
    folder = tmp_path / "runs" / "one"
    assert read_state(folder, RealDisk()).state == "interrupted"
    summary = runner.resume(folder, [], quiet())
    assert summary.folder == folder
    assert newest_checkpoint(folder).name == "step-000001"
    assert [metric.values["step"] for metric in of_kind(read_metrics(folder), "warmup")] == [1, 2, 3, 4]
    assert {path.name for path in folder.parent.iterdir()} == {"one"}
    assert not list(folder.glob(".new-*"))


def test_the_configuration_that_a_run_leaves_runs_again(copied: Path, tmp_path: Path) -> None:
    file = copied / "config.toml"
    recipe = load_recipe(str(file))
    config = recipe.configure(file=file, words=["steps=0", "warmup.steps=0"])
    again = runner.run(recipe, config, copied.parent, quiet()).folder
    assert again.name != copied.name


def test_a_log_behind_its_checkpoint_or_switched_off_is_set_aside_and_the_next_begins_with_the_checkpoint(
    copied: Path,
) -> None:
    os.truncate(copied / "ledger" / "00000001.log", 1000)  # as if an older copy of it had been put back
    runner.resume(copied, ["steps=4"], quiet())
    runner.resume(copied, ["steps=5"], quiet())  # goes on with the log that began in the middle of the run
    audited = audit_log(copied / "ledger")
    assert [*map(str, audited.violations), *audited.twice, *audited.lost, *audited.pending] == []
    assert (audited.trained, audited.last_step) == (5 * GROUPS, 5)
    runner.resume(copied, ["steps=6", "queue.log=off"], quiet())
    assert {path.name for path in copied.glob("ledger*")} == {"ledger.old-1", "ledger.old-2"}
    told = [str(metric.values["message"]) for metric in of_kind(read_metrics(copied), "health")]
    assert [text for text in told if "the checkpoint is of step 3), which is now ledger.old-1" in text]
    assert [text for text in told if "(queue.log=off), which is now ledger.old-2" in text]
    after = read_ledger(newest_checkpoint(copied), World())
    assert (after.trained, after.pending) == (6 * GROUPS, ())


def test_kl_can_not_be_measured_from_a_policy_that_was_not_kept(copied: Path) -> None:
    with pytest.raises(ConfigError, match="kl_coef can't be switched on in a resumed run"):
        runner.resume(copied, ["steps=5", "algorithm.kl_coef=0.1"], quiet())
    assert read_state(copied, RealDisk()).num_starts == 1
