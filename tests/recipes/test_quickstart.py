"""The quickstart's problems: right, seeded, and held out for good."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.config import RunConfig, WarmupConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Prompt
from asyncflow.recipes.quickstart import ALPHABET, columns, defaults, final_answer, reward, task
from asyncflow.recipes.recipe import Task, check_task

OPERAND = st.integers(100, 999)
SUM = Prompt(id="417+385=", text="417+385=", answer="802")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return defaults()


@pytest.fixture(scope="module")
def quickstart(config: RunConfig) -> Task:
    return task(config)


def operands(prompt: Prompt) -> frozenset[str]:
    """The two numbers, in whatever order."""
    return frozenset(prompt.text.removesuffix("=").split("+"))


def test_the_format_of_the_columns() -> None:
    assert columns(417, 385) == "7+5+0=12;1+8+1=10;4+3+1=8>802"
    assert columns(100, 100) == "0+0+0=0;0+0+0=0;1+1+0=2>200"
    assert columns(999, 999) == "9+9+0=18;9+9+1=19;9+9+1=19>1998"


@given(OPERAND, OPERAND)
def test_every_written_step_is_right(left: int, right: int) -> None:
    steps, _, answer = columns(left, right).partition(">")
    assert int(answer) == left + right
    carry = 0
    for step, a, b in zip(steps.split(";"), reversed(str(left)), reversed(str(right)), strict=True):
        total = int(a) + int(b) + carry
        assert step == f"{a}+{b}+{carry}={total}"
        carry = total // 10


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("802", 1.0),
        ("7+5+0=12;1+8+1=10;4+3+1=8>802", 1.0),
        ("nonsense>802", 1.0),
        (">>802", 1.0),
        ("803", 0.0),
        ("802>803", 0.0),
        ("0802", 0.0),
        ("802 ", 0.0),
        ("802;", 0.0),
        ("802>", 0.0),
        ("", 0.0),
        ("7+5+0=12;1+8+1=10;4+3+1=8;802", 0.0),
    ],
)
def test_reward(completion: str, expected: float) -> None:
    assert reward(SUM, completion) == expected


def test_the_task_is_complete(config: RunConfig, quickstart: Task) -> None:
    check_task(quickstart, config)
    assert len(quickstart.train) == 20_000
    assert len(quickstart.held_out) == 2_048
    shown = {demonstration.prompt.id for demonstration in quickstart.demonstrations}
    assert len(shown) == config.warmup.steps * config.warmup.batch_size


def test_held_out_sums_are_trained_on_in_neither_order(quickstart: Task) -> None:
    held_out = {operands(prompt) for prompt in quickstart.held_out}
    trained_on = {operands(prompt) for prompt in quickstart.train}
    shown = {operands(demonstration.prompt) for demonstration in quickstart.demonstrations}
    assert len(held_out) == 2_048
    assert not held_out & trained_on
    assert not held_out & shown


def test_demonstrations_earn_the_reward(quickstart: Task) -> None:
    assert all(reward(shown.prompt, shown.completion) == 1.0 for shown in quickstart.demonstrations)


def test_two_in_five_demonstrations_write_the_columns_out(quickstart: Task) -> None:
    texts = [demonstration.completion for demonstration in quickstart.demonstrations]
    assert 0.38 < sum(">" in text for text in texts) / len(texts) < 0.42
    assert all(re.fullmatch(r"(\d\+\d\+\d=\d+;){2}\d\+\d\+\d=\d+>\d+|\d+", text) for text in texts)


def test_everything_fits(config: RunConfig, quickstart: Task) -> None:
    longest = max(len(demonstration.completion) for demonstration in quickstart.demonstrations)
    assert longest + 1 <= config.sampling.max_tokens
    shown = "".join(demonstration.prompt.text + demonstration.completion for demonstration in quickstart.demonstrations)
    assert set(shown) == set(ALPHABET)


def test_the_seed_decides(config: RunConfig, quickstart: Task) -> None:
    again, other = task(config), task(config.model_copy(update={"seed": 8}))
    assert (again.train, again.held_out, again.demonstrations) == (
        quickstart.train,
        quickstart.held_out,
        quickstart.demonstrations,
    )
    assert other.held_out != quickstart.held_out


def test_the_warm_up_does_not_change_what_is_held_out(config: RunConfig, quickstart: Task) -> None:
    short = task(config.model_copy(update={"warmup": WarmupConfig(steps=0)}))
    assert short.demonstrations == []
    assert (short.held_out, short.train) == (quickstart.held_out, quickstart.train)


def test_more_demonstrations_than_sums_is_an_error(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="there are 405450 different sums"):
        task(config.model_copy(update={"warmup": WarmupConfig(steps=10_000)}))


def test_the_final_answer_stands_after_the_last_mark() -> None:
    assert final_answer("1>2>3") == "3"


@pytest.mark.parametrize("name", ["somebody/model", "folder"])
def test_a_named_model_is_taken_as_it_is(config: RunConfig, tmp_path: Path, name: str) -> None:
    assert task(config.model_copy(update={"model": name})).model(tmp_path) == name
    assert list(tmp_path.iterdir()) == []


def test_the_model_has_six_hundred_thousand_parameters(quickstart: Task, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")
    from safetensors import safe_open

    assert quickstart.model(tmp_path) == str(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as weights:
        assert 590_000 < sum(weights.get_tensor(name).size for name in weights.keys()) < 610_000  # noqa: SIM118
