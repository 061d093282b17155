"""A step of a real tiny run, taken again from its log."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

from asyncflow.cli.main import main
from asyncflow.core.errors import ConfigError
from asyncflow.observe.run_folder import CONFIG_FILE
from asyncflow.recipes.replay import Replay, replay
from asyncflow.recipes.runner import resume
from tests.recipes.copying import quiet, run_recipe, write_recipe

pytestmark = pytest.mark.slow

Out = pytest.CaptureFixture[str]


def outcomes(result: Replay) -> dict[str, str]:
    return {one.what: one.outcome for one in result.comparisons}


def taken_again(folder: Path, step: int, num_shown: int = 0) -> Replay:
    return replay(folder, step, num_shown=num_shown, tell=lambda text: None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EQUAL = {"loss": "equal", "gradient norm": "equal", "served weights": "equal", "checkpoint": "equal"}


def test_a_step_taken_again_has_every_bit_of_the_run_and_changes_no_file(copied: Path) -> None:
    before = contents(copied)
    result = taken_again(copied, 3, num_shown=2)
    assert outcomes(result) == EQUAL
    assert (result.started_from, result.num_groups, result.notes) == (2, 4, [])
    assert sum(len(batch.rows) for batch in result.batches) == 16
    assert {len(value) for batch in result.batches for value in batch.sha256.values()} == {64}
    assert len(result.samples) == 2
    assert all(len(sample.prompt) == 3 and sample.prompt.endswith(">") for sample in result.samples)
    assert contents(copied) == before
    assert [batch.sha256 for batch in taken_again(copied, 3).batches] == [batch.sha256 for batch in result.batches]


def test_what_differs_is_said_and_breaks_only_a_deterministic_promise(copied: Path, capsys: Out) -> None:
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines() if line]
    for line in lines:
        if line["kind"] == "step" and line["step"] == 3:
            line["loss"] += 0.25
    (copied / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["replay", str(copied), "--step", "3"]) == 0
    out = capsys.readouterr().out
    assert "differs      loss:" in out
    assert "(0.25 apart)" in out
    assert "bits of an ordinary run may differ" in out
    config = (copied / CONFIG_FILE).read_text()
    (copied / CONFIG_FILE).write_text(config.replace("deterministic = false", "deterministic = true"))
    assert main(["replay", str(copied), "--step", "3", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["breaks_a_promise"]


def test_weights_that_are_others_are_seen(copied: Path) -> None:
    saved = copied / "checkpoints"
    for name in ("model.safetensors", "manifest.json"):
        shutil.copy(saved / "step-000002" / name, saved / "step-000003" / name)
    manifest = json.loads((saved / "step-000003" / "manifest.json").read_text())
    kept = {name: entry for name, entry in manifest["files"].items() if name == "model.safetensors"}
    (saved / "step-000003" / "manifest.json").write_text(json.dumps({**manifest, "step": 3, "files": kept}))
    assert outcomes(taken_again(copied, 3)) == {**EQUAL, "checkpoint": "differs"}


def test_what_is_gone_can_not_be_compared(copied: Path, capsys: Out) -> None:
    assert main(["replay", str(copied), "--step", "1"]) == 0
    out = capsys.readouterr().out
    assert "no checkpoint from before step 1 is kept: the oldest is of step 2" in out
    with pytest.raises(ConfigError, match="--step 9: the log of one holds steps 1 to 3"):
        taken_again(copied, 9)
    assert main(["replay", str(copied), "--step", "9"]) == 2


def test_a_deterministic_run_is_taken_again_across_its_resume_and_proved(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    words = ("name=one", "deterministic=true", "checkpoint.keep=9", "queue.keep=all", "evaluate.every=0")
    folder = run_recipe(file, tmp_path / "runs", *words).folder
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")  # as if it had been killed in its second step
    resume(folder, ["steps=5"], quiet())
    assert main(["audit", str(folder)]) == 0
    result = taken_again(folder, 5)
    assert outcomes(result) == EQUAL
    for step in (3, 4):  # so that it begins before the resume, which saved what it took again
        shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")
    result = taken_again(folder, 5)
    assert (result.started_from, outcomes(result)) == (1, EQUAL)
