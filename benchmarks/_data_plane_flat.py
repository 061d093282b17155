"""What an operation of asyncflow's queue costs, by how many rows wait in it.

One queue for each number of rows is filled first; then short blocks of puts and gets take turns
over the queues, so that other load falls on all alike, and what waits in each stays the same.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence

import numpy as np
from _data_plane_work import Rows

from asyncflow.data import TransferQueue

ROWS = 32
BLOCK = 25
TASK = "train"
ARENA_BYTES = 1 << 28
Cost = dict[str, float]
"""Microseconds of a put and of a get with its acknowledgement."""


def measure(levels: Sequence[int], blocks: int) -> dict[int, Cost]:
    """For each number of waiting rows, the median over blocks of the mean cost."""
    batch: Rows = {"tokens": np.arange(2 * ROWS).reshape(ROWS, 2)}
    with contextlib.ExitStack() as stack:
        queues: dict[int, TransferQueue] = {}
        for level in levels:
            start = TransferQueue.start(tasks={TASK: ("tokens",)}, arena_bytes=ARENA_BYTES)
            queues[level] = stack.enter_context(start)
            for _ in range(-(-level // ROWS)):
                queues[level].put_soon(batch)
            queues[level].flush()
        for queue in queues.values():
            _block(queue, batch)  # the first calls of everything are slow
        costs: dict[int, list[Cost]] = {level: [] for level in levels}
        for turn in range(blocks):
            for level in levels if turn % 2 else levels[::-1]:
                costs[level].append(_block(queues[level], batch))
    return {
        level: {name: statistics.median(cost[name] for cost in found) for name in found[0]}
        for level, found in costs.items()
    }


def _block(queue: TransferQueue, batch: Rows) -> Cost:
    begin_s = time.perf_counter()
    for _ in range(BLOCK):
        queue.put(batch)
    put_s = time.perf_counter()
    for _ in range(BLOCK):
        found = queue.get(TASK, max_rows=ROWS, at_least=ROWS)
        assert found is not None
        queue.acknowledge(found)
    end_s = time.perf_counter()
    return {"put": (put_s - begin_s) / BLOCK * 1e6, "get": (end_s - put_s) / BLOCK * 1e6}
