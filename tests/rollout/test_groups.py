"""Groups: all siblings or none, whatever the agent, the engine or the clock does; no task is left.

`run_virtually` itself refuses to return while a task is left.
"""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.errors import (
    AgentError,
    AsyncFlowError,
    EngineLostError,
    NonFiniteError,
    RewardError,
    RolloutError,
    RolloutTimeout,
)
from asyncflow.core.types import Prompt, Ticket
from asyncflow.core.world import World, derive_seed
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Agent, Chat
from asyncflow.rollout.groups import prompt_order, roll_out_group, roll_out_one
from asyncflow.rollout.rewards import single_turn
from tests.rollout.engines import SilentEngine, TellingEngine, make_parts

PROMPT = Prompt(id="p7", text="2+2=", answer="4")


async def answer(prompt: Prompt, chat: Chat) -> float:
    await chat.respond(prompt.text)
    return 1.0


def failing_at(call: int, error: BaseException) -> Agent:
    """The agent of the first siblings asks and waits; sibling number `call` raises."""
    begun: list[int] = []

    async def agent(prompt: Prompt, chat: Chat) -> float:
        begun.append(1)
        if len(begun) == call:
            await asyncio.sleep(1)  # until the others wait for the engine
            raise error
        return await answer(prompt, chat)

    return agent


def test_siblings_are_in_order_with_seeds_and_sessions_of_their_own() -> None:
    engine = TellingEngine()
    group = run_virtually(roll_out_group(Ticket(5), PROMPT, 3, make_parts(engine, answer)))
    assert (group.ticket, group.prompt, len(group.trajectories)) == (5, PROMPT, 3)
    assert [call.session for call in engine.calls] == ["5.0", "5.1", "5.2"]
    seeds = [call.params.seed for call in engine.calls]
    assert seeds == [derive_seed(derive_seed(3, "rollout", 5, index), 0) for index in range(3)]
    assert len(set(seeds)) == 3


def test_a_group_that_is_issued_again_is_sampled_with_the_same_seeds() -> None:
    first, second = TellingEngine(), TellingEngine()
    for engine in (first, second):
        run_virtually(roll_out_group(Ticket(5), PROMPT, 2, make_parts(engine, answer)))
    assert [call.params for call in first.calls] == [call.params for call in second.calls]


def test_a_rollout_that_outlives_its_limit_names_setting_and_prompt() -> None:
    engine = SilentEngine()

    async def main() -> None:
        with pytest.raises(RolloutTimeout, match=r"prompt p7 took over rollout.time_limit_s = 60 seconds"):
            await roll_out_group(Ticket(0), PROMPT, 3, make_parts(engine, answer))
        assert asyncio.get_running_loop().time() == 60

    run_virtually(main())
    assert (engine.num_waiting, engine.num_aborted) == (3, 3)


def test_an_agents_own_timeout_is_its_failure_not_the_rollouts() -> None:
    parts = make_parts(SilentEngine(), failing_at(1, TimeoutError("the tool took too long")))
    with pytest.raises(AgentError, match=r"the agent raised TimeoutError\('the tool took too long'\) on prompt p7"):
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, parts))


def test_a_stray_cancellation_in_an_agent_is_its_failure() -> None:
    """A task of the agent's own was cancelled; swallowed as ours, it would end a producer without a word."""

    async def agent(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        tool: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(1, tool.cancel)
        return await tool

    with pytest.raises(AgentError, match=r"the agent let CancelledError.* escape on prompt p7"):
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, make_parts(TellingEngine(), agent)))


def test_an_agent_cannot_end_the_run() -> None:
    parts = make_parts(SilentEngine(), failing_at(1, SystemExit(2)))
    with pytest.raises(AgentError, match=r"the agent let SystemExit\(2\) escape on prompt p7"):
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, parts))


def test_ctrl_c_during_an_agent_is_still_ctrl_c() -> None:
    async def agent(prompt: Prompt, chat: Chat) -> float:
        raise KeyboardInterrupt

    rollout = roll_out_one(PROMPT, make_parts(SilentEngine(), agent), session="s", seed_keys=("k",))
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(rollout)


