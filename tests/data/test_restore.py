"""A queue that goes on from its log: which rows come back, and which tickets nobody would ever put."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import PolicyVersion, Ragged, Ticket
from asyncflow.data import records
from asyncflow.data.control import ControlPlane
from asyncflow.data.gate import Gate
from asyncflow.data.history import pending_blocks, read_history
from asyncflow.data.layout import ColumnSpec, lay_out
from asyncflow.data.ledger import Ledger, QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.log import Log, MemoryLog, NoLog
from asyncflow.data.restore import TOO_OLD, opened, restore
from asyncflow.plan.simulate import COLUMNS
from asyncflow.workflow.reinforce import make_gate, make_tasks
from tests.data.arenas import arenas_open
from tests.data.simulated_log import CONFIG, simulated, write

TASKS = [
    QueueTask(name="train", needs=("x", "y"), trains=True),
    QueueTask(name="score", needs=("x",)),
]
GATE = Gate(groups_per_step=4, max_staleness=1, steps=9)


def numbers(*values: float) -> Ragged:
    return Ragged(values=np.array(values, np.float32), lengths=np.ones(len(values), np.int32))


async def restored(
    folder: Path, log: MemoryLog, tasks: Sequence[QueueTask], gate: Gate | None, into: Log
) -> LocalQueue:
    """The queue of a process that takes this log over."""
    entries = [(records.decode(meta), payload) for meta, payload in log.records]
    await asyncio.to_thread(write, folder, entries)
    control = restore(read_history(folder, tasks, gate), into)
    return LocalQueue(tasks, gate, control=control)


def begun(tasks: Sequence[QueueTask], gate: Gate | None) -> tuple[LocalQueue, MemoryLog]:
    log, ledger = MemoryLog(), Ledger(tasks, gate)
    control = ControlPlane(ledger, log)
    control.note(opened(ledger, 1))
    return LocalQueue(tasks, gate, control=control), log


def test_a_write_does_not_come_back_for_tickets_that_were_issued_again_since(tmp_path: Path) -> None:
    async def main() -> None:
        queue, log = begun(TASKS, GATE)
        queue.advance(PolicyVersion(step=0))
        for _ in range(4):
            ticket = await queue.reserve()
            await queue.put(ticket, {"x": numbers(ticket)})
        score = queue.lease("score")
        batch = await queue.take(score, max_groups=4)
        await queue.write(score, batch, "y", numbers(0, 1, 2, 3))
        queue.release(score)
        queue.control.issue_again(np.array([0, 1]), TOO_OLD)
        for _ in range(2):
            ticket = await queue.reserve()
            await queue.put(ticket, {"x": numbers(ticket + 10)})
        queue.close()

        again = await restored(tmp_path / "log", log, TASKS, GATE, NoLog())
        score, train = again.lease("score"), again.lease("train")
        batch = await again.take(score, max_groups=4)
        assert batch["x"].tolist() == [10, 11, 2, 3]
        await again.write(score, batch, "y", numbers(20, 21, 22, 23))
        assert (await again.take(train, max_groups=4))["y"].tolist() == [20, 21, 2, 3]  # the first value stays
        await again.acknowledge(score)
        await again.acknowledge(train, step=1)
        assert again.control.num_blocks == 0
        again.close()

    asyncio.run(main())
    assert arenas_open() == []


def test_what_nobody_needs_any_more_is_not_loaded(tmp_path: Path) -> None:
    tasks = [QueueTask(name="a", needs=("x", "y")), QueueTask(name="b", needs=("x",))]

    async def main() -> None:
        queue, log = begun(tasks, None)
        drafts, num_bytes, _ = lay_out({"x": numbers(0, 1, 2, 3)})
        written = queue._memory._writer.write(drafts, num_bytes)
        assert written is not None
        queue.control.put(queue._session, None, 4, 1, *written, lambda first: None)
        first, score = queue.lease("a"), queue.lease("b")
        batch = await queue.take(score, max_groups=2)
        await queue.write(score, batch, "y", numbers(5, 6))
        await queue.take(first, max_groups=2)
        await queue.acknowledge(first)
        await queue.acknowledge(score)
        queue.close()

        again = await restored(tmp_path / "log", log, tasks, None, NoLog())
        first, score = again.lease("a"), again.lease("b")
        batch = await again.take(score, max_groups=4)
        assert batch["x"].tolist() == [2, 3]
        await again.write(score, batch, "y", numbers(7, 8))
        assert (await again.take(first, max_groups=4))["y"].tolist() == [7, 8]
        await again.acknowledge(first)
        await again.acknowledge(score)
        assert again.control.num_blocks == 0
        assert len(again.control.memory._owners) == 2  # its own: that of the rows from the log is closed
        again.close()

    asyncio.run(main())
    assert arenas_open() == []


def test_a_put_that_was_cut_off_is_dropped_where_nobody_issues_tickets_again(tmp_path: Path) -> None:
    async def main() -> None:
        queue, log = begun([QueueTask(name="a", needs=("x",))], None)
        ticket = await queue.reserve()
        await queue.put(ticket, {"x": numbers(1)})
        queue.close()
        log.append(records.encode(records.Admitted(first=1, count=3, live_step=-1)))

        into = MemoryLog()
        again = await restored(tmp_path / "log", log, [QueueTask(name="a", needs=("x",))], None, into)
        again.control.finish()
        lease = again.lease("a")
        async with asyncio.timeout(5):
            assert (await again.take(lease, max_groups=1)).rows.tickets.tolist() == [0]
            await again.acknowledge(lease)
            assert len(await again._take(lease, 1)) == 0  # the end of the stream
        assert again.counts().dropped == {"never put": 3}
        told = [record for meta, _ in into.records if isinstance(record := records.decode(meta), records.Dropped)]
        assert [records.read_tickets(record.tickets).tolist() for record in told] == [[1, 2, 3]]
        again.close()

    asyncio.run(main())


def test_handles_of_a_queue_mean_nothing_to_another_of_the_same_epoch(tmp_path: Path) -> None:
    found, epochs = [], []
    for name in ("one", "two"):
        folder = write(tmp_path / name, [(opened(Ledger(TASKS, GATE), 1), b"")])
        log = MemoryLog()
        found.append(restore(read_history(folder, TASKS, GATE), log).generation)
        first = records.decode(log.records[0][0])
        assert isinstance(first, records.Opened)
        epochs.append(first.epoch)
    assert len({*found}) == 2
    assert epochs == [2, 2]


def test_a_task_that_is_new_needs_only_what_is_not_trained(tmp_path: Path) -> None:
    folder = write(tmp_path / "log", simulated()[0])
    with_kl = CONFIG.model_copy(update={"algorithm": CONFIG.algorithm.model_copy(update={"kl_coef": 0.1})})
    tasks = make_tasks(with_kl, (*COLUMNS, "ref_logprobs"))
    history = read_history(folder, tasks, make_gate(with_kl))
    trained = np.concatenate([records.read_tickets(step.tickets) for step in history.steps.values()])
    assert not history.ledger.is_in_use(trained).any()
    for block in pending_blocks(history):
        assert block.first not in trained


def test_a_log_with_steps_needs_a_task_that_trains(tmp_path: Path) -> None:
    folder = write(tmp_path / "log", simulated()[0])
    with pytest.raises(ConfigError, match=r"none of the tasks a, b trains: name the task that does, which was 'train'"):
        read_history(folder, [QueueTask(name="a", needs=("x",)), QueueTask(name="b", needs=("x",))], None)


def test_tickets_put_again_come_back_from_their_last_block(tmp_path: Path) -> None:
    """A block may hold tickets of which some were put again later: their old rows stay away."""
    tasks = [QueueTask(name="train", needs=("x",), trains=True)]

    def block(*values: float) -> tuple[bytes, tuple[ColumnSpec, ...]]:
        drafts, num_bytes, _ = lay_out({"x": numbers(*values)})
        queue = LocalQueue(tasks, GATE)
        written = queue._memory._writer.write(drafts, num_bytes)
        assert written is not None
        data = queue._memory._writer.arena.block(written[0]).tobytes()
        queue.close()
        return data, written[1]

    (old, columns), (new, _) = block(0, 1, 2), block(9)
    entries: list[tuple[records.AnyRecord, bytes]] = [
        (opened(Ledger(tasks, GATE), 1), b""),
        (records.Admitted(first=0, count=3, live_step=0), b""),
        (records.Produced(first=0, count=3, group_size=1, columns=columns), old),
        (records.Reissued(tickets=records.ticket_bytes(np.array([0])), reason=TOO_OLD), b""),
        (records.Admitted(first=0, count=1, live_step=0), b""),
        (records.Produced(first=0, count=1, group_size=1, columns=block(9)[1]), new),
    ]

    history = read_history(write(tmp_path / "log", entries), tasks, GATE)

    async def main() -> None:
        again = LocalQueue(tasks, GATE, control=restore(history, NoLog()))
        lease = again.lease("train")
        batch = await again.take(lease, max_groups=3)
        assert (batch.rows.tickets.tolist(), batch["x"].tolist()) == ([0, 1, 2], [9, 1, 2])
        await again.acknowledge(lease, step=1)
        assert again.control.num_blocks == 0
        assert again.counts().trained == Ticket(3)
        again.close()

    asyncio.run(main())
