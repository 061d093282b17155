"""The transfer queue: who is served what, when, and what a cancelled wait leaves behind."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.core.errors import ColumnError, DeadlockError, LedgerError, QueueError
from asyncflow.core.types import PolicyVersion, Ticket
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.plan.virtual import run_virtually
from tests.data.local_queues import group, keep, make_queue, memory_is_given_back, named, ones, virtually, whole

__all__ = ["memory_is_given_back"]


def test_a_task_is_offered_a_group_when_its_columns_exist_and_not_before() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        await queue.put(ticket, group(ticket, 3, 2))
        score, train = queue.lease("score"), queue.lease("train")
        batch = await queue.take(score, max_groups=8)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(train, max_groups=8)
        await queue.write(score, batch, "advantage", ones(2))
        trained = await queue.take(train, max_groups=8)
        assert trained["token_ids"].tolist() == [0] * 5
        assert trained["advantage"].tolist() == [1.0, 1.0]

    virtually(main())


def test_a_parked_take_is_answered_by_the_put_itself() -> None:
    async def main() -> float:
        queue = make_queue()
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(queue.take(queue.lease("train"), max_groups=1), name="take")
            await asyncio.sleep(5)
            ticket = await queue.reserve()
            await queue.put(ticket, whole(ticket, 1))
            await waiting
        return asyncio.get_running_loop().time()

    assert virtually(main()) == 5.0


def test_workers_of_one_task_get_disjoint_groups() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=8)
        for _ in range(8):
            ticket = await queue.reserve()
            await queue.put(ticket, whole(ticket, 2))
        first = await queue.take(queue.lease("score"), max_groups=3)
        second = await queue.take(queue.lease("score"), max_groups=99)
        assert first.rows.tickets.tolist() == [0, 1, 2]
        assert second.rows.tickets.tolist() == [3, 4, 5, 6, 7]

    virtually(main())


def test_stream_gives_exactly_the_groups_asked_for_each_row_once() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=3)
        tickets = [await queue.reserve() for _ in range(6)]
        for ticket in (2, 0, 5, 1, 4, 3):  # finished in another order than admitted
            await queue.put(Ticket(tickets[ticket]), whole(ticket, 4, 1, 7))
        lease = queue.lease("train")
        batches = [batch async for batch in queue.stream(lease, groups=3, max_tokens=10)]
        rows = [row for batch in batches for row in named(batch.rows)]
        assert sorted(rows) == [(t, i) for t in range(3) for i in range(3)]
        assert all(batch.num_tokens <= 10 for batch in batches)
        for batch in batches:
            for (ticket, _), tokens in zip(named(batch.rows), batch.columns["token_ids"].rows(), strict=True):
                assert set(tokens.tolist()) == {ticket}

    virtually(main())


def test_inside_a_step_the_order_is_free_and_beyond_it_strict() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=2, max_staleness=1)
        for _ in range(4):
            await queue.reserve()
        lease = queue.lease("train")
        await queue.put(Ticket(2), whole(2, 1))  # of the next step: must wait for 0 and 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(lease, max_groups=1)
        await queue.put(Ticket(1), whole(1, 1))
        assert (await queue.take(lease, max_groups=9)).rows.tickets.tolist() == [1]
        await queue.put(Ticket(0), whole(0, 1))
        assert (await queue.take(lease, max_groups=9)).rows.tickets.tolist() == [0]
        await queue.acknowledge(lease)
        queue.begin_step(1)
        assert (await queue.take(lease, max_groups=9)).rows.tickets.tolist() == [2]

    virtually(main())


def test_look_ahead_lets_a_slow_group_be_passed_by_so_many_and_no_more() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=1, max_staleness=4, look_ahead=3)
        for _ in range(5):
            await queue.reserve()
        for ticket in (1, 2, 3, 4):
            await queue.put(Ticket(ticket), whole(ticket, 1))
        lease = queue.lease("train")
        for step, expected in enumerate((1, 2)):
            queue.begin_step(step)
            assert (await queue.take(lease, max_groups=1)).rows.tickets.tolist() == [expected]
            await queue.acknowledge(lease)
        queue.begin_step(2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(lease, max_groups=1)
        await queue.put(Ticket(0), whole(0, 1))
        assert (await queue.take(lease, max_groups=1)).rows.tickets.tolist() == [0]

    virtually(main())


def test_released_groups_are_offered_again_and_acknowledged_ones_are_gone() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        await queue.put(ticket, whole(ticket, 2))
        lost = queue.lease("train")
        await queue.take(lost, max_groups=1)
        queue.release(lost)
        kept = queue.lease("train")
        assert (await queue.take(kept, max_groups=1)).rows.tickets.tolist() == [ticket]
        await queue.acknowledge(kept)
        assert queue.num_groups_held == 0
        assert (queue.counts().trained, queue.counts().pending) == (1, 0)

    virtually(main())


def test_a_full_gate_parks_reserve_until_weights_advance_or_a_group_is_dropped() -> None:
    async def main() -> list[int]:
        queue = make_queue(groups_per_step=1, max_staleness=1)
        served: list[int] = []

        async def producer() -> None:
            served.append(await queue.reserve())

        async with asyncio.TaskGroup() as tasks:
            for i in range(4):
                tasks.create_task(producer(), name=f"producer {i}")
            await asyncio.sleep(1)
            assert sorted(served) == [0, 1]
            queue.drop(Ticket(0), reason="failed")
            await asyncio.sleep(1)
            assert sorted(served) == [0, 1, 2]
            queue.advance(PolicyVersion(step=1))
        assert queue.counts().dropped == {"failed": 1}
        return sorted(served)

    assert virtually(main()) == [0, 1, 2, 3]


def test_nothing_starts_before_weights_are_live() -> None:
    async def main() -> None:
        gate = Gate(groups_per_step=2, max_staleness=3, steps=9)
        queue = keep(LocalQueue([QueueTask(name="train", needs=("token_ids",), trains=True)], gate))
        await queue.reserve()

    with pytest.raises(DeadlockError, match="main waits in"):
        virtually(main())


@pytest.mark.parametrize("seed", range(40))
def test_a_ticket_granted_to_a_cancelled_producer_is_issued_again(seed: int) -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=1, max_staleness=0)
        first = await queue.reserve()
        async with asyncio.TaskGroup() as tasks:
            doomed = tasks.create_task(queue.reserve(), name="doomed")
            await asyncio.sleep(1)
            queue.drop(first, reason="failed")  # grants to the doomed one, which is cancelled in the same turn
            doomed.cancel()
        assert await queue.reserve() == 1
        assert queue.counts().pending == 1

    run_virtually(main(), seed=seed)


@pytest.mark.parametrize("seed", range(40))
def test_groups_granted_to_a_cancelled_consumer_are_offered_again(seed: int) -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        lease = queue.lease("train")
        async with asyncio.TaskGroup() as tasks:
            doomed = tasks.create_task(queue.take(lease, max_groups=1), name="doomed")
            await asyncio.sleep(1)
            await queue.put(ticket, whole(ticket, 1))
            doomed.cancel()
        assert queue.control.ledger.num_ready("train") == 1  # nobody holds it
        assert (await queue.take(lease, max_groups=1)).rows.tickets.tolist() == [ticket]

    run_virtually(main(), seed=seed)


def test_wrong_use_is_refused_with_a_reason() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        with pytest.raises(ColumnError, match="advantage has 1 rows, the columns before it have 2"):
            await queue.put(ticket, {**group(ticket, 1, 1), "advantage": ones(1)})
        await queue.put(ticket, group(ticket, 1, 1))
        with pytest.raises(QueueError, match="ticket 0 is not reserved"):
            await queue.put(ticket, group(ticket, 1, 1))
        score = queue.lease("score")
        batch = await queue.take(score, max_groups=1)
        await queue.write(score, batch, "advantage", ones(2))
        with pytest.raises(ColumnError, match="a column is written once"):
            await queue.write(score, batch, "advantage", ones(2))
        lease = queue.lease("train")
        await queue.take(lease, max_groups=1)
        with pytest.raises(LedgerError, match="being trained"):
            queue.drop(ticket, reason="late")
        await queue.acknowledge(lease)
        with pytest.raises(LedgerError, match="not pending"):
            queue.drop(ticket, reason="late")
        with pytest.raises(QueueError, match="no task 'tain'"):
            queue.lease("tain")
        with pytest.raises(LedgerError, match="went back"):
            queue.advance(PolicyVersion(step=-1))

    virtually(main())


def test_a_refused_put_leaves_nothing_behind() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        with pytest.raises(QueueError, match="not reserved"):
            await queue.put(Ticket(99), group(99, 1))
        assert (queue.control.num_blocks, queue.counts().pending) == (0, 1)
        await queue.put(ticket, group(ticket, 1))
        with pytest.raises(QueueError, match="not reserved"):
            await queue.put(ticket, group(5, 3))
        assert queue.control.num_blocks == 1
        batch = await queue.take(queue.lease("score"), max_groups=1)
        assert batch["token_ids"].tolist() == [ticket]

    virtually(main())
