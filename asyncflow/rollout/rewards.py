"""Rewards: from a function on text to an agent whose result can be trusted to be a number."""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Callable

from asyncflow.core.errors import AsyncFlowError, RewardError
from asyncflow.core.types import Prompt
from asyncflow.rollout.chat import Agent, Chat

Reward = Callable[[Prompt, str], float | Awaitable[float]]
"""What a completion to a prompt is worth; may be a coroutine function."""


def single_turn(reward: Reward) -> Agent:
    """The agent that shows the prompt, lets the policy answer once, and rewards the answer."""

    async def agent(prompt: Prompt, chat: Chat) -> float:
        return await score(reward, prompt, await chat.respond(prompt.text))

    return agent


async def score(reward: Reward, prompt: Prompt, answer: str) -> float:
    """The reward of an answer. Raises `RewardError`, with the function's name, unless it is a finite number."""
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        value = reward(prompt, answer)
        if inspect.isawaitable(value):
            value = await value
    except AsyncFlowError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name} raised {error!r} on prompt {prompt.id}, answer {answer[:80]!r}") from error
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RewardError(
            f"reward {name} returned {value!r} on prompt {prompt.id}, answer {answer[:80]!r}; expected a finite number"
        )
    return float(value)
