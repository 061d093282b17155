"""What is checked before anything starts, and said in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from asyncflow.core.causes import NO_SPACE, disk_reason
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError, RunFolderError
from asyncflow.core.world import RealDisk
from asyncflow.engines.devices import pick_device
from asyncflow.engines.models import check_weights, context_length, load_tokenizer
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.observe.run_state import read_state
from asyncflow.recipes.inputs import check_lengths, prompts_fingerprint
from asyncflow.recipes.recipe import Recipe, Task, check_task
from asyncflow.workflow.checkpoint_folder import checkpoint_step

REFERENCE = "reference"
"""The folder of a run that holds the policy from which KL is measured."""


def checked_task(recipe: Recipe, config: RunConfig) -> Task:
    """The recipe's task. Raises `ConfigError` when it can't be trained."""
    task = recipe.task(config)
    check_task(task, config)
    return task


def same_task(recipe: Recipe, config: RunConfig, folder: Path) -> Task:
    """The task that a run began with. Raises `ConfigError` when its prompts are others now."""
    task = checked_task(recipe, config)
    began_with = read_state(folder, RealDisk()).prompts
    if began_with and prompts_fingerprint(task) != began_with:
        raise ConfigError(
            f"the prompts are not those that {folder.name} was started with: its tickets and accuracies would mean "
            f"others. Restore {config.data or config.recipe}, or start a new run"
        )
    return task


def check_devices(config: RunConfig) -> None:
    """Raise `ConfigError` where this machine lacks a device that the run needs."""
    pick_device(config.rollout.device, "rollout")
    pick_device(config.train.device, "train")


def fit(task: Task, source: str, config: RunConfig) -> list[str]:
    """Warnings about texts that are tight in the model's context. Raises `ConfigError` where some do not fit."""
    return check_lengths(task, TokenizerRenderer(source), context_length(source), config)


def make_model(task: Task, folder: Path) -> str:
    """Build or name the model, in an empty folder. Raises `ConfigError` when it is not one that can be used."""
    folder.mkdir(parents=True)
    with full_disk_said("the model"):
        source = task.model(folder)
    load_tokenizer(source)
    check_weights(source)
    return source


@contextmanager
def full_disk_said(what: str) -> Iterator[None]:
    """A full disk inside becomes one sentence, whoever met it."""
    try:
        yield
    except Exception as error:
        if disk_reason(error) == NO_SPACE:
            raise RunFolderError(f"{what} could not be written: {NO_SPACE}") from error
        raise


def check_steps(checkpoint: Path, config: RunConfig) -> None:
    """Raise `ConfigError` where a run would have to go back; with no step left, it only evaluates."""
    done = checkpoint_step(checkpoint) or 0
    if config.steps < done:
        raise ConfigError(f"steps={config.steps} is below the {done} that are done: give at least steps={done}")


def changed_settings(before: RunConfig, after: RunConfig) -> list[str]:
    """The settings of training and of the algorithm that differ, with their values."""
    changed = []
    for section in ("train", "algorithm"):
        old, new = getattr(before, section).model_dump(), getattr(after, section).model_dump()
        changed += [f"{section}.{name}={new[name]} (was {old[name]})" for name in old if new[name] != old[name]]
    return changed


def check_reference(folder: Path, checkpoint: Path, config: RunConfig) -> None:
    """Raise `ConfigError` where KL is asked for and the policy to measure it from was not kept."""
    if config.algorithm.kl_coef > 0 and checkpoint_step(checkpoint) and not (folder / REFERENCE).exists():
        raise ConfigError(
            "algorithm.kl_coef can't be switched on in a resumed run: the policy before reinforcement learning, "
            "from which KL is measured, was not kept. Start a new run"
        )
