"""Rewards: from a function on text to an agent whose result can be trusted to be a number."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable
from numbers import Real

import numpy as np

from asyncflow.core.errors import AsyncFlowError, RewardError
from asyncflow.core.types import Prompt
from asyncflow.core.world import World
from asyncflow.rollout.chat import Agent, Chat

Reward = Callable[[Prompt, str], float | Awaitable[float]]
"""What a completion to a prompt is worth.

A plain function is called in threads, several completions at once: what it shares between
calls, it must lock, and it can't use signals. A coroutine function is called on the event
loop, one step of it at a time: it must not block.
"""

LARGEST = float(np.finfo(np.float32).max)
"""A larger reward would be infinite in its column."""


def single_turn(reward: Reward) -> Agent:
    """The agent that shows the prompt, lets the policy answer once, and rewards the answer."""

    async def agent(prompt: Prompt, chat: Chat) -> float:
        return await score(reward, prompt, await chat.respond(prompt.text), chat.world)

    return agent


async def score(reward: Reward, prompt: Prompt, answer: str, world: World) -> float:
    """The reward of an answer. Raises `RewardError`, with the function's name, unless it is a finite number."""
    where = f"prompt {prompt.id}, answer {answer[:80]!r}"
    try:
        value = await _call(reward, prompt, answer, world)
    except AsyncFlowError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name_of(reward)} raised {error!r} on {where}") from error
    except BaseException as error:
        if is_meant_for_us(error):
            raise
        raise RewardError(f"reward {name_of(reward)} let {error!r} escape on {where}") from error
    return checked(value, f"reward {name_of(reward)}", where)


async def _call(reward: Reward, prompt: Prompt, answer: str, world: World) -> float:
    """What the reward returns; computed off the event loop unless it is a coroutine function."""
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        value = reward(prompt, answer)
    else:
        value = await world.run_foreign(lambda: reward(prompt, answer))
    return await value if inspect.isawaitable(value) else value


def is_meant_for_us(error: BaseException) -> bool:
    """Whether what is no `Exception` came through a user's code from outside: a cancellation, Ctrl-C, a closed loop.

    If nobody asked the running task to end, a `CancelledError` in it is a stray one; a
    `SystemExit` is always the user's.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    return isinstance(error, KeyboardInterrupt | GeneratorExit)


def checked(value: object, who: str, where: str) -> float:
    """A reward as a float. Raises `RewardError` unless it is a number that is finite as a float32, too.

    A truth value is refused: it is nearly always a comparison that was meant to be one part of the reward.
    """
    number = _as_float(value)
    if abs(number) <= LARGEST:
        return number
    hint = "; of a truth value: float(...)" if isinstance(value, bool) else ""
    raise RewardError(f"{who} returned {value!r:.80} on {where}; expected a finite number{hint}")


def name_of(function: object) -> str:
    """The name of a function; of any other callable, that of its class."""
    name = getattr(function, "__name__", type(function).__name__)
    return str(name)


def _as_float(value: object) -> float:
    """NaN for what is no number, infinity for one too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
