"""Rolling out a group: G siblings of one prompt at once, all or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asyncflow.core.causes import first_cause
from asyncflow.core.errors import AgentError, AsyncFlowError, RolloutTimeout
from asyncflow.core.ports import Renderer, RolloutEngine
from asyncflow.core.types import Group, Prompt, SamplingParams, Ticket, Trajectory
from asyncflow.core.world import World, derive_seed
from asyncflow.rollout.chat import Agent, Chat
from asyncflow.rollout.rewards import checked, is_meant_for_us, name_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutParts:
    """What every rollout of a run shares. `params` lacks its seed, which each rollout derives.

    A rollout is given `time_limit_s`, its wait for the engine included.
    """

    engine: RolloutEngine
    renderer: Renderer
    agent: Agent
    params: SamplingParams
    time_limit_s: float
    world: World


async def roll_out_group(ticket: Ticket, prompt: Prompt, group_size: int, parts: RolloutParts) -> Group:
    """All siblings of a group, sampled at once.

    Raises `RolloutError` when the agent or the reward failed or the time ran out; the other
    siblings are aborted then. Errors of the engine are passed on as they are.
    """
    try:
        async with asyncio.TaskGroup() as siblings:
            tasks = [
                siblings.create_task(
                    roll_out_one(prompt, parts, session=f"{ticket}.{index}", seed_keys=("rollout", ticket, index)),
                    name=f"rollout {ticket}.{index}",
                )
                for index in range(group_size)
            ]
    except BaseExceptionGroup as group:
        raise first_cause(group) from group
    return Group(ticket=ticket, prompt=prompt, trajectories=tuple(task.result() for task in tasks))


async def roll_out_one(
    prompt: Prompt, parts: RolloutParts, *, session: str, seed_keys: Sequence[int | str]
) -> Trajectory:
    """One trajectory of the agent on a prompt. Raises `RolloutError`, `RolloutTimeout` when the time ran out."""
    seed = derive_seed(parts.world.seed, *seed_keys)
    chat = Chat(parts.engine, parts.renderer, replace(parts.params, seed=seed), session, parts.world)
    try:
        async with asyncio.timeout(parts.time_limit_s):
            reward = await _run_agent(prompt, chat, parts.agent)
    except TimeoutError as error:
        raise RolloutTimeout(
            f"prompt {prompt.id} took over rollout.time_limit_s = {parts.time_limit_s:g} seconds"
        ) from error
    if chat.num_turns == 0:
        raise AgentError(f"the agent returned without letting the policy respond, on prompt {prompt.id}")
    return chat.trajectory(prompt, checked(reward, f"agent {name_of(parts.agent)}", f"prompt {prompt.id}"))


async def _run_agent(prompt: Prompt, chat: Chat, agent: Agent) -> float:
    """What the agent returns. Whatever it raises by itself is its failure.

    So is a `CancelledError` that nobody asked for, which would end our task without a word,
    and a `SystemExit`, which would end the run.
    """
    try:
        return await agent(prompt, chat)
    except AsyncFlowError:
        raise
    except Exception as error:
        raise AgentError(f"the agent raised {error!r} on prompt {prompt.id}") from error
    except BaseException as error:
        if is_meant_for_us(error):
            raise
        raise AgentError(f"the agent let {error!r} escape on prompt {prompt.id}") from error


def prompt_order(prompts: Sequence[Prompt], world: World) -> Callable[[Ticket], Prompt]:
    """Which prompt a ticket is: each data epoch in an order of its own, known from the ticket alone.

    So a resumed run needs no cursor, and a ticket that is issued again is the same prompt.
    """
    orders: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}

    def prompt_of(ticket: Ticket) -> Prompt:
        epoch, place = divmod(ticket, len(prompts))
        if epoch not in orders:
            orders[epoch] = world.rng("order", epoch).permutation(len(prompts))
        return prompts[int(orders[epoch][place])]

    return prompt_of
