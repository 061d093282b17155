"""The transfer queue: who is served what, when, and what a cancelled wait leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import numpy as np
import pytest

from asyncflow.core.errors import DeadlockError, LedgerError
from asyncflow.core.types import PolicyVersion, Ragged, Ticket
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask, Transition
from asyncflow.data.queue import TransferQueue
from asyncflow.plan.virtual import run_virtually

ResultT = TypeVar("ResultT")


def virtually(main: Coroutine[None, None, ResultT]) -> ResultT:
    return run_virtually(main, seed=3)


def make_queue(
    groups_per_step: int = 2, max_staleness: int = 1, look_ahead: int = 1, journal: list[Transition] | None = None
) -> TransferQueue:
    tasks = [
        QueueTask(name="train", needs=("token_ids", "advantage"), trains=True),
        QueueTask(name="score", needs=("token_ids",)),
    ]
    gate = Gate(groups_per_step=groups_per_step, max_staleness=max_staleness, steps=100, look_ahead=look_ahead)
    queue = TransferQueue(tasks, gate, journal=journal.append if journal is not None else lambda _: None)
    queue.advance(PolicyVersion(step=0))
    return queue


def group(ticket: int, *lengths: int) -> dict[str, Ragged]:
    """Rows whose every token is the ticket's number."""
    return {"token_ids": Ragged.stack([np.full(n, ticket, np.int32) for n in lengths])}


def whole(ticket: int, *lengths: int) -> dict[str, Ragged]:
    return {**group(ticket, *lengths), "advantage": ones(len(lengths))}


def ones(num_rows: int) -> Ragged:
    return Ragged(values=np.ones(num_rows, np.float32), lengths=np.ones(num_rows, np.int32))


def test_a_task_is_offered_a_group_when_its_columns_exist_and_not_before() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        queue.put(ticket, group(ticket, 3, 2))
        score, train = queue.lease("score"), queue.lease("train")
        batch = await queue.take(score, max_groups=8)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(train, max_groups=8)
        queue.write(batch, "advantage", ones(2))
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
            queue.put(ticket, whole(ticket, 1))
            await waiting
        return asyncio.get_running_loop().time()

    assert virtually(main()) == 5.0


def test_workers_of_one_task_get_disjoint_groups() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=8)
        for _ in range(8):
            ticket = await queue.reserve()
            queue.put(ticket, whole(ticket, 2))
        first = await queue.take(queue.lease("score"), max_groups=3)
        second = await queue.take(queue.lease("score"), max_groups=99)
        assert [row.ticket for row in first.rows] == [0, 1, 2]
        assert [row.ticket for row in second.rows] == [3, 4, 5, 6, 7]

    virtually(main())


def test_stream_gives_exactly_the_groups_asked_for_each_row_once() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=3)
        tickets = [await queue.reserve() for _ in range(6)]
        for ticket in (2, 0, 5, 1, 4, 3):  # finished in another order than admitted
            queue.put(Ticket(tickets[ticket]), whole(ticket, 4, 1, 7))
        lease = queue.lease("train")
        batches = [batch async for batch in queue.stream(lease, groups=3, max_tokens=10)]
        rows = [row for batch in batches for row in batch.rows]
        assert sorted((row.ticket, row.index) for row in rows) == [(t, i) for t in range(3) for i in range(3)]
        assert all(batch.num_tokens <= 10 for batch in batches)
        for batch in batches:
            for row, tokens in zip(batch.rows, batch.columns["token_ids"].rows(), strict=True):
                assert set(tokens.tolist()) == {row.ticket}

    virtually(main())


def test_inside_a_step_the_order_is_free_and_beyond_it_strict() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=2, max_staleness=1)
        for _ in range(4):
            await queue.reserve()
        lease = queue.lease("train")
        queue.put(Ticket(2), whole(2, 1))  # of the next step: must wait for 0 and 1
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(lease, max_groups=1)
        queue.put(Ticket(1), whole(1, 1))
        assert (await queue.take(lease, max_groups=9)).rows[0].ticket == 1
        queue.put(Ticket(0), whole(0, 1))
        assert (await queue.take(lease, max_groups=9)).rows[0].ticket == 0
        queue.acknowledge(lease)
        queue.begin_step(1)
        assert (await queue.take(lease, max_groups=9)).rows[0].ticket == 2

    virtually(main())


def test_look_ahead_lets_a_slow_group_be_passed_by_so_many_and_no_more() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=1, max_staleness=4, look_ahead=3)
        for _ in range(5):
            await queue.reserve()
        for ticket in (1, 2, 3, 4):
            queue.put(Ticket(ticket), whole(ticket, 1))
        lease = queue.lease("train")
        for step, expected in enumerate((1, 2)):
            queue.begin_step(step)
            assert (await queue.take(lease, max_groups=1)).rows[0].ticket == expected
            queue.acknowledge(lease)
        queue.begin_step(2)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await queue.take(lease, max_groups=1)
        queue.put(Ticket(0), whole(0, 1))
        assert (await queue.take(lease, max_groups=1)).rows[0].ticket == 0

    virtually(main())


