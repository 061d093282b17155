"""Whatever a reward function does, the result is a finite number or an error that names the function."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest

from asyncflow.core.errors import EngineLostError, RewardError
from asyncflow.core.types import Prompt
from asyncflow.core.world import MemoryDisk, World
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Chat
from asyncflow.rollout.groups import roll_out_one
from asyncflow.rollout.rewards import score, single_turn
from tests.rollout.engines import TellingEngine, make_parts, say

PROMPT = Prompt(id="p7", text="2+2=", answer="4")
WORLD = World()
SIMULATED = World(disk=MemoryDisk(), is_real=False)


def returning(value: object) -> Callable[[Prompt, str], float]:
    """A reward function, called `judge`, whose author did not check its type."""

    def judge(prompt: Prompt, answer: str) -> float:
        return value  # type: ignore[return-value]  # that is what is tested

    return judge


@pytest.mark.parametrize("value", [1.0, 0, -2.5, np.float32(0.5), np.int64(3), Fraction(1, 2)])
async def test_numbers_of_every_kind_become_a_float(value: object) -> None:
    result = await score(returning(value), PROMPT, "4", WORLD)
    assert type(result) is float
    assert result == value


BAD = [math.nan, math.inf, -math.inf, None, "1.0", True, 1 + 0j, [1.0], 10**400, 1e300, np.float32("nan"), np.bool_(0)]


@pytest.mark.parametrize("value", BAD, ids=repr)
async def test_anything_else_is_an_error_that_names_function_value_and_prompt(value: object) -> None:
    with pytest.raises(RewardError, match=r"reward judge returned .* on prompt p7, answer '4'; expected") as caught:
        await score(returning(value), PROMPT, "4", WORLD)
    assert repr(value)[:20] in str(caught.value)


async def test_a_truth_value_is_answered_with_how_to_write_it() -> None:
    with pytest.raises(RewardError, match=r"returned True .* truth value: float\(\.\.\.\)"):
        await score(returning(True), PROMPT, "4", WORLD)


async def test_what_a_reward_raises_is_kept_as_the_cause() -> None:
    def broken(prompt: Prompt, answer: str) -> float:
        return 1 / 0

    with pytest.raises(RewardError, match=r"reward broken raised ZeroDivisionError.* on prompt p7") as caught:
        await score(broken, PROMPT, "x" * 500, WORLD)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "x" * 80 in str(caught.value)
    assert "x" * 81 not in str(caught.value)


async def test_errors_of_asyncflow_pass_through() -> None:
    async def judge(prompt: Prompt, answer: str) -> float:
        raise EngineLostError("the judge's engine died")

    with pytest.raises(EngineLostError):
        await score(judge, PROMPT, "4", WORLD)


class Judge:
    """A reward with a state: called by the name of its class."""

    async def __call__(self, prompt: Prompt, answer: str) -> float:
        await asyncio.sleep(5)
        return float(answer == prompt.answer)


def test_a_reward_may_be_a_coroutine_and_an_object() -> None:
    assert run_virtually(score(Judge(), PROMPT, "4", SIMULATED)) == 1.0
    assert run_virtually(score(Judge(), PROMPT, "5", SIMULATED)) == 0.0


async def test_a_failing_coroutine_is_named_too() -> None:
    class Failing:
        async def __call__(self, prompt: Prompt, answer: str) -> float:
            raise KeyError("no such answer")

    with pytest.raises(RewardError, match="reward Failing raised KeyError"):
        await score(Failing(), PROMPT, "4", WORLD)


async def test_a_plain_reward_is_computed_off_the_event_loop() -> None:
    """It waits for what happens on the loop meanwhile: on the loop itself, it would wait for ever."""
    release = threading.Event()

    def judge(prompt: Prompt, answer: str) -> float:
        return float(release.wait(30))

    async with asyncio.TaskGroup() as group:
        result = group.create_task(score(judge, PROMPT, "4", WORLD), name="score")
        await asyncio.sleep(0)
        release.set()
    assert result.result() == 1.0


async def test_a_coroutine_reward_stays_on_the_event_loop() -> None:
    threads: list[threading.Thread] = []

    async def judge(prompt: Prompt, answer: str) -> float:
        threads.append(threading.current_thread())
        return 1.0

    for reward in (judge, partial(judge), lambda prompt, answer: judge(prompt, answer)):
        assert await score(reward, PROMPT, "4", WORLD) == 1.0
    assert set(threads) == {threading.main_thread()}


@pytest.mark.parametrize("world", [WORLD, SIMULATED], ids=["real", "simulated"])
@pytest.mark.parametrize("error", [StopIteration(), asyncio.CancelledError("stray")], ids=repr)
async def test_errors_that_asyncio_gives_a_meaning_are_the_rewards_failure_too(
    error: BaseException, world: World
) -> None:
    def judge(prompt: Prompt, answer: str) -> float:
        raise error

    with pytest.raises(RewardError, match=r"reward judge .* on prompt p7"):
        await score(judge, PROMPT, "4", world)


class LeavingError(BaseException):
    """As libraries raise to get past every `except Exception`."""


@pytest.mark.parametrize("error", [SystemExit(2), LeavingError()], ids=repr)
@pytest.mark.parametrize("is_coroutine", [False, True])
async def test_a_reward_cannot_end_the_run(error: BaseException, is_coroutine: bool) -> None:
    """The user's checker calls `sys.exit()`: that is one failed answer, not the end of training."""

    def judge(prompt: Prompt, answer: str) -> float:
        raise error

    async def judge_later(prompt: Prompt, answer: str) -> float:
        return judge(prompt, answer)

    for world in (WORLD, SIMULATED):
        with pytest.raises(RewardError, match=rf"reward judge.* {type(error).__name__}\(.* on prompt p7"):
            await score(judge_later if is_coroutine else judge, PROMPT, "4", world)


def test_ctrl_c_during_a_coroutine_reward_is_still_ctrl_c() -> None:
    async def judge(prompt: Prompt, answer: str) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(score(judge, PROMPT, "4", WORLD))


async def test_a_stray_cancellation_in_a_coroutine_reward_is_its_failure() -> None:
    async def judge(prompt: Prompt, answer: str) -> float:
        raise asyncio.CancelledError("stray")

    with pytest.raises(RewardError, match=r"reward judge let CancelledError\('stray'\) escape on prompt p7"):
        await score(judge, PROMPT, "4", WORLD)


def test_a_single_turn_shows_the_prompt_once_and_rewards_the_text() -> None:
    seen: list[tuple[Prompt, str]] = []

    def judge(prompt: Prompt, answer: str) -> float:
        seen.append((prompt, answer))
        return 0.25

    engine = TellingEngine([say(5, 6, 0)])
    rollout = roll_out_one(PROMPT, make_parts(engine, single_turn(judge)), session="s", seed_keys=("k",))
    trajectory = run_virtually(rollout)
    assert seen == [(PROMPT, "5 6")]
    assert trajectory.reward == 0.25
    assert [call.token_ids.tolist() for call in engine.calls] == [[ord(character) for character in "2+2="]]


@pytest.mark.parametrize("value", [math.nan, None, "1"], ids=repr)
def test_an_agent_is_held_to_the_same_numbers(value: object) -> None:
    async def adventurer(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        return value  # type: ignore[return-value]  # that is what is tested

    rollout = roll_out_one(PROMPT, make_parts(TellingEngine(), adventurer), session="s", seed_keys=("k",))
    with pytest.raises(RewardError, match=r"agent adventurer returned .* on prompt p7"):
        run_virtually(rollout)
