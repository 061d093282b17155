"""The verbs, from words to what is asked of the runner and what is printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import asyncflow
from asyncflow import recipes
from asyncflow.cli.main import main
from asyncflow.cli.output import show_error, show_numbers
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import AsyncFlowError, ConfigError, EngineLostError, LedgerError
from asyncflow.core.world import RealDisk
from asyncflow.observe.run_folder import read_config
from asyncflow.observe.run_state import read_state
from asyncflow.workflow.checkpoint_folder import begin_draft, publish
from tests.cli.fake_runner import FakeRunner

Out = pytest.CaptureFixture[str]


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeRunner:
    fake = FakeRunner()
    monkeypatch.setattr(recipes, "runner", fake, raising=False)
    monkeypatch.setitem(sys.modules, "asyncflow.recipes.runner", fake)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "dumb")
    return fake


def config_of(runner: FakeRunner) -> RunConfig:
    [(_, config)] = runner.calls
    assert isinstance(config, RunConfig)
    return config


def test_run_resolves_the_configuration_and_says_what_next(runner: FakeRunner, capsys: Out) -> None:
    assert main(["run", "quickstart", "steps=3", "train.learning_rate=1e-3", "--name", "2026-11-20-blue-fox"]) == 0
    config = config_of(runner)
    assert (config.recipe, config.steps, config.train.learning_rate) == ("quickstart", 3, 1e-3)
    out = capsys.readouterr().out
    assert "done 3 steps in 2:41   held-out accuracy 28.3% → 79.1%" in out
    assert re.search(r"run folder +runs/2026-11-20-blue-fox", out)
    assert re.search(r"dropped +40 no signal, 1 reward", out)
    assert re.search(r"failed +a rollout failed and its group was dropped \(reward\): reward f raised", out)
    assert "asyncflow eval blue-fox --pass-at 4" in out
    assert "asyncflow export blue-fox my-model" in out
    assert "asyncflow run quickstart max_staleness=0" in out


def test_a_file_sets_what_the_words_do_not(runner: FakeRunner, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('recipe = "quickstart"\nsteps = 9\nseed = 9\n')
    assert main(["run", "mine.toml", "seed=10"]) == 0
    config = config_of(runner)
    assert (config.recipe, config.steps, config.seed) == ("quickstart", 9, 10)


def test_the_file_in_the_run_folder_runs_again(runner: FakeRunner) -> None:
    assert main(["run", "quickstart", "steps=3", "--name", "one"]) == 0
    assert main(["run", "runs/one/config.toml", "--name", "two"]) == 0
    first, second = read_config(Path("runs/one")), read_config(Path("runs/two"))
    assert first.model_copy(update={"name": "two"}) == second


def test_an_own_recipe_is_found_again_from_any_folder(runner: FakeRunner, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from asyncflow.core.config import RunConfig\ndef defaults(): return RunConfig()\ndef task(config): ...\n"
    )
    assert main(["run", "own.py"]) == 0
    assert config_of(runner).recipe == str(tmp_path / "own.py")


def test_mistakes_are_listed_with_exit_code_2(runner: FakeRunner, capsys: Out) -> None:
    assert main(["run", "quickstart", "train.lrr=1", "rollout.max_running=three", "--bogus"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 3 problems",
        "  command line   --bogus               is not an option. Settings are written without dashes: "
        "train.learning_rate=VALUE",
        "  command line   train.lrr             unknown setting. Did you mean train.learning_rate?",
        '  command line   rollout.max_running   "three" is not a whole number >= 1',
    ]
    assert main(["run", "quikstart"]) == 2
    assert "error: there is no recipe 'quikstart'. Did you mean quickstart?" in capsys.readouterr().err
    assert main(["run", "quickstart", "recipe=gsm8k"]) == 2
    assert main(["run"]) == 2
    assert runner.calls == []


def test_a_dry_run_says_what_would_run_and_starts_nothing(runner: FakeRunner, capsys: Out, tmp_path: Path) -> None:
    assert main(["run", "quickstart", "--dry-run", "--name", "one"]) == 0
    out = capsys.readouterr().out
    assert "Nothing was started" in out
    assert re.search(r"model +tiny, 0\.8 M parameters", out)
    assert re.search(r"run folder +runs/one", out)
    assert [name for name, _ in runner.calls] == ["dry_run"]
    assert list(tmp_path.iterdir()) == []
    assert main(["run", "quickstart", "--name", "one"]) == 0
    publish(begin_draft(Path("runs/one/checkpoints"), 2), RealDisk())
    assert main(["run", "quickstart", "--dry-run", "--name", "one"]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["run", "quickstart", "--dry-run", "--name", "../x"]) == 1
    assert "'../x' cannot name a run" in capsys.readouterr().err


def test_errors_of_a_run_are_one_message_also_out_of_groups(runner: FakeRunner, capsys: Out) -> None:
    runner.error = ExceptionGroup(
        "tasks", [ExceptionGroup("inner", [EngineLostError("rollout 0 died: out of memory")])]
    )
    assert main(["run", "quickstart", "--name", "one"]) == 1
    assert capsys.readouterr().err == "error: rollout 0 died: out of memory\n"
    assert read_state(Path("runs/one"), RealDisk()).reason == "EngineLostError: rollout 0 died: out of memory"


@pytest.mark.parametrize("error", [LedgerError("ticket 3 trained twice"), ZeroDivisionError("what?")])
def test_bugs_keep_their_traceback(runner: FakeRunner, error: Exception) -> None:
    runner.error = error
    with pytest.raises(type(error)):
        main(["run", "quickstart"])


def test_an_interrupted_run_says_how_to_continue(runner: FakeRunner, capsys: Out) -> None:
    runner.error = KeyboardInterrupt()
    assert main(["run", "quickstart", "--name", "one"]) == 130
    err = capsys.readouterr().err
    assert err == "interrupted before the first checkpoint. Start it from the beginning: asyncflow resume one\n"
    publish(begin_draft(Path("runs/one/checkpoints"), 2), RealDisk())
    assert main(["resume", "one", "steps=9"]) == 130
    assert "after step 3; the checkpoint of step 2 is on disk. Continue:" in capsys.readouterr().err
    assert runner.calls[-1] == ("resume", ["steps=9"])
    runner.error = None
    assert main(["resume", "on"]) == 0
    assert "asyncflow run quickstart max_staleness=0" in capsys.readouterr().out


def test_eval_takes_what_is_not_said_from_the_run(runner: FakeRunner, capsys: Out) -> None:
    main(["run", "quickstart", "--name", "one", "evaluate.final_num_prompts=50", "evaluate.temperature=0.5"])
    capsys.readouterr()
    assert main(["eval", "one"]) == 0
    rows = [re.split(" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["step", "80"],
        ["held-out prompts", "1,024"],
        ["answers to each", "4"],
        ["accuracy", "73.8% ± 1.4%"],
        ["pass@4", "88.1%"],
        ["mean reward", "0.75"],
        ["mean length", "6.1 tokens"],
    ]
    assert main(["eval", "one", "--num-prompts", "5", "--temperature", "0.1", "--pass-at", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.7383
    assert main(["eval", "one", "--greedy"]) == 0
    assert [asked for name, asked in runner.calls if name == "evaluate"] == [(50, 0.5, 1), (5, 0.1, 4), (50, 0.0, 1)]
    assert main(["eval", "one", "--greedy", "--pass-at", "4"]) == 2


def test_an_evaluation_of_one_answer_each_has_no_pass_at_and_shows_failures(capsys: Out) -> None:
    show_numbers({"samples": 1, "accuracy": 0.5, "pass_at_k": 0.5, "stderr": 0.1, "num_failed": 3})
    assert re.fullmatch(r"\s*accuracy +50\.0% ± 10\.0%\s+failed rollouts +3\s*", capsys.readouterr().out)


@pytest.mark.parametrize("error", [EngineLostError, ConfigError])
def test_what_models_and_data_wrote_cannot_steer_the_terminal_in_an_error(
    runner: FakeRunner, capsys: Out, error: type[AsyncFlowError]
) -> None:
    runner.error = error("last words:\n\x1b[2J\x1b]0;title\x07wiped\x9b31m")
    assert main(["run", "quickstart"]) in {1, 2}
    assert capsys.readouterr().err == "error: last words:\n]0;titlewiped31m\n"
    show_error(ConfigError("one \x1b[31m", "two \u202e"))
    assert capsys.readouterr().err == "error: 2 problems\n  one \n  two \n"


def test_export_writes_into_a_new_folder_only(runner: FakeRunner, tmp_path: Path, capsys: Out) -> None:
    main(["run", "quickstart", "--name", "one"])
    assert main(["export", "one", "model"]) == 0
    assert runner.calls[-1] == ("export", Path("model"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["export", "one", "full"]) == 1
    assert "full is not empty" in capsys.readouterr().err


def test_an_unknown_run_is_answered_with_the_latest(runner: FakeRunner, capsys: Out) -> None:
    assert main(["eval", "fox"]) == 1
    assert "error: there are no runs in runs/" in capsys.readouterr().err


def test_recipes_and_settings_are_listed(capsys: Out) -> None:
    assert main(["recipes", "--json"]) == 0
    assert {"quickstart", "gsm8k"} <= {recipe["name"] for recipe in json.loads(capsys.readouterr().out)}
    assert main(["recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["settings", "quickstart", "--json"]) == 0
    listed = {setting["name"]: setting for setting in json.loads(capsys.readouterr().out)}
    assert listed["recipe"]["default"] == "quickstart"
    assert listed["train.betas"]["expected"] == "2 numbers, as in 0.9,0.99"
    assert main(["settings"]) == 0
    assert "train.betas=0.9,0.99" in capsys.readouterr().out


def test_help_is_there_without_torch() -> None:
    program = (
        "import sys; from asyncflow.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'datasets'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Begin with: asyncflow run quickstart" in done.stdout
    for example in ("run quickstart steps=20 train.learning_rate=3e-4", "resume blue-fox", "eval blue-fox --pass-at 4"):
        assert re.search(rf"^ +asyncflow {example}.*$", done.stdout, re.MULTILINE), done.stdout
    assert "Settings are written NAME=VALUE" in done.stdout
    assert "A RUN is a run folder" in done.stdout


@pytest.mark.parametrize("command", ["run", "resume", "eval", "export", "recipes", "settings"])
def test_every_command_shows_an_example(command: str, capsys: Out) -> None:
    assert main([command, "--help"]) == 0
    assert f"Example: asyncflow {command}" in capsys.readouterr().out


def test_the_version_is_printed(capsys: Out) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"asyncflow {asyncflow.__version__}\n"


def test_simulate_compares_bounds_and_refuses_nonsense(capsys: Out) -> None:
    words = [
        "quickstart",
        "steps=4",
        "groups_per_step=2",
        "--train-s",
        "2",
        "--sigma",
        "0",
        "--bounds",
        "0,1",
        "--json",
    ]
    assert main(["simulate", *words]) == 0
    synchronous, asynchronous = json.loads(capsys.readouterr().out)
    assert (synchronous["bound"], synchronous["staleness_max"], synchronous["ratio"]) == (0, 0, 1.0)
    assert asynchronous["ratio"] > 1
    assert main(["simulate", "quickstart", "--bounds", "0,x"]) == 2
    assert main(["simulate", "quickstart", "steps=0"]) == 2
    assert "nothing to simulate" in capsys.readouterr().err
