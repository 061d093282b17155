"""A queue whose memory is full: who goes on, who waits, and when everybody is told that it is too small."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence

import numpy as np
import pytest

from asyncflow.core.config import AlgorithmConfig, RunConfig, SamplingConfig, TrainConfig
from asyncflow.core.errors import QueueFullError
from asyncflow.core.types import PolicyVersion, Ragged, Ticket
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_memory import LocalMemory
from asyncflow.data.local_queue import LocalQueue
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import simulate
from asyncflow.plan.virtual import run_virtually
from asyncflow.workflow import reinforce
from tests.data.arenas import arenas_open

MEMORY = 1 << 18
"""Three quarters of it for puts, the rest for writes."""

TRAIN = QueueTask(name="train", needs=("token_ids",), trains=True)
SCORE = QueueTask(name="score", needs=("token_ids",))
GATE = Gate(groups_per_step=4, max_staleness=1, steps=9)
SCRIPT = Script(num_tokens=lambda rng: int(rng.integers(100, 129)), completion_s=lambda rng: float(rng.random()))


def full(num_bytes: int) -> dict[str, Ragged]:
    """A group of one row of so many bytes."""
    return {"token_ids": Ragged.stack([np.zeros(num_bytes // 4, np.int32)])}


def virtually(main: Coroutine[None, None, None]) -> None:
    run_virtually(main, seed=1)
    assert arenas_open() == []


async def begun(*tasks: QueueTask, reserve: int = 0) -> LocalQueue:
    queue = LocalQueue(tasks, GATE, memory_bytes=MEMORY)
    queue.advance(PolicyVersion(step=0))
    for _ in range(reserve):
        await queue.reserve()
    return queue


async def put_all(queue: LocalQueue, tickets: Sequence[int], num_bytes: int) -> None:
    async with asyncio.TaskGroup() as group:
        for ticket in tickets:
            group.create_task(queue.put(Ticket(ticket), full(num_bytes)), name=f"put {ticket}")


async def together(*work: Coroutine[None, None, None]) -> None:
    async with asyncio.TaskGroup() as group:
        for number, one in enumerate(work):
            group.create_task(one, name=f"work {number}")


def limited(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs get this little memory; who had to wait for it."""
    waited: list[str] = []
    wait = LocalMemory._wait

    async def counted(self: LocalMemory, one: object) -> None:
        waited.append("put" if getattr(one, "ticket") >= 0 else "write")  # noqa: B009 - private
        await wait(self, one)  # type: ignore[arg-type]

    def small(*args: object, memory_bytes: int, **rest: object) -> LocalQueue:
        return LocalQueue(*args, memory_bytes=MEMORY, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalMemory, "_wait", counted)
    monkeypatch.setattr(reinforce, "LocalQueue", small)
    return waited


def config(groups_per_step: int, kl_coef: float) -> RunConfig:
    return RunConfig(
        steps=4,
        groups_per_step=groups_per_step,
        group_size=8,
        max_staleness=1,
        sampling=SamplingConfig(max_tokens=128),
        algorithm=AlgorithmConfig(kl_coef=kl_coef),
        train=TrainConfig(micro_batch_tokens=512),
    )


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_with_room_for_little_more_than_a_step_goes_on_slowly(
    monkeypatch: pytest.MonkeyPatch, kl_coef: float, seed: int
) -> None:
    waited = limited(monkeypatch)
    result = simulate(config(8, kl_coef), SCRIPT, seed=seed)
    assert result.counts.trained == 32
    assert "put" in waited


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_without_room_for_a_step_ends_and_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, kl_coef: float, seed: int
) -> None:
    limited(monkeypatch)
    with pytest.raises(QueueFullError, match=r"Raise queue\.memory_mb"):
        simulate(config(24, kl_coef), SCRIPT, seed=seed)


def test_a_group_larger_than_the_memory_is_refused_with_the_setting() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, reserve=1)
        with pytest.raises(QueueFullError, match=r"no room for .* bytes.*Raise queue\.memory_mb"):
            await queue.put(Ticket(0), full(MEMORY))
        queue.close()

    virtually(main())


def test_a_trainer_that_waits_for_the_rest_of_a_step_frees_nothing() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, reserve=4)

        async def train() -> None:
            lease = queue.lease("train")
            async for _ in queue.stream(lease, groups=4, max_tokens=1 << 20):
                pass

        with pytest.raises(ExceptionGroup) as caught:
            await together(train(), put_all(queue, range(4), 64_000))
        assert caught.group_contains(QueueFullError, match="queue.memory_mb")
        queue.close()

    virtually(main())


def test_whoever_parks_last_ends_the_waiting() -> None:
    """The trainer still computes when the put begins to wait, and then waits for more than there is room for."""

    async def main() -> None:
        queue = await begun(TRAIN, reserve=4)

        async def train() -> None:
            lease = queue.lease("train")
            await asyncio.sleep(1)
            await queue.take(lease, max_groups=3)
            await asyncio.sleep(8)
            await queue.take(lease, max_groups=1)

        with pytest.raises(ExceptionGroup) as caught:
            await together(train(), put_all(queue, range(4), 64_000))
        assert caught.group_contains(QueueFullError, match="queue.memory_mb")
        assert asyncio.get_running_loop().time() == 9
        queue.close()

    virtually(main())


