"""Finding recipes, the user's own files, and tasks that cannot be trained."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from asyncflow.core.config import RunConfig, WarmupConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Demonstration, Prompt
from asyncflow.recipes.recipe import Task, check_task, list_recipes, load_recipe
from asyncflow.rollout.rewards import single_turn

OWN = '''"""My task.

More about it.
"""
from asyncflow.core.config import RunConfig

def defaults():
    return RunConfig(steps=5)

def task(config):
    return 1 / config.max_staleness
'''


CARDS = """from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Card:
    suits: list[int]

"""


def prompt(name: str, text: str = "") -> Prompt:
    return Prompt(id=name, text=text or f"text of {name}")


def task_of(train: list[Prompt], held_out: list[Prompt], shown: list[Prompt] | None = None) -> Task:
    demonstrations = [Demonstration(prompt=one, completion="") for one in shown or []]
    return Task(
        train=train, held_out=held_out, agent=single_turn(lambda _, __: 0.0), model=str, demonstrations=demonstrations
    )


def problems_of(task: Task, config: RunConfig | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        check_task(task, config or RunConfig())
    return caught.value.problems


def test_own_recipes_are_listed_with_their_first_lines() -> None:
    listed = {recipe.name: recipe.summary for recipe in list_recipes()}
    assert {"quickstart", "gsm8k"} <= set(listed)
    assert "recipe" not in listed
    assert all(listed.values())


def test_a_recipe_is_found_by_name() -> None:
    recipe = load_recipe("quickstart")
    assert recipe.name == "quickstart"
    assert recipe.defaults().steps > 0


def test_an_unknown_recipe_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'quikstart'\. Did you mean quickstart\? Recipes: .*gsm8k"):
        load_recipe("quikstart")


def test_a_users_file_is_a_recipe_and_its_name_finds_it_again(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    recipe = load_recipe(str(file))
    assert (recipe.name, recipe.summary, recipe.defaults().steps) == (str(file), "My task.", 5)
    assert load_recipe(recipe.name).summary == "My task."


def test_a_users_file_may_hold_dataclasses_with_postponed_annotations(tmp_path: Path) -> None:
    """`dataclass` looks a class's module up in `sys.modules`."""
    file = tmp_path / "with_classes.py"
    file.write_text(CARDS + OWN.partition("\n")[2].partition('"""\n')[2])
    assert load_recipe(str(file)).defaults().steps == 5


def test_a_users_file_that_fails_leaves_no_module_behind(tmp_path: Path) -> None:
    file = tmp_path / "broken_one.py"
    file.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_recipe(str(file))
    assert not [name for name in sys.modules if "broken_one" in name]


def test_errors_of_the_users_file_say_the_line(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN)
    with pytest.raises(ConfigError, match=rf"{file}:11: ZeroDivisionError: division by zero"):
        load_recipe(str(file)).task(RunConfig(max_staleness=0))
    file.write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=rf"{file}:1: ModuleNotFoundError: "):
        load_recipe(str(file))
    file.write_text("x = 1\ndef task(config:\n")
    with pytest.raises(ConfigError, match=rf"{file}:2: SyntaxError: "):
        load_recipe(str(file))
    file.write_text("def task(config): ...\n")
    with pytest.raises(ConfigError, match=r"has no function defaults\. A recipe has"):
        load_recipe(str(file))


def test_a_toml_file_names_its_recipe_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    file = tmp_path / "run.toml"
    file.write_text('recipe = "own.py"\n')
    assert load_recipe(str(file)).name == str(tmp_path / "own.py")
    file.write_text('recipe = "quickstart"\n')
    assert load_recipe(str(file)).name == "quickstart"
    file.write_text("steps = 1\n")
    with pytest.raises(ConfigError, match="names no recipe"):
        load_recipe(str(file))


def test_a_good_task_passes() -> None:
    check_task(task_of([prompt("a")], [prompt("b")], [prompt("c")]), RunConfig())


def test_every_reason_against_a_task_is_given() -> None:
    assert problems_of(task_of([], []), RunConfig(warmup=WarmupConfig(steps=3))) == (
        "the task has no training prompts",
        "the task has no held-out prompts: keep some of the data back, so that learning can be measured",
        "warmup.steps is 3, but the task has no demonstrations",
    )
    twice = task_of([prompt("a"), prompt("a", "other")], [prompt("b")])
    assert problems_of(twice) == (
        "prompt ids must be unique, also between training and held-out prompts; 'a' came twice",
    )
    leaked = task_of([prompt("a", "same")], [prompt("b", "same")], [prompt("c", "same")])
    assert problems_of(leaked) == (
        "1 held-out prompts are also training prompts, such as 'same': accuracy would mislead",
        "1 held-out prompts are also demonstrations, such as 'same': accuracy would mislead",
    )
