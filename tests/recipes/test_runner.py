"""Whole runs of a tiny recipe with the real engines: what they leave, refuse, resume and export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncflow.cli.main import main
from asyncflow.core.config import RolloutConfig, RunConfig, TrainConfig
from asyncflow.core.errors import ConfigError, FailureBudgetError, RunFolderError
from asyncflow.core.world import RealDisk, World
from asyncflow.engines import cores
from asyncflow.engines.models import build_character_model
from asyncflow.observe.records import Metric, read_metrics, read_rollouts, read_spans
from asyncflow.observe.run_folder import read_config
from asyncflow.observe.run_state import read_state
from asyncflow.recipes import runner
from asyncflow.workflow.checkpoint import newest_checkpoint, read_ledger
from asyncflow.workflow.checkpoint_folder import damage, list_checkpoints
from tests.recipes.copying import configure, quiet, run_recipe, write_recipe

pytestmark = pytest.mark.slow

GROUPS, SIBLINGS, STEPS = 4, 4, 3


def of_kind(metrics: list[Metric], kind: str) -> list[Metric]:
    return [metric for metric in metrics if metric.kind == kind]


# ---- what a run leaves ---------------------------------------------------------------------


def test_a_run_leaves_its_settings_and_how_it_ended(finished: runner.RunSummary) -> None:
    config = read_config(finished.folder)
    _, given = configure(Path(config.recipe), "name=one")
    assert config == given
    state = read_state(finished.folder, RealDisk())
    assert (state.state, state.reason, state.num_starts, state.seed) == ("finished", "", 1, 7)
    assert state.ended_at is not None
    assert (finished.steps, finished.folder.name) == (STEPS, "one")


def test_a_run_leaves_a_record_of_every_step(finished: runner.RunSummary) -> None:
    metrics = read_metrics(finished.folder)
    assert [metric.values["step"] for metric in of_kind(metrics, "warmup")] == [1, 2, 3, 4]
    steps = of_kind(metrics, "step")
    assert [metric.values["step"] for metric in steps] == [1, 2, 3]
    for number, metric in enumerate(steps, start=1):
        values = {name: float(value) for name, value in metric.values.items()}
        assert values["trained"] == number * GROUPS
        assert values["trained"] <= values["admitted"] <= (1 + number) * GROUPS
        assert 0 <= values["staleness_max"] <= 1
        assert all(np.isfinite(value) for value in values.values())
        assert values["ratio"] == pytest.approx(1, abs=0.2)
        for share in ("train_busy", "rollout_busy", "both_busy"):
            assert 0 <= values[share] <= 1
    evaluations = of_kind(metrics, "evaluation")
    assert [metric.values["step"] for metric in evaluations] == [0, 2, 3]
    assert [metric.values["num_prompts"] for metric in evaluations] == [6, 4, 6]
    assert [metric.values["num_failed"] for metric in evaluations] == [0, 0, 0]
    assert finished.accuracy_before == evaluations[0].values["accuracy"]
    assert finished.accuracy_after == evaluations[-1].values["accuracy"]
    assert {span.role for span in read_spans(finished.folder)} == {"train", "rollout"}


def test_a_run_leaves_what_the_model_wrote(finished: runner.RunSummary) -> None:
    rollouts = read_rollouts(finished.folder)
    assert Counter(rollout.ticket for rollout in rollouts) == dict.fromkeys(range(STEPS * GROUPS), SIBLINGS)
    assert len({rollout.prompt_id for rollout in rollouts}) == STEPS * GROUPS
    for rollout in rollouts:
        assert rollout.prompt == f"{rollout.answer}>"
        assert sum(tokens for _, tokens in rollout.versions) <= 4
        assert all(0 <= step < STEPS for step, _ in rollout.versions)


def test_a_run_leaves_whole_checkpoints_whose_ledger_agrees_with_the_metrics(finished: runner.RunSummary) -> None:
    checkpoints = list_checkpoints(finished.folder / "checkpoints")
    assert [folder.name for folder in checkpoints] == ["step-000002", "step-000003"]
    steps = {metric.values["step"]: metric.values for metric in of_kind(read_metrics(finished.folder), "step")}
    for step, folder in zip((2, 3), checkpoints, strict=True):
        assert damage(folder) == []
        ledger = read_ledger(folder, World())
        assert (ledger.admitted, ledger.trained) == (steps[step]["admitted"], steps[step]["trained"])
        assert ledger.admitted == ledger.trained + sum(ledger.dropped.values()) + len(ledger.pending)
    assert not list(finished.folder.parent.glob(".new-*"))


def test_the_exported_model_gives_the_same_logits(finished: runner.RunSummary, tmp_path: Path) -> None:
    target = tmp_path / "model"
    runner.export(finished.folder, target)
    assert not any(file.name.startswith(("optimizer", "trainer", "ledger", "manifest")) for file in target.iterdir())
    checkpoint = newest_checkpoint(finished.folder)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = torch.tensor([tokenizer.encode("42>")])
    logits = [AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits for folder in (checkpoint, target)]
    begun = AutoModelForCausalLM.from_pretrained(finished.folder / "model")(input_ids=ids).logits
    assert torch.equal(*logits)
    assert not torch.equal(logits[0], begun)
    assert tokenizer.decode(ids[0]) == "42>"


def test_greedy_answers_are_the_same_each_time(finished: runner.RunSummary) -> None:
    numbers = runner.evaluate(finished.folder, num_prompts=5, temperature=0.0, samples=3, tell=print)
    assert (numbers["step"], numbers["num_prompts"], numbers["samples"], numbers["num_failed"]) == (3, 5, 3, 0)
    assert numbers["accuracy"] == numbers["pass_at_k"]


# ---- every algorithm -----------------------------------------------------------------------

ALGORITHMS = [
    ("ppo", "token_mean", "grpo"),
    ("decoupled", "sequence_mean", "dr_grpo"),
    ("truncated", "constant", "grpo"),
    ("none", "token_mean", "dr_grpo"),
]


@pytest.mark.parametrize(("correction", "aggregation", "advantage"), ALGORITHMS)
def test_every_algorithm_trains(tmp_path: Path, correction: str, aggregation: str, advantage: str) -> None:
    words = [f"algorithm.{name}" for name in (f"correction={correction}", f"aggregation={aggregation}")]
    summary = run_recipe(
        write_recipe(tmp_path),
        tmp_path / "runs",
        *words,
        f"algorithm.advantage={advantage}",
        "steps=2",
        "warmup.steps=0",
        "evaluate.every=0",
        "max_staleness=2",
    )
    steps = of_kind(read_metrics(summary.folder), "step")
    assert [metric.values["step"] for metric in steps] == [1, 2]
    assert all(float(metric.values["grad_norm"]) > 0 for metric in steps)
    assert "ref_kl" not in steps[0].values


def test_a_kl_penalty_is_measured_from_the_policy_before_also_after_a_resume(tmp_path: Path) -> None:
    words = ["algorithm.kl_coef=0.5", "algorithm.drop_no_signal=true", "train.learning_rate=1e-2"]
    summary = run_recipe(write_recipe(tmp_path), tmp_path / "runs", *words, "steps=2", "train.micro_batch_tokens=20")
    runner.resume(summary.folder, ["steps=3"], quiet())
    steps = of_kind(read_metrics(summary.folder), "step")
    divergences = [float(metric.values["ref_kl"]) for metric in steps]
    assert divergences[0] == pytest.approx(0, abs=1e-6)
    assert divergences[1] > 1e-5
    assert divergences[2] > 1e-5  # a reference that was the resumed policy itself would give 0
    reference = AutoModelForCausalLM.from_pretrained(summary.folder / "reference")
    assert torch.isfinite(next(reference.parameters())).all()


# ---- what is refused -----------------------------------------------------------------------


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    facts = dict(runner.dry_run(*configure(file, "model=tiny")))
    assert facts["prompts"] == "80 to train on, 20 held out"
    assert facts["steps"] == "3 of 4 prompts x 4 rollouts"
    assert facts["staleness"] == "≤ 1"
    assert facts["training"] == "1 thread"
    assert "warning" not in facts
    assert {path.name for path in tmp_path.iterdir()} <= {file.name, "__pycache__"}


def no_end(folder: Path) -> str:
    no_weights(folder)
    (folder / "model.safetensors").touch()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return "has no end token"


def no_weights(folder: Path) -> str:
    build_character_model(folder, alphabet="01", layers=1, width=8, heads=1, intermediate=8, max_len=32, seed=1)
    (folder / "model.safetensors").unlink()
    return "is a folder without weights"


def no_model(folder: Path) -> str:
    return "is a folder but not a model: it has no config.json"


def no_folder(folder: Path) -> str:
    folder.rmdir()
    return "does not exist: expected the folder of a model"


@pytest.mark.parametrize("spoil", [no_end, no_weights, no_model, no_folder])
def test_a_model_that_can_not_be_used_is_refused_before_anything_starts(
    tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    message = spoil(folder)
    with pytest.raises(ConfigError, match=message):
        run_recipe(write_recipe(tmp_path), tmp_path / "runs", f"model={folder}")
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train=prompts[:80]", "train=[]", "the task has no training prompts"),
        ("held_out=prompts[80:]", "held_out=[]", "the task has no held-out prompts"),
        ("held_out=prompts[80:]", "held_out=prompts[70:]", "held-out prompts are also training prompts"),
        ("for prompt in prompts[:40]]", "for prompt in []]", "the task has no demonstrations"),
    ],
)
def test_a_task_that_can_not_be_learnt_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_recipe(write_recipe(tmp_path, (old, new)), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_stalenes=1", "unknown setting. Did you mean max_staleness?"),
        ("max_staleness=-1", '"-1" is not a whole number >= 0'),
        ("group_size=1", "must be at least 2"),
        ("rollout.engine=vllm", '"vllm" is not one of torch'),
        ("train.learning_rate=nan", "is not a number"),
    ],
)
def test_a_setting_that_can_not_be_is_refused_with_exit_code_2(
    tmp_path: Path, word: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert main(["run", str(write_recipe(tmp_path)), word, "--runs-dir", str(runs)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not runs.exists()


@pytest.mark.parametrize("word", ["rollout.device=gpu", "train.device=cuda:99"])
def test_a_device_that_is_not_there_is_refused_before_anything_starts(tmp_path: Path, word: str) -> None:
    file = write_recipe(tmp_path)
    for attempt in (
        lambda: run_recipe(file, tmp_path / "runs", word),
        lambda: runner.dry_run(*configure(file, word)),
    ):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            attempt()
    assert not (tmp_path / "runs").exists()


def test_prompts_that_leave_no_room_are_refused_and_tight_ones_told(tmp_path: Path) -> None:
    long = write_recipe(tmp_path, ('text=f"{i:02d}>"', 'text=f"{i:02d}>" * (11 if i == 70 else 1)'))
    with pytest.raises(ConfigError, match=r"1 of 100 prompts leave no room .* of 32 tokens, such as '70' with 33"):
        run_recipe(long, tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []
    tight = write_recipe(tmp_path, ('text=f"{i:02d}>"', 'text=f"{i:02d}>" * (10 if i == 70 else 1)'))
    facts = dict(runner.dry_run(*configure(tight)))
    assert facts["warning"].startswith("1 of 100 prompts leave less than sampling.max_tokens=4 in the model's context")


def test_a_run_folder_that_is_taken_is_left_alone(copied: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    with pytest.raises(RunFolderError, match="already holds a run"):
        run_recipe(write_recipe(tmp_path), copied.parent, "name=one")
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["one"]


# ---- a reward that fails -------------------------------------------------------------------


def test_a_reward_of_nan_ends_the_run_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = write_recipe(tmp_path, ("return sum(", "return float('nan') * sum("))
    words = ["warmup.steps=0", "rollout.max_failures=3", "--name", "one", "--runs-dir", str(tmp_path / "runs")]
    assert main(["run", str(file), *words]) == 1
    state = read_state(tmp_path / "runs" / "one", RealDisk())
    assert state.state == "failed"
    assert state.reason.startswith(f"{FailureBudgetError.__name__}: 4 of the last 4 groups failed")
    assert "reward copied returned nan" in state.reason
    assert "reward copied returned nan" in capsys.readouterr().err
    told = of_kind(read_metrics(tmp_path / "runs" / "one"), "health")
    assert "its group was dropped (reward): reward copied returned nan" in str(told[0].values["message"])


def test_zero_steps_leave_the_model_that_the_warm_up_made(tmp_path: Path) -> None:
    summary = run_recipe(write_recipe(tmp_path), tmp_path / "runs", "steps=0")
    assert newest_checkpoint(summary.folder).name == "step-000000"
    assert [metric.kind for metric in read_metrics(summary.folder)] == [*["warmup"] * 4, "evaluation"]
    assert isinstance(read_config(summary.folder), RunConfig)


@pytest.mark.parametrize(
    ("settings", "threads"),
    [({}, "4–8 threads"), ({"deterministic": True}, "1 thread"), ({"train": TrainConfig(threads=3)}, "3 threads")],
)
def test_a_plan_says_on_how_many_threads_the_trainer_computes(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], threads: str
) -> None:
    monkeypatch.setattr(cores, "num_cores", lambda: 8)
    config = RunConfig(rollout=RolloutConfig(device="cpu")).model_copy(update=settings)
    facts = dict(
        runner.run_facts(config.model_copy(update={"train": config.train.model_copy(update={"device": "cpu"})}))
    )
    assert facts["training"] == threads
