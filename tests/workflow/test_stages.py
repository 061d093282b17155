"""Stages under the virtual clock: advantages over whole groups, reference log-probs on the right rows."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest

from asyncflow.algo.advantages import dr_grpo, grpo
from asyncflow.core.columns import ADVANTAGE, REF_LOGPROBS, REWARD, TOKEN_IDS
from asyncflow.core.config import AlgorithmConfig, RunConfig
from asyncflow.core.errors import NoSignalError
from asyncflow.core.types import FloatArray, MicroBatch, PolicyVersion, Prompt, Ragged, Ticket
from asyncflow.core.world import MemoryDisk, World
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.engines.scripted import Script, ScriptedTrainer
from asyncflow.plan.simulate import simulate
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Chat
from asyncflow.workflow.stages import ADVANTAGES, NO_SIGNAL, REFERENCE, advantage_stage, reference_stage, split_groups
from tests.workflow.batches import group_columns

WORLD = World(disk=MemoryDisk(), is_real=False)

_made: list[LocalQueue] = []


@pytest.fixture(autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


@dataclass(slots=True, kw_only=True)
class Reference(ScriptedTrainer):
    """Scores a token by its own number, and takes a second for each batch; keeps whose rows they were."""

    batches: list[set[Ticket]] = field(default_factory=list)

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        self.batches.append({*map(Ticket, batch.rows.tickets.tolist())})
        await asyncio.sleep(1)
        scores: FloatArray = -batch[TOKEN_IDS].astype(np.float32)
        return scores


def make_queue(*needs: str) -> LocalQueue:
    tasks = [
        QueueTask(name="train", needs=(TOKEN_IDS, *needs), trains=True),
        QueueTask(name=ADVANTAGES, needs=(REWARD,)),
        QueueTask(name=REFERENCE, needs=(TOKEN_IDS,)),
    ]
    queue = LocalQueue(tasks, Gate(groups_per_step=8, max_staleness=0, steps=9))
    _made.append(queue)
    return queue


async def put(queue: LocalQueue, *groups: Mapping[str, Ragged]) -> list[Ticket]:
    queue.advance(PolicyVersion(step=0))
    tickets = [await queue.reserve() for _ in groups]
    for ticket, columns in zip(tickets, groups, strict=True):
        await queue.put(ticket, columns)
    return tickets


async def beside(stages: Sequence[Callable[[], Awaitable[None]]], work: Awaitable[None]) -> None:
    """Do the work while the stages run, as the loop does."""

    async def forever(stage: Callable[[], Awaitable[None]]) -> None:
        await stage()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(forever(stage), name=f"stage {i}") for i, stage in enumerate(stages)]
        await work
        for task in tasks:
            task.cancel()


def test_advantages_are_those_of_each_group_by_itself() -> None:
    queue = make_queue(ADVANTAGE)
    rewards = {0: [1.0, 0.0, 0.0], 1: [5.0, 5.0, 8.0], 2: [0.0, 1.0, 1.0]}

    async def work() -> None:
        await put(queue, *(group_columns(values, [3, 2, 4]) for values in rewards.values()))
        lease = queue.lease("train")
        async for batch in queue.stream(lease, groups=3, max_tokens=5):  # rows of a group in several batches
            pairs = zip(batch.rows.tickets.tolist(), batch.rows.indices.tolist(), strict=True)
            for (ticket, index), advantage in zip(pairs, batch[ADVANTAGE], strict=True):
                assert advantage == pytest.approx(grpo(np.array(rewards[ticket], np.float32))[index])
        await queue.acknowledge(lease)

    run_virtually(beside([partial(advantage_stage, queue, grpo, drop_no_signal=False)], work()))
    assert queue.counts().trained == 3


def test_groups_without_signal_are_dropped_only_where_asked() -> None:
    groups = [group_columns(values, [2, 2]) for values in ([1.0, 1.0], [0.0, 1.0], [0.0, 0.0])]

    async def dropped(drop_no_signal: bool) -> Mapping[str, int]:
        queue = make_queue(ADVANTAGE)

        async def work() -> None:
            await put(queue, *groups)
            expected = {1} if drop_no_signal else {0, 1, 2}
            stream = queue.stream(queue.lease("train"), groups=len(expected), max_tokens=99)
            assert {ticket async for batch in stream for ticket in batch.rows.tickets.tolist()} == expected

        await beside([partial(advantage_stage, queue, dr_grpo, drop_no_signal=drop_no_signal)], work())
        return queue.counts().dropped

    assert run_virtually(dropped(True)) == {NO_SIGNAL: 2}
    assert run_virtually(dropped(False)) == {}


def test_reference_logprobs_land_on_their_rows_whatever_the_micro_batches() -> None:
    queue = make_queue(REF_LOGPROBS)

    async def work() -> None:
        await put(queue, *(group_columns([0.0] * 4, [7, 2, 5, 3], first_token=100 * i) for i in range(3)))
        lease = queue.lease("train")
        num_rows = 0
        async for batch in queue.stream(lease, groups=3, max_tokens=50):
            num_rows += len(batch.rows)
            assert batch[REF_LOGPROBS].tolist() == (-batch[TOKEN_IDS].astype(np.float32)).tolist()
            assert batch.columns[REF_LOGPROBS].lengths.tolist() == batch.lengths.tolist()
        await queue.acknowledge(lease)
        assert num_rows == 12

    reference = Reference(world=WORLD, script=Script())
    run_virtually(beside([partial(reference_stage, queue, reference, max_tokens=8)], work()))


def test_the_reference_scores_several_small_groups_at_once_and_none_waits_for_others() -> None:
    """Three groups of 6 tokens are ready, then one of 20, then one of 6; micro-batches hold 13 tokens."""
    queue = make_queue(REF_LOGPROBS)
    reference = Reference(world=WORLD, script=Script())
    small, large = group_columns([0.0, 1.0], [3, 3]), group_columns([0.0, 1.0], [12, 8])

    async def work() -> None:
        await put(queue, small, small, small, large, small)
        lease = queue.lease("train")
        async for _ in queue.stream(lease, groups=5, max_tokens=99):
            pass
        await queue.acknowledge(lease)

    run_virtually(beside([partial(reference_stage, queue, reference, max_tokens=13)], work()))
    assert reference.batches == [{0, 1}, {2}, {3}, {3}, {4}]


@pytest.mark.parametrize("seed", range(20))
def test_a_group_dropped_while_it_is_scored_is_passed_over(seed: int) -> None:
    """The advantage stage drops it between two of the reference's micro-batches: neither may stumble."""
    queue = make_queue(ADVANTAGE, REF_LOGPROBS)

    async def work() -> None:
        equal = group_columns([1.0] * 4, [7, 2, 5, 3])
        await put(queue, equal, group_columns([0.0, 1.0], [4, 4]), equal)
        batch = await queue.take(queue.lease("train"), max_groups=3)
        assert set(batch.rows.tickets.tolist()) == {1}

    stages = [
        partial(advantage_stage, queue, grpo, drop_no_signal=True),
        partial(reference_stage, queue, Reference(world=WORLD, script=Script()), max_tokens=8),
    ]
    run_virtually(beside(stages, work()), seed=seed)
    assert queue.counts().dropped == {NO_SIGNAL: 2}


