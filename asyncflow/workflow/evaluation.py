"""Evaluation: how well the served policy answers prompts it is never trained on."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from asyncflow.core.causes import first_cause
from asyncflow.core.errors import RolloutError
from asyncflow.core.types import Prompt, Trajectory
from asyncflow.rollout.groups import RolloutParts, roll_out_one


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Results over `num_prompts` prompts with `samples` answers each.

    An answer is right when its reward is at least 1. `accuracy` is the share of right
    answers, `pass_at_k` the share of prompts with at least one, `stderr` the standard error
    of the accuracy over prompts, `length` the mean number of sampled tokens.
    """

    num_prompts: int
    samples: int
    accuracy: float
    pass_at_k: float
    stderr: float
    reward: float
    length: float
    num_failed: int


def _ignore(text: str) -> None:
    """Nobody is told."""


async def evaluate(
    prompts: Sequence[Prompt],
    parts: RolloutParts,
    *,
    name: str,
    at_once: int,
    samples: int = 1,
    tell: Callable[[str], None] = _ignore,
) -> Evaluation:
    """Answer every prompt `samples` times, `at_once` rollouts at once. One that fails counts as a wrong answer.

    A rollout's time limit begins with the rollout, so `at_once` should be what the engine runs,
    and some more to keep it full. `tell` is told how many failed for each reason, and the first
    error of each. Raises the first error when all failed: that says nothing about the policy.
    `name` seeds the sampling: equal names, weights and prompts give equal results.
    """
    places = asyncio.Semaphore(at_once)
    try:
        async with asyncio.TaskGroup() as answers:
            tasks = [
                [
                    answers.create_task(_answer(prompt, parts, name, k, places), name=f"{name} {prompt.id}.{k}")
                    for k in range(samples)
                ]
                for prompt in prompts
            ]
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    results = [[task.result() for task in row] for row in tasks]
    _report([result for row in results for result in row], name, tell)
    return _summary(results)


async def _answer(
    prompt: Prompt, parts: RolloutParts, name: str, k: int, places: asyncio.Semaphore
) -> Trajectory | RolloutError:
    session = f"{name}.{prompt.id}.{k}"
    async with places:
        try:
            return await roll_out_one(prompt, parts, session=session, seed_keys=(name, prompt.id, k))
        except RolloutError as error:
            return error


def _report(results: Sequence[Trajectory | RolloutError], name: str, tell: Callable[[str], None]) -> None:
    """Tell the failures by their reason. Raises the first one when there is nothing else."""
    errors = [result for result in results if isinstance(result, RolloutError)]
    if errors and len(errors) == len(results):
        raise errors[0]
    counts = Counter(error.reason for error in errors)
    for reason, count in counts.items():
        first = next(error for error in errors if error.reason == reason)
        tell(f"{count} of {len(results)} answers of {name} failed ({reason}) and count as wrong; the first: {first}")


def _summary(results: list[list[Trajectory | RolloutError]]) -> Evaluation:
    right = np.array([[isinstance(result, Trajectory) and result.reward >= 1.0 for result in row] for row in results])
    done = [result for row in results for result in row if isinstance(result, Trajectory)]
    num_prompts, samples = right.shape
    per_prompt = right.mean(axis=1)
    return Evaluation(
        num_prompts=num_prompts,
        samples=samples,
        accuracy=float(right.mean()),
        pass_at_k=float(right.any(axis=1).mean()),
        stderr=float(per_prompt.std(ddof=1) / np.sqrt(num_prompts)) if num_prompts > 1 else 0.0,
        reward=float(sum(answer.reward for answer in done) / right.size),
        length=float(np.mean([answer.loss_mask.sum() for answer in done])) if done else 0.0,
        num_failed=int(right.size - len(done)),
    )
