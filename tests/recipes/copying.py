"""Copy two digits: a recipe that trains in seconds, as the file that a user would write."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from asyncflow.core.config import RunConfig
from asyncflow.core.settings import resolve
from asyncflow.observe.progress import Progress, progress_on
from asyncflow.recipes.recipe import Recipe, load_recipe
from asyncflow.recipes.runner import RunSummary, run

COPYING = '''\
"""Copy two digits."""

from asyncflow.core.config import (
    CheckpointConfig, EvaluateConfig, RolloutConfig, RunConfig, SamplingConfig, TrainConfig, WarmupConfig,
)
from asyncflow.core.types import Demonstration, Prompt
from asyncflow.engines.models import build_character_model
from asyncflow.recipes.recipe import Task
from asyncflow.rollout.rewards import single_turn


def defaults():
    return RunConfig(
        steps=3,
        groups_per_step=4,
        group_size=4,
        sampling=SamplingConfig(max_tokens=4),
        rollout=RolloutConfig(device="cpu", max_failures=8),
        train=TrainConfig(device="cpu", threads=1),
        warmup=WarmupConfig(steps=4, batch_size=8),
        evaluate=EvaluateConfig(every=2, num_prompts=4, final_num_prompts=6),
        checkpoint=CheckpointConfig(every=1, keep=2),
    )


def task(config):
    prompts = [Prompt(id=str(i), text=f"{i:02d}>", answer=f"{i:02d}") for i in range(100)]
    return Task(
        train=prompts[:80],
        held_out=prompts[80:],
        agent=single_turn(copied),
        model=lambda folder: config.model if config.model != "tiny" else build(folder),
        demonstrations=[Demonstration(prompt=prompt, completion=prompt.answer) for prompt in prompts[:40]],
    )


def copied(prompt, completion):
    """How many of the places are right; never equal for all completions."""
    return sum(a == b for a, b in zip(prompt.answer, completion)) / 2 - len(completion) / 100


def build(folder):
    build_character_model(
        folder, alphabet="0123456789>", layers=1, width=32, heads=2, intermediate=64, max_len=32, seed=1
    )
    return str(folder)
'''


def write_recipe(folder: Path, *changes: tuple[str, str]) -> Path:
    """The recipe as a file, with words of it replaced."""
    text = COPYING
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    file = folder / "copying.py"
    file.write_text(text)
    return file


def configure(file: Path, *words: str) -> tuple[Recipe, RunConfig]:
    """The recipe in a file and its configuration, as the command line makes them."""
    recipe = load_recipe(str(file))
    config = resolve(recipe.defaults(), words=words)
    return recipe, config.model_copy(update={"recipe": recipe.name})


def quiet() -> Progress:
    """A display that nobody sees."""
    return progress_on(Console(file=io.StringIO()))


def run_recipe(file: Path, runs: Path, *words: str) -> RunSummary:
    """Run it in this process, with a rollout process of its own."""
    return run(*configure(file, *words), runs, quiet())