def test_a_put_waits_as_long_as_a_group_is_rolled_out_that_may_end_the_step() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, reserve=4)

        async def late() -> None:
            await asyncio.sleep(7)
            queue.drop(Ticket(1), reason="failed")

        async def train() -> None:
            lease = queue.lease("train")
            await queue.take(lease, max_groups=1)
            await asyncio.sleep(3)
            await queue.acknowledge(lease, step=1)
            async for _ in queue.stream(lease, groups=2, max_tokens=1 << 20, at_once=True):
                pass

        async with asyncio.TaskGroup() as group:
            group.create_task(train(), name="train")
            group.create_task(late(), name="late")
            group.create_task(put_all(queue, [0, 2, 3], 90_000), name="puts")
        assert asyncio.get_running_loop().time() == 7
        queue.close()

    virtually(main())


def test_younger_groups_leave_room_for_those_before_them() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, reserve=6)
        order: list[int] = []

        async def put(ticket: int, after_s: float) -> None:
            await asyncio.sleep(after_s)
            await queue.put(Ticket(ticket), full(40_000))  # there is room for four
            order.append(ticket)

        async def train() -> None:
            lease = queue.lease("train")
            async for _ in queue.stream(lease, groups=4, max_tokens=1 << 20):
                pass
            await queue.acknowledge(lease, step=1)

        async with asyncio.TaskGroup() as group:
            group.create_task(train(), name="train")
            for ticket in range(6):
                group.create_task(put(ticket, 10.0 - ticket), name=f"put {ticket}")
        assert order[:4] == [3, 2, 1, 0]
        queue.close()

    virtually(main())


def column(num_bytes: int) -> Ragged:
    """For a batch of one row."""
    return Ragged.stack([np.zeros(num_bytes // 4, np.int32)])


def test_a_write_has_room_of_its_own_and_waits_where_that_is_full_too() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, SCORE, reserve=3)
        await put_all(queue, range(3), 64_000)
        one, two, train = queue.lease("score"), queue.lease("score"), queue.lease("train")
        batch = await queue.take(one, max_groups=1)
        await queue.take(two, max_groups=2)
        await queue.take(train, max_groups=3)
        async with asyncio.timeout(1):
            await queue.write(one, batch, "first", column(40_000))  # in the room that puts can't have

        async def write() -> None:
            await queue.write(one, batch, "second", column(40_000))
            assert asyncio.get_running_loop().time() == 4
            await queue.acknowledge(one)

        async with asyncio.TaskGroup() as group:
            group.create_task(write(), name="write")
            await asyncio.sleep(4)
            await queue.acknowledge(two)
            await queue.acknowledge(train, step=1)
        assert queue.control.num_blocks == 0
        queue.close()

    virtually(main())


def test_a_write_for_which_nobody_can_make_room_ends_the_waiting_too() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, SCORE, reserve=3)
        await put_all(queue, range(3), 64_000)
        score, train = queue.lease("score"), queue.lease("train")

        async def write() -> None:
            batch = await queue.take(score, max_groups=1)
            await queue.write(score, batch, "first", column(40_000))
            await asyncio.sleep(2)
            await queue.write(score, batch, "second", column(40_000))

        async def stream() -> None:
            async for _ in queue.stream(train, groups=4, max_tokens=1 << 20):
                pass

        with pytest.raises(ExceptionGroup) as caught:
            await together(write(), stream())
        assert caught.group_contains(QueueFullError, match="no room for 40,")
        queue.close()

    virtually(main())


def test_a_lease_ends_with_its_acknowledgement() -> None:
    async def main() -> None:
        queue = await begun(TRAIN, reserve=4)
        for ticket in range(4):
            await queue.put(Ticket(ticket), full(64))
            lease = queue.lease("train")
            await queue.take(lease, max_groups=1)
            await queue.acknowledge(lease, step=ticket)
            queue.begin_step(ticket + 1)
        assert queue._session.leases == {}
        await queue.acknowledge(lease)  # nothing was taken since
        assert queue._session.leases == {}
        queue.close()

    virtually(main())


def test_how_many_groups_fit_is_counted_in_the_order_in_which_they_are_given() -> None:
    async def main() -> None:
        queue = await begun(SCORE, TRAIN, reserve=3)
        for ticket, length in enumerate((2, 6, 2)):
            await queue.put(Ticket(ticket), full(4 * length))
        one, two = queue.lease("score"), queue.lease("score")
        for lease in (one, two):
            await queue.take(lease, max_groups=1)
        queue.release(one)
        queue.release(two)  # offered first of all now: 1, 0, 2
        found = [batch.rows.tickets.tolist() async for batch in queue.stream_ready(one, max_tokens=6)]
        assert found == [[1]]
        queue.close()

    virtually(main())