def test_released_groups_are_offered_again_and_acknowledged_ones_are_gone() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        queue.put(ticket, whole(ticket, 2))
        lost = queue.lease("train")
        await queue.take(lost, max_groups=1)
        queue.release(lost)
        kept = queue.lease("train")
        assert (await queue.take(kept, max_groups=1)).rows[0].ticket == ticket
        queue.acknowledge(kept)
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
        queue = TransferQueue([QueueTask(name="train", needs=("token_ids",), trains=True)], gate)
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
            queue.put(ticket, whole(ticket, 1))
            doomed.cancel()
        assert lease.tickets == []
        assert (await queue.take(lease, max_groups=1)).rows[0].ticket == ticket

    run_virtually(main(), seed=seed)


def test_wrong_use_is_refused_with_a_reason() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        with pytest.raises(LedgerError, match="differ in their number of rows"):
            queue.put(ticket, {**group(ticket, 1, 1), "advantage": ones(1)})
        queue.put(ticket, group(ticket, 1, 1))
        with pytest.raises(LedgerError, match="put twice"):
            queue.put(ticket, group(ticket, 1, 1))
        batch = await queue.take(queue.lease("score"), max_groups=1)
        queue.write(batch, "advantage", ones(2))
        with pytest.raises(LedgerError, match="written twice"):
            queue.write(batch, "advantage", ones(2))
        lease = queue.lease("train")
        await queue.take(lease, max_groups=1)
        with pytest.raises(LedgerError, match="being trained"):
            queue.drop(ticket, reason="late")
        queue.acknowledge(lease)
        with pytest.raises(LedgerError, match="not pending"):
            queue.drop(ticket, reason="late")
        with pytest.raises(LedgerError, match="no task 'tain'"):
            queue.lease("tain")
        with pytest.raises(LedgerError, match="went back"):
            queue.advance(PolicyVersion(step=-1))

    virtually(main())


def test_a_refused_put_leaves_nothing_behind() -> None:
    async def main() -> None:
        queue = make_queue()
        ticket = await queue.reserve()
        with pytest.raises(LedgerError):
            queue.put(Ticket(99), group(99, 1))
        assert queue.num_groups_held == 0
        queue.put(ticket, group(ticket, 1))
        with pytest.raises(LedgerError):
            queue.put(ticket, group(5, 3))
        batch = await queue.take(queue.lease("score"), max_groups=1)
        assert batch["token_ids"].tolist() == [ticket]

    virtually(main())


def test_every_transition_is_journalled_before_its_effect() -> None:
    async def main() -> None:
        journal: list[Transition] = []
        queue = make_queue(journal=journal)
        ticket = await queue.reserve()
        queue.put(ticket, whole(ticket, 2))
        lease = queue.lease("train")
        await queue.take(lease, max_groups=1)
        queue.acknowledge(lease)
        queue.drop(await queue.reserve(), reason="no signal")
        assert [(entry.kind, entry.ticket, entry.detail) for entry in journal] == [
            ("admitted", 0, ""),
            ("produced", 0, "1"),
            ("leased", 0, "train"),
            ("trained", 0, "train"),
            ("admitted", 1, ""),
            ("dropped", 1, "no signal"),
        ]

    virtually(main())


def test_a_queue_restored_from_a_snapshot_issues_the_unfinished_tickets_again() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=2, max_staleness=1)
        for _ in range(4):
            await queue.reserve()
        for ticket in (0, 1, 3):
            queue.put(Ticket(ticket), whole(ticket, 1))
        lease = queue.lease("train")
        await queue.take(lease, max_groups=2)
        queue.acknowledge(lease)
        snapshot = queue.snapshot()
        assert snapshot.pending == (2, 3)
        restored = TransferQueue(
            [QueueTask(name="train", needs=("token_ids",), trains=True)],
            Gate(groups_per_step=2, max_staleness=1, steps=100),
            snapshot=snapshot,
        )
        restored.advance(PolicyVersion(step=1))
        assert [await restored.reserve() for _ in range(4)] == [2, 3, 4, 5]
        assert restored.counts() == queue.counts().__class__(admitted=6, trained=2, dropped={}, pending=4)

    virtually(main())


def test_tickets_issued_again_wait_for_the_gate_of_the_resumed_run() -> None:
    """The run before had `max_staleness = 3`; this one is synchronous and shorter."""

    async def main() -> None:
        queue = make_queue(groups_per_step=2, max_staleness=3)
        for _ in range(8):
            await queue.reserve()
        restored = TransferQueue(
            [QueueTask(name="train", needs=("token_ids",), trains=True)],
            Gate(groups_per_step=2, max_staleness=0, steps=2),
            snapshot=queue.snapshot(),
        )
        restored.advance(PolicyVersion(step=0))
        assert [await restored.reserve() for _ in range(2)] == [0, 1]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await restored.reserve()
        restored.drop(Ticket(0), reason="failed")
        assert await restored.reserve() == 2
        restored.advance(PolicyVersion(step=5))
        assert [await restored.reserve() for _ in range(2)] == [3, 4]
        with pytest.raises(TimeoutError):  # steps * groups_per_step = 4 groups are all that it can train
            async with asyncio.timeout(1):
                await restored.reserve()
        assert restored.counts().pending == 7

    virtually(main())
