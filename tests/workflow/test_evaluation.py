"""Evaluation: what is counted, what a failed answer counts as, and that a broken engine is no wrong answer."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from asyncflow.core.errors import AgentError, EngineLostError, RolloutTimeout
from asyncflow.core.types import Prompt
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Agent, Chat
from asyncflow.workflow.evaluation import Evaluation, evaluate
from tests.rollout.engines import SilentEngine, TellingEngine, make_parts, say

PROMPTS = [Prompt(id=str(index), text=f"{index}?", answer=str(index)) for index in range(4)]


def graded(rewards: dict[str, list[float | Exception]]) -> Agent:
    """An agent that gives each prompt its rewards in turn, or raises."""
    left = {name: list(values) for name, values in rewards.items()}

    async def agent(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        reward = left[prompt.id].pop(0)
        if isinstance(reward, Exception):
            raise reward
        return reward

    return agent


def run_evaluation(
    agent: Agent, engine: TellingEngine | SilentEngine | None = None, samples: int = 1, told: list[str] | None = None
) -> Evaluation:
    parts = make_parts(engine or TellingEngine(), agent)
    tell = (told if told is not None else []).append
    return run_virtually(evaluate(PROMPTS, parts, name="evaluation 3", at_once=2, samples=samples, tell=tell))


def test_an_answer_is_right_from_a_reward_of_1_on_and_rewards_are_averaged() -> None:
    result = run_evaluation(graded({"0": [1.0], "1": [0.9], "2": [2.0], "3": [-1.9]}))
    assert (result.num_prompts, result.samples, result.num_failed) == (4, 1, 0)
    assert (result.accuracy, result.pass_at_k) == (0.5, 0.5)
    assert result.reward == pytest.approx(0.5)
    assert result.length == 2.0  # the completion of the engine: a token and the end
    assert result.stderr == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)


def test_pass_at_k_needs_one_right_answer_of_k() -> None:
    rewards: dict[str, list[float | Exception]] = {"0": [1, 0, 0], "1": [0, 0, 0], "2": [1, 1, 1], "3": [0, 0, 1]}
    result = run_evaluation(graded(rewards), samples=3)
    assert (result.samples, result.num_prompts) == (3, 4)
    assert result.accuracy == pytest.approx(5 / 12)
    assert result.pass_at_k == 0.75
    assert result.stderr == pytest.approx(np.std([1 / 3, 0, 1, 1 / 3], ddof=1) / 2)


def test_a_failed_rollout_is_a_wrong_answer_of_reward_0() -> None:
    result = run_evaluation(graded({"0": [1.0], "1": [KeyError("x")], "2": [1.0], "3": [AgentError("y")]}))
    assert (result.accuracy, result.reward, result.num_failed) == (0.5, 0.5, 2)
    assert result.length == 2.0  # of the answers there are


def test_failures_are_told_once_for_each_reason_with_the_first_error() -> None:
    told: list[str] = []
    run_evaluation(graded({"0": [1.0], "1": [KeyError("x")], "2": [math.nan], "3": [KeyError("y")]}), told=told)
    assert told == [
        "2 of 4 answers of evaluation 3 failed (agent) and count as wrong; "
        "the first: the agent raised KeyError('x') on prompt 1",
        "1 of 4 answers of evaluation 3 failed (reward) and count as wrong; "
        "the first: agent agent returned nan on prompt 2; expected a finite number",
    ]
    run_evaluation(graded({prompt.id: [0.0] for prompt in PROMPTS}), told=told)
    assert len(told) == 2


def test_when_every_rollout_fails_the_first_failure_is_raised() -> None:
    with pytest.raises(AgentError, match=r"the agent raised KeyError\('x'\) on prompt 0"):
        run_evaluation(graded({prompt.id: [KeyError("x")] for prompt in PROMPTS}))


def test_an_answer_has_a_time_limit_and_may_be_cancelled_from_within() -> None:
    """One answers, one waits for ever, one lets a stray cancellation escape: the evaluation ends."""

    async def agent(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        if prompt.id == "1":
            await asyncio.Event().wait()
        if prompt.id == "2":
            raise asyncio.CancelledError
        return 1.0

    told: list[str] = []
    result = run_evaluation(agent, told=told)
    assert (result.accuracy, result.num_failed) == (0.5, 2)
    assert [text.partition(")")[0] for text in told] == [
        "1 of 4 answers of evaluation 3 failed (timeout",
        "1 of 4 answers of evaluation 3 failed (agent",
    ]


def test_an_engine_that_never_answers_ends_the_evaluation_with_the_time_limit() -> None:
    with pytest.raises(RolloutTimeout, match=r"prompt 0 took over rollout.time_limit_s = 60 seconds"):
        run_evaluation(graded({}), SilentEngine())


def test_a_lost_engine_is_no_wrong_answer() -> None:
    with pytest.raises(EngineLostError):
        run_evaluation(graded({}), TellingEngine(error=EngineLostError("died")))


def test_equal_names_draw_equal_seeds_and_other_names_others() -> None:
    async def agent(prompt: Prompt, chat: Chat) -> float:
        return float(len(await chat.respond(prompt.text)))

    def seeds(name: str) -> set[int]:
        engine = TellingEngine(otherwise=say(1, 0))
        run_virtually(evaluate(PROMPTS, make_parts(engine, agent), name=name, at_once=99, samples=2))
        return {call.params.seed for call in engine.calls}

    assert len(seeds("evaluation 3")) == 8
    assert seeds("evaluation 3") == seeds("evaluation 3")
    assert not seeds("evaluation 3") & seeds("evaluation 4")