def test_cancelling_a_group_cancels_it() -> None:
    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await roll_out_group(Ticket(0), PROMPT, 2, make_parts(SilentEngine(), answer))

    run_virtually(main())


@pytest.mark.parametrize("call", [1, 2, 3])
def test_one_failing_sibling_aborts_the_others(call: int) -> None:
    engine = SilentEngine()
    with pytest.raises(AgentError, match=r"raised KeyError\('x'\)") as caught:
        run_virtually(roll_out_group(Ticket(0), PROMPT, 3, make_parts(engine, failing_at(call, KeyError("x")))))
    assert isinstance(caught.value, RolloutError)
    assert caught.value.reason == "agent"
    assert (engine.num_waiting, engine.num_aborted) == (2, 2)


def test_an_agent_that_asks_nothing_has_nothing_to_train_on() -> None:
    async def idle(prompt: Prompt, chat: Chat) -> float:
        return 1.0

    with pytest.raises(AgentError, match="without letting the policy respond, on prompt p7"):
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, make_parts(TellingEngine(), idle)))


def test_a_failing_reward_fails_the_group_with_its_reason() -> None:
    def judge(prompt: Prompt, answer: str) -> float:
        return float("nan")

    with pytest.raises(RewardError, match="reward judge returned nan") as caught:
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, make_parts(TellingEngine(), single_turn(judge))))
    assert caught.value.reason == "reward"


@pytest.mark.parametrize("error", [EngineLostError("died"), NonFiniteError("nan"), RolloutError("too long")])
def test_errors_of_the_engine_are_passed_on_as_they_are(error: AsyncFlowError) -> None:
    with pytest.raises(type(error)) as caught:
        run_virtually(roll_out_group(Ticket(0), PROMPT, 3, make_parts(TellingEngine(error=error), answer)))
    assert caught.value is error


def test_a_lost_engine_outranks_a_failed_agent_beside_it() -> None:
    begun: list[int] = []

    async def agent(prompt: Prompt, chat: Chat) -> float:
        begun.append(1)
        if len(begun) == 1:
            raise KeyError("first, but only a failed rollout")
        return await answer(prompt, chat)

    engine = TellingEngine(error=EngineLostError("died"))
    with pytest.raises(EngineLostError):
        run_virtually(roll_out_group(Ticket(0), PROMPT, 2, make_parts(engine, agent)))


@given(num_prompts=st.integers(1, 12), seed=st.integers(0, 99))
def test_every_prompt_comes_once_in_an_epoch(num_prompts: int, seed: int) -> None:
    prompts = [Prompt(id=str(index), text="") for index in range(num_prompts)]
    prompt_of = prompt_order(prompts, World(seed=seed))
    for epoch in range(3):
        tickets = range(epoch * num_prompts, (epoch + 1) * num_prompts)
        assert Counter(prompt_of(Ticket(ticket)).id for ticket in tickets) == Counter(one.id for one in prompts)


@given(st.lists(st.integers(0, 200), max_size=20))
def test_the_prompt_of_a_ticket_depends_on_nothing_asked_before(asked: list[int]) -> None:
    prompts = [Prompt(id=str(index), text="") for index in range(17)]
    fresh, used = prompt_order(prompts, World(seed=1)), prompt_order(prompts, World(seed=1))
    for ticket in asked:
        used(Ticket(ticket))
    for ticket in (0, 16, 17, 99):
        assert used(Ticket(ticket)) == fresh(Ticket(ticket))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    prompts = [Prompt(id=str(index), text="") for index in range(20)]

    def epoch(number: int, seed: int) -> list[str]:
        prompt_of = prompt_order(prompts, World(seed=seed))
        return [prompt_of(Ticket(number * 20 + place)).id for place in range(20)]

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2), [one.id for one in prompts]]
    assert len({tuple(order) for order in orders}) == 4
