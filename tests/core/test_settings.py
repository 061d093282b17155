"""Settings: sources and their order, every mistake at once, and a file that loads again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.config import AlgorithmConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.setting_list import ALIASES, expected, fields, list_settings, nearest_setting
from asyncflow.core.settings import resolve, to_toml
from asyncflow.core.toml_lines import key_lines, line_of

DEFAULTS = RunConfig(steps=3, train=TrainConfig(learning_rate=0.5))


def toml(folder: Path, text: str) -> Path:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return file


def problems_of(*words: str, file: Path | None = None) -> list[str]:
    """The problems, with runs of spaces made one."""
    with pytest.raises(ConfigError) as caught:
        resolve(DEFAULTS, file=file, words=words)
    return [re.sub(" +", " ", problem) for problem in caught.value.problems]


def test_words_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = toml(tmp_path, "seed = 11\nsteps = 4\n[train]\nthreads = 2\n")
    config = resolve(DEFAULTS, file=file, words=["seed=12", "seed=13"])
    assert (config.seed, config.steps, config.train.threads, config.train.learning_rate) == (13, 4, 2, 0.5)


def test_words_are_typed_by_their_setting() -> None:
    words = ["train.learning_rate=1e-3", "algorithm.drop_no_signal=true", "train.betas=0.5, 0.6", "name=a=b", "data="]
    config = resolve(RunConfig(data="somewhere"), words=words)
    assert config.train.learning_rate == 1e-3
    assert config.algorithm.drop_no_signal is True
    assert config.train.betas == (0.5, 0.6)
    assert (config.name, config.data) == ("a=b", "")


def test_every_mistake_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    file = toml(tmp_path, '# a comment\nsteps = "40"\n\n[train]\nlrr = 1e-5\n[sampling]\ntemperature = 0\n')
    assert problems_of("rollout.max_running=three", "train.dtype=int8", file=file) == [
        f'{file}:2 steps "40" is not a whole number >= 0',
        f"{file}:5 train.lrr unknown setting. Did you mean train.learning_rate?",
        f"{file}:7 sampling.temperature 0 is not a number > 0",
        'command line rollout.max_running "three" is not a whole number >= 1',
        'command line train.dtype "int8" is not one of float32, bfloat16',
    ]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("steps", "has no '='. Settings are written NAME=VALUE, as in steps=VALUE"),
        ("--lr=3", "is not an option. Settings are written without dashes: train.learning_rate=VALUE"),
        ("train=3", "is a table of settings, not one setting. It holds train.engine,"),
        ("train.betas=0.5", "is not 2 numbers, as in 0.9,0.99"),
        ("train.learning_rate=nan", "is not a number >= 0"),
        ("algorithm.drop_no_signal=perhaps", "is not true or false"),
        ("qqqq=1", "unknown setting. List them: asyncflow settings"),
    ],
)
def test_a_wrong_word_is_answered_with_what_to_write(word: str, sentence: str) -> None:
    [problem] = problems_of(word)
    assert problem.startswith("command line ")
    assert sentence in problem


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "train.learning_rate"),
        ("train.lrr", "train.learning_rate"),
        ("warmup.lr", "warmup.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("trian.learning_rate", "train.learning_rate"),
        ("rollout.max_runing", "rollout.max_running"),
        ("train.temperature", "sampling.temperature"),
        ("stalenes", "max_staleness"),
        ("batch_size", "groups_per_step"),
        ("evaluate.evry", "evaluate.every"),
    ],
)
def test_the_nearest_setting_is_searched_in_all_sections(name: str, meant: str) -> None:
    assert nearest_setting(name, fields()) == meant


def test_aliases_point_to_settings() -> None:
    assert set(ALIASES.values()) <= set(fields())


def test_a_rule_over_several_settings_names_the_place_of_the_first() -> None:
    assert problems_of("group_size=1", "seed=x") == [
        'command line seed "x" is not a whole number >= 0',
        "command line group_size must be at least 2: advantages are relative to the siblings of a group",
    ]


def test_a_file_that_is_missing_or_not_toml_is_a_problem_beside_the_others(tmp_path: Path) -> None:
    broken = toml(tmp_path, "steps = \n")
    [first, second] = problems_of("seed=x", file=broken)
    assert first.startswith(f"{broken} is not valid TOML: Invalid value (at line 1")
    assert second == 'command line seed "x" is not a whole number >= 0'
    assert problems_of(file=tmp_path / "none.toml") == [f"{tmp_path / 'none.toml'} there is no such file"]


def test_an_unknown_table_and_a_table_for_a_setting_are_problems(tmp_path: Path) -> None:
    file = toml(tmp_path, "[optimizer]\n[steps]\nx = 1\n")
    [first, second] = problems_of(file=file)
    assert first.startswith(f"{file}:1 optimizer unknown setting.")
    assert second == f"{file}:2 steps a table is not a whole number >= 0"


def test_every_setting_is_listed_with_what_it_does() -> None:
    listed = list_settings(RunConfig())
    assert {"steps", "train.betas", "checkpoint.keep"} <= {setting.name for setting in listed}
    assert all(setting.description for setting in listed)
    assert expected(fields()["algorithm.clip_low"]) == "a number >= 0 and < 1"


def test_the_file_explains_every_setting() -> None:
    text = to_toml(RunConfig())
    for setting in list_settings(RunConfig()):
        assert f"{setting.key} = " in text
        assert setting.description in text


texts = st.text(st.characters(codec="utf-8"), max_size=20)
decay = st.floats(0, 1, exclude_max=True)
positive = st.floats(min_value=1e-300, max_value=1e300)
configs = st.builds(
    RunConfig,
    name=texts,
    model=texts,
    seed=st.integers(0, 2**70),
    sampling=st.builds(SamplingConfig, temperature=positive),
    rollout=st.builds(RolloutConfig, dtype=st.sampled_from(["float32", "bfloat16"]), time_limit_s=positive),
    train=st.builds(TrainConfig, betas=st.tuples(decay, decay), learning_rate=positive),
    algorithm=st.builds(AlgorithmConfig, drop_no_signal=st.booleans()),
)


@given(config=configs)
def test_the_written_file_loads_again_to_an_equal_configuration(
    config: RunConfig, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = toml(tmp_path_factory.getbasetemp(), to_toml(config))
    assert resolve(RunConfig(steps=99, recipe="other"), file=file) == config


def test_keys_are_found_on_their_lines() -> None:
    text = 'a = """\nb = 1\n"""\n"c" = 2\n[d . "e"] # note\nf.g = { h = 1 }\n'
    lines = key_lines(text)
    assert lines == {"a": 1, "c": 4, "d.e": 5, "d.e.f.g": 6}
    assert line_of("d.e.f.g.h", lines) == 6
    assert line_of("unknown", lines) == 1
