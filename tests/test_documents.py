"""What the documents say can be run, and is so."""

from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path

import pytest

from asyncflow.cli.app import app
from asyncflow.core.settings import resolve
from asyncflow.core.types import Prompt
from asyncflow.plan.virtual import run_virtually
from asyncflow.recipes.recipe import check_task, list_recipes, load_recipe

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "sort_digits.py"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


def test_the_recipe_of_the_readme_is_the_example() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"```python\n{EXAMPLE.read_text()}```" in readme
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_the_example_is_a_recipe_that_can_be_trained() -> None:
    recipe = load_recipe(str(EXAMPLE))
    config = resolve(recipe.defaults())
    task = recipe.task(config)
    check_task(task, config)
    reward = runpy.run_path(str(EXAMPLE))["reward"]
    assert all(reward(shown.prompt, shown.completion) == 1.0 for shown in task.demonstrations)
    longest = max(len(shown.completion) for shown in task.demonstrations)
    assert longest < config.sampling.max_tokens, "a completion and its end fit"


def test_the_agent_of_several_turns_is_told_where_the_digit_lies() -> None:
    recipe = load_recipe(str(ROOT / "examples" / "guess_digit.py"))
    config = recipe.configure()
    check_task(recipe.task(config), config)
    assert len((ROOT / "examples" / "guess_digit.py").read_text().splitlines()) <= 40
    play = runpy.run_path(str(ROOT / "examples" / "guess_digit.py"))["play"]
    heard: list[str] = []

    class Guesser:
        async def respond(self, hint: str) -> str:
            heard.append(hint)
            return "573"[len(heard) - 1]

    assert run_virtually(play(Prompt(id="", text="00001?", answer="6"), Guesser())) == 0.0
    assert heard == ["00001?", ">", "<"]
    heard.clear()
    assert run_virtually(play(Prompt(id="", text="00001?", answer="7"), Guesser())) == 1.0
    assert heard == ["00001?", ">"]


def test_the_example_builds_its_model(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")
    from asyncflow.engines.models import load_tokenizer

    recipe = load_recipe(str(EXAMPLE))
    task = recipe.task(recipe.defaults())
    tokenizer = load_tokenizer(task.model(tmp_path))
    assert tokenizer.decode(tokenizer.encode(task.train[0].text)) == task.train[0].text


def test_recipes_say_what_they_are() -> None:
    summaries = {recipe.name: recipe.summary for recipe in list_recipes()}
    assert {"gsm8k", "quickstart"} <= set(summaries)
    assert all(summaries.values())


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    commands = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    text = path.read_text()
    lines = "\n".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text))
    named = set(re.findall(r"^(?:\S*/)?asyncflow ([a-z]+)", lines, re.MULTILINE))
    assert named <= commands


def test_every_tool_that_tests_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["torch"], *extras["data"], *extras["dev"]]
    pinned = re.findall(r"^([a-z0-9-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {re.split(r"[<>=]", name)[0] for name in wanted} == set(pinned)
