"""Three-digit addition on a laptop: a model that has seen sums learns to work them out.

The model reads `417+385=` and writes until it ends. In the warm-up it imitates
demonstrations of two kinds: 60 in 100 give the bare answer, `802`, which so small a model
mostly gets wrong; 40 in 100 write the columns out, units first (digit + digit + carry = sum),
and then the answer::

    7+5+0=12;1+8+1=10;4+3+1=8>802

Reinforcement learning then finds by itself that writing the columns pays. The reward is 1
when the final answer, the text after the last `>`, is the sum exactly, and 0 otherwise.

Everything is drawn from the run's seed. Problems are unordered pairs drawn without
replacement, so no held-out sum is ever trained on, not even with its operands swapped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asyncflow.core.config import (
    AlgorithmConfig,
    EvaluateConfig,
    RolloutConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    WarmupConfig,
)
from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Demonstration, Prompt
from asyncflow.core.world import World, derive_seed
from asyncflow.recipes.recipe import Task, is_size
from asyncflow.rollout.rewards import single_turn

ALPHABET = "0123456789+=;>"
NUM_HELD_OUT = 2_048
NUM_PROMPTS = 20_000
SMALLEST, LARGEST = 100, 999
COLUMNS_SHARE = 0.4
"""Share of the demonstrations that write the columns out."""


def defaults() -> RunConfig:
    """The settings of `asyncflow run quickstart`."""
    return RunConfig(
        recipe="quickstart",
        model="tiny",
        steps=100,
        max_staleness=1,
        groups_per_step=32,
        group_size=8,
        sampling=SamplingConfig(temperature=1.0, max_tokens=64),
        rollout=RolloutConfig(max_running=256),
        train=TrainConfig(learning_rate=2e-4, betas=(0.9, 0.99)),
        algorithm=AlgorithmConfig(clip_low=0.2, clip_high=0.28, drop_no_signal=True),
        warmup=WarmupConfig(steps=350, batch_size=64, learning_rate=2e-3),
        evaluate=EvaluateConfig(every=5, num_prompts=256, final_num_prompts=1_024),
    )


def task(config: RunConfig) -> Task:
    """Problems, reward and model for this configuration."""
    num_demonstrations = config.warmup.steps * config.warmup.batch_size
    problems = _problems(config.seed, NUM_HELD_OUT + NUM_PROMPTS + num_demonstrations)
    held_out = [_prompt(*next(problems)) for _ in range(NUM_HELD_OUT)]
    train = [_prompt(*next(problems)) for _ in range(NUM_PROMPTS)]
    rng = World(seed=config.seed).rng("quickstart", "demonstrations")
    demonstrations = [_demonstrate(*pair, in_columns=rng.random() < COLUMNS_SHARE) for pair in problems]
    _check_apart(held_out, [*train, *(shown.prompt for shown in demonstrations)])
    return Task(
        train=train,
        held_out=held_out,
        agent=single_turn(reward),
        model=lambda folder: _build_model(config, folder),
        demonstrations=demonstrations,
    )


def reward(prompt: Prompt, completion: str) -> float:
    """1 when the final answer is the sum exactly, else 0.

    >>> reward(Prompt(id="", text="417+385=", answer="802"), "7+5+0=12;1+8+1=10;4+3+1=8>802")
    1.0
    """
    return float(final_answer(completion) == prompt.answer)


def final_answer(completion: str) -> str:
    """The text after the last `>`, or all of it."""
    return completion.rpartition(">")[2]


def columns(left: int, right: int) -> str:
    """The written-out sum of two three-digit numbers.

    >>> columns(417, 385)
    '7+5+0=12;1+8+1=10;4+3+1=8>802'
    """
    steps: list[str] = []
    carry = 0
    for place in (1, 10, 100):
        a, b = left // place % 10, right // place % 10
        total = a + b + carry
        steps.append(f"{a}+{b}+{carry}={total}")
        carry = total // 10
    return ";".join(steps) + f">{left + right}"


def _problems(seed: int, count: int) -> Iterator[tuple[int, int]]:
    """Different pairs of operands, no two alike even when swapped."""
    lefts, rights = np.triu_indices(LARGEST - SMALLEST + 1)
    if count > len(lefts):
        raise ConfigError(
            f"warmup.steps x warmup.batch_size with the prompts makes {count} problems; "
            f"there are {len(lefts)} different sums of three-digit numbers"
        )
    rng = World(seed=seed).rng("quickstart", "problems")
    chosen = rng.permutation(len(lefts))[:count]
    is_swapped = rng.random(len(lefts))[:count] < 0.5
    for index, swap in zip(chosen, is_swapped, strict=True):
        pair = (SMALLEST + int(lefts[index]), SMALLEST + int(rights[index]))
        yield pair[::-1] if swap else pair


def _prompt(left: int, right: int) -> Prompt:
    text = f"{left}+{right}="
    return Prompt(id=text, text=text, answer=str(left + right))


def _demonstrate(left: int, right: int, *, in_columns: bool) -> Demonstration:
    completion = columns(left, right) if in_columns else str(left + right)
    return Demonstration(prompt=_prompt(left, right), completion=completion)


def _check_apart(held_out: list[Prompt], trained_on: list[Prompt]) -> None:
    """Held-out accuracy means nothing if a held-out problem was trained on."""
    both = {prompt.id for prompt in held_out} & {prompt.id for prompt in trained_on}
    if both:
        raise ConfigError(f"{len(both)} held-out problems are trained on as well, such as {min(both)}")


def _build_model(config: RunConfig, folder: Path) -> str:
    """A Llama of 0.6 million parameters in `folder`, or whatever `model` names."""
    if not is_size(config.model, ("tiny",)):
        return config.model
    from asyncflow.engines.models import build_character_model  # here, so that the problems need no torch

    build_character_model(
        folder,
        alphabet=ALPHABET,
        layers=3,
        width=128,
        heads=4,
        intermediate=344,
        max_len=128,
        seed=derive_seed(config.seed, "model") % 2**31,
    )
    return str(folder)
