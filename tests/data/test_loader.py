"""The streaming loader: every row once, given back when a loop ends early, and balanced work for several ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.types import PolicyVersion, Ragged
from asyncflow.data import StreamingLoader, TransferQueue
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.packing import assign
from asyncflow.data.server import Server

pytestmark = pytest.mark.slow


@pytest.fixture
def queue() -> Iterator[TransferQueue]:
    with TransferQueue.start({"train": ("x",)}, arena_bytes=1 << 20) as started:
        yield started


def loader(queue: TransferQueue, *, prefetch: int = 1, copy: bool = True) -> StreamingLoader:
    return StreamingLoader(queue=queue, task="train", rows_per_batch=4, prefetch=prefetch, copy=copy, timeout_s=20)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("copy", [True, False])
def test_a_loop_gets_every_row_once_and_then_ends(queue: TransferQueue, prefetch: int, copy: bool) -> None:
    queue.put({"x": np.arange(10)})
    queue.finish()
    batches = [batch["x"].values.tolist() for batch in loader(queue, prefetch=prefetch, copy=copy)]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert queue.counts().trained == 10


def test_after_a_break_the_batch_and_those_under_way_are_offered_again(queue: TransferQueue) -> None:
    queue.put({"x": np.arange(12)})
    queue.finish()
    for batch in loader(queue, prefetch=2):
        if batch["x"].values[0] == 4:
            break
    with pytest.raises(ZeroDivisionError):
        fail_at(queue, 4)
    rest = sorted(x for batch in loader(queue) for x in batch["x"].values.tolist())
    assert rest == list(range(4, 12))


def fail_at(queue: TransferQueue, value: int) -> None:
    for batch in loader(queue):
        _ = 1 / (int(batch["x"].values[0]) - value)


def test_copies_may_be_written_to_and_views_may_not(queue: TransferQueue) -> None:
    queue.put({"x": np.arange(4)})
    queue.put({"x": np.arange(4)})
    queue.finish()
    for batch in loader(queue):
        batch["x"].values[0] = 7
        break
    for batch in loader(queue, copy=False):
        with pytest.raises(ValueError, match="read-only"):
            batch["x"].values[0] = 7


@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=40),
    max_tokens=st.integers(1, 120),
    num_ranks=st.integers(1, 5),
)
def test_ranks_get_equally_many_micro_batches_with_every_row_once(
    lengths: list[int], max_tokens: int, num_ranks: int
) -> None:
    ranks = assign(np.array(lengths, np.int32), max_tokens, num_ranks)
    assert len(ranks) == num_ranks
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(row for batches in ranks for rows in batches for row in rows.tolist()) == list(range(len(lengths)))
    limit = max(max_tokens, *lengths)
    tokens = [[sum(lengths[row] for row in rows) for rows in batches] for batches in ranks]
    assert max(map(max, tokens)) <= limit
    per_rank = [sum(batches) for batches in tokens]
    assert max(per_rank) - min(per_rank) <= 2 * max(lengths)


async def test_each_rank_fetches_its_own_columns_of_a_step() -> None:
    gate = Gate(groups_per_step=4, max_staleness=0, steps=3)
    queue = LocalQueue([QueueTask(name="train", needs=("token_ids",), trains=True)], gate, memory_bytes=1 << 20)
    queue.advance(PolicyVersion(step=0))
    for size in (3, 1, 7, 5):
        ticket = await queue.reserve()
        await queue.put(ticket, {"token_ids": Ragged.stack([np.full(size, ticket, np.int32)] * 2)})
    server = Server(queue.control)
    lease, seen = queue.lease("train"), []
    try:
        async for handles in queue.stream_ranks(lease, groups=4, max_tokens=12, num_ranks=2):
            assert len(handles) == 2
            for handle in handles:
                seen += await asyncio.to_thread(fetch, server.address, handle) if len(handle) else []
    finally:
        server.close()
        queue.close()
    assert sorted(map(tuple, seen)) == sorted([(t,) * n for t, n in enumerate((3, 1, 7, 5)) for _ in range(2)])


def fetch(address: str, handle: object) -> list[list[int]]:
    from asyncflow.core.types import Rows

    assert isinstance(handle, Rows)
    with TransferQueue.connect(address) as rank:
        return [row.tolist() for row in rank.fetch(handle, ["token_ids"])["token_ids"].rows()]
