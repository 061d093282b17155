"""What goes into a run: paths, prompts and lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.config import RunConfig, SamplingConfig, WarmupConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Demonstration, IntArray, Prompt
from asyncflow.recipes import inputs
from asyncflow.recipes.inputs import check_lengths, prompts_fingerprint, with_absolute_paths
from asyncflow.recipes.recipe import Task, load_recipe
from asyncflow.rollout.rewards import single_turn

CONFIG = RunConfig(sampling=SamplingConfig(max_tokens=4), warmup=WarmupConfig(steps=1))


class Letters:
    """A token for each letter, and two around a prompt."""

    stop_token_ids = (0,)

    def __init__(self) -> None:
        self.num_tokenized = 0

    def prompt_ids(self, text: str) -> IntArray:
        self.num_tokenized += 1
        if "?" in text:
            raise ValueError("no token for it")
        return np.zeros(len(text) + 2, np.int32)

    def completion_ids(self, text: str) -> IntArray:
        return np.zeros(len(text) + 1, np.int32)

    def next_ids(self, text: str) -> IntArray:
        raise NotImplementedError

    def text(self, token_ids: IntArray) -> str:
        raise NotImplementedError


def task_of(*lengths: int, shown: int = 1) -> Task:
    prompts = [Prompt(id=f"p{length}", text="x" * length) for length in lengths]
    demonstration = Demonstration(prompt=prompts[0], completion="y" * shown)
    return Task(
        train=prompts,
        held_out=[Prompt(id="h", text="z")],
        agent=single_turn(lambda _, __: 0.0),
        model=str,
        demonstrations=[demonstration],
    )


def test_short_texts_are_not_even_tokenized() -> None:
    letters = Letters()
    assert check_lengths(task_of(5, 10), letters, 30, CONFIG) == []
    assert letters.num_tokenized == 1  # to know what a prompt has around it


def test_prompts_without_room_are_counted_with_the_worst() -> None:
    with pytest.raises(ConfigError, match=r"^2 of 5 prompts leave no room .* of 20 tokens, such as 'p30' with 32\."):
        check_lengths(task_of(1, 17, 18, 30), Letters(), 20, CONFIG)


def test_prompts_with_little_room_are_told() -> None:
    assert check_lengths(task_of(14), Letters(), 20, CONFIG) == []
    assert check_lengths(task_of(15, 17), Letters(), 20, CONFIG) == [
        "2 of 3 prompts leave less than sampling.max_tokens=4 in the model's context of 20 tokens, "
        "such as 'p17' with 19: their answers end early"
    ]


def test_demonstrations_must_fit_where_they_are_used() -> None:
    assert check_lengths(task_of(10, shown=7), Letters(), 20, CONFIG) == []
    with pytest.raises(
        ConfigError, match="1 of 1 demonstrations exceed the model's context of 20 tokens, such as 'p10'"
    ):
        check_lengths(task_of(10, shown=8), Letters(), 20, CONFIG)
    cold = CONFIG.model_copy(update={"warmup": WarmupConfig(steps=0)})
    assert check_lengths(task_of(10, shown=8), Letters(), 20, cold) == []


def test_of_very_much_text_only_the_longest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES_TOKENIZED", 100)
    letters = Letters()
    [told] = check_lengths(task_of(1, *range(40, 60)), letters, 62, CONFIG)
    assert told.startswith("2 of 22 prompts")
    assert letters.num_tokenized == 3


def test_one_text_longer_than_what_is_measured_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "MAX_BYTES_TOKENIZED", 100)
    with pytest.raises(ConfigError, match=r"1 of 3 prompts leave no room .* such as 'p500'"):
        check_lengths(task_of(1, 500), Letters(), 62, CONFIG)


def test_a_text_that_the_tokenizer_refuses_is_named() -> None:
    task = task_of(1)
    task = replace(task, train=[Prompt(id="odd", text="?" * 40)])
    with pytest.raises(ConfigError, match="prompt 'odd': the model's tokenizer can't take its text: no token for it"):
        check_lengths(task, Letters(), 20, CONFIG)


def test_the_fingerprint_depends_on_ids_texts_answers_and_their_places() -> None:
    task = task_of(3, 4)
    first, second = task.train
    others = [
        replace(task, train=[second, first]),
        replace(task, train=[first]),
        replace(task, train=[first], held_out=[second, *task.held_out]),
        replace(task, train=[replace(first, id="new"), second]),
        replace(task, train=[replace(first, text="new"), second]),
        replace(task, train=[replace(first, answer="new"), second]),
        replace(task, train=[replace(first, id="p3x", text="xx"), second]),
    ]
    assert prompts_fingerprint(task_of(3, 4)) == prompts_fingerprint(task)
    assert len({prompts_fingerprint(one) for one in [task, *others]}) == 1 + len(others)


def test_paths_mean_the_same_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("quickstart")
    config = recipe.defaults().model_copy(update={"model": "mine", "data": "train.jsonl"})
    assert with_absolute_paths(config, recipe) == config  # hub names, as far as anybody can see
    (tmp_path / "mine").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "train.jsonl").touch()
    fixed = with_absolute_paths(config, recipe)
    assert (fixed.model, fixed.data) == (str(tmp_path / "mine"), str(tmp_path / "train.jsonl"))
    assert with_absolute_paths(fixed, recipe) == fixed
    built = config.model_copy(update={"model": "tiny"})
    assert with_absolute_paths(built, recipe).model == "tiny"