def test_split_groups_keeps_rows_with_their_columns() -> None:
    async def main() -> None:
        queue = make_queue()
        await put(queue, group_columns([1.0, 2.0], [3, 2]), group_columns([3.0], [4], first_token=50))
        batch = await queue.take(queue.lease(ADVANTAGES), max_groups=2)
        groups = dict(split_groups(batch))
        assert {ticket: group[REWARD].tolist() for ticket, group in groups.items()} == {0: [1.0, 2.0], 1: [3.0]}
        assert groups[Ticket(0)].rows.indices.tolist() == [0, 1]

    run_virtually(main())


@pytest.mark.parametrize(("reward", "remedy"), [(0.0, "warmup.steps"), (1.0, "harder prompts")])
def test_groups_without_signal_end_the_run_before_it_drops_for_ever(reward: float, remedy: str) -> None:
    async def same(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        return reward

    config = RunConfig(steps=3, groups_per_step=2, group_size=2, algorithm=AlgorithmConfig(drop_no_signal=True), seed=1)
    with pytest.raises(NoSignalError, match=remedy):
        simulate(config, Script(), agent=same, seed=1)
    kept = config.model_copy(update={"algorithm": AlgorithmConfig(drop_no_signal=False)})
    assert simulate(kept, Script(), agent=same, seed=1).counts.trained == 6
