"""The transfer queue and its log: nothing is answered before it is safe; what a snapshot brings back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TypeVar

import numpy as np
import pytest

from asyncflow.core.types import PolicyVersion, Ticket
from asyncflow.data import records
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.log import MemoryLog
from tests.data.local_queues import group, keep, make_queue, memory_is_given_back, named, virtually, whole

ResultT = TypeVar("ResultT")

__all__ = ["memory_is_given_back"]


def test_every_transition_is_logged_before_its_effect() -> None:
    async def main() -> None:
        log = MemoryLog()
        queue = make_queue(log=log)
        ticket = await queue.reserve()
        assert isinstance(records.decode(log.records[-1][0]), records.Admitted)
        await queue.put(ticket, whole(ticket, 2))
        lease = queue.lease("train")
        batch = await queue.take(lease, max_groups=1)
        await queue.acknowledge(lease, step=1)
        queue.drop(await queue.reserve(), reason="no signal")
        found = [records.decode(meta) for meta, _ in log.records]
        produced = found[2]
        assert isinstance(produced, records.Produced)
        assert [spec.name for spec in produced.columns] == ["token_ids", "advantage"]
        assert found == [
            records.Live(step=0, lineage="", fingerprint=""),
            records.Admitted(first=0, count=1, live_step=0),
            records.Produced(first=0, count=1, group_size=1, columns=produced.columns),
            records.Taken(task="train", tickets=tickets(0)),
            records.Trained(step=1, tickets=tickets(0), batches=(records.row_bytes(batch.rows),)),
            records.Admitted(first=1, count=1, live_step=0),
            records.Dropped(tickets=tickets(1), reason="no signal"),
        ]

    virtually(main())


def tickets(*numbers: int) -> bytes:
    return records.ticket_bytes(np.array(numbers, np.int64))


class SlowLog(MemoryLog):
    """Nothing is safe before `release`."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Callable[[], None]] = []

    def when_safe(self, lsn: int, action: Callable[[], None]) -> None:
        self.waiting.append(action)

    def release(self) -> None:
        waiting, self.waiting = self.waiting, []
        for action in waiting:
            action()


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_nothing_is_answered_before_its_record_is_safe(is_cancelled: bool) -> None:
    """Whoever is cancelled meanwhile leaves nothing leased or reserved."""

    async def main() -> None:
        log = SlowLog()
        queue = make_queue(log=log)

        async def safely(work: Coroutine[None, None, ResultT]) -> ResultT:
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(work, name="work")
                await asyncio.sleep(1)
                assert not waiting.done()
                log.release()
            return waiting.result()

        async def cancelled(work: Coroutine[None, None, object]) -> None:
            async with asyncio.TaskGroup() as group:
                waiting = group.create_task(work, name="cancelled")
                await asyncio.sleep(1)
                waiting.cancel()
            log.release()

        if is_cancelled:
            await cancelled(queue.reserve())
        ticket = await safely(queue.reserve())
        assert ticket == 0
        await safely(queue.put(ticket, whole(ticket, 1)))
        lease = queue.lease("train")
        if is_cancelled:
            await cancelled(queue.take(lease, max_groups=1))
        batch = await safely(queue.take(lease, max_groups=1))
        assert named(batch.rows) == [(0, 0)]
        await safely(queue.acknowledge(lease, step=1))
        assert queue.counts().trained == 1

    virtually(main())


def test_a_queue_restored_from_a_snapshot_issues_the_unfinished_tickets_again() -> None:
    async def main() -> None:
        queue = make_queue(groups_per_step=2, max_staleness=1)
        for _ in range(4):
            await queue.reserve()
        for ticket in (0, 1, 3):
            await queue.put(Ticket(ticket), whole(ticket, 1))
        lease = queue.lease("train")
        await queue.take(lease, max_groups=2)
        await queue.acknowledge(lease)
        snapshot = queue.snapshot()
        assert snapshot.pending == (2, 3)
        restored = keep(
            LocalQueue(
                [QueueTask(name="train", needs=("token_ids",), trains=True)],
                Gate(groups_per_step=2, max_staleness=1, steps=100),
                snapshot=snapshot,
            )
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
        restored = keep(
            LocalQueue(
                [QueueTask(name="train", needs=("token_ids",), trains=True)],
                Gate(groups_per_step=2, max_staleness=0, steps=2),
                snapshot=queue.snapshot(),
            )
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


def test_many_groups_dropped_before_and_after_their_put_leave_nothing_behind() -> None:
    """A consumer holds a lease on groups that are dropped and long forgotten when it acknowledges."""

    async def main() -> None:
        queue = make_queue(groups_per_step=8, look_ahead=9)
        lease = queue.lease("score")
        for number in range(2_000):
            ticket = await queue.reserve()
            assert ticket == number
            if number % 3:
                await queue.put(ticket, group(ticket, 1))
                await queue.take(lease, max_groups=1)
            queue.drop(ticket, reason="failed")
        await queue.acknowledge(lease)
        assert queue.counts().dropped == {"failed": 2_000}
        assert queue.control.num_blocks == 0
        kept = [queue.control.directory._tickets, queue.control.ledger._window]
        assert max(window.end - window.base for window in kept) < 600

    virtually(main())


def test_a_trained_group_stays_for_the_task_that_still_needs_it() -> None:
    """Also when hundreds after it have come and gone."""

    async def main() -> None:
        queue = make_queue(groups_per_step=4, max_staleness=1)
        train, score = queue.lease("train"), queue.lease("score")
        for step in range(90):
            queue.begin_step(step)
            for _ in range(4):
                ticket = await queue.reserve()
                await queue.put(ticket, whole(ticket, 1))
            await queue.take(train, max_groups=4)
            await queue.acknowledge(train, step=step + 1)
            if step != 1:
                await queue.take(score, max_groups=4)
                await queue.acknowledge(score)
            queue.advance(PolicyVersion(step=step + 1))
        batch = await queue.take(score, max_groups=9)
        assert set(batch["token_ids"].tolist()) == {356, 357, 358, 359}

    virtually(main())
