"""Local queues for tests, whose memory is given back when a test ends."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from typing import TypeVar

import numpy as np
import pytest

from asyncflow.core.types import PolicyVersion, Ragged, Rows
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.log import Log
from asyncflow.plan.virtual import run_virtually
from tests.data.arenas import arenas_open

ResultT = TypeVar("ResultT")

_made: list[LocalQueue] = []


def keep(queue: LocalQueue) -> LocalQueue:
    """A queue whose memory is given back when the test ends."""
    _made.append(queue)
    return queue


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()
    assert arenas_open() == []


def virtually(main: Coroutine[None, None, ResultT]) -> ResultT:
    return run_virtually(main, seed=3)


def make_queue(
    groups_per_step: int = 2, max_staleness: int = 1, look_ahead: int = 1, log: Log | None = None
) -> LocalQueue:
    tasks = [
        QueueTask(name="train", needs=("token_ids", "advantage"), trains=True),
        QueueTask(name="score", needs=("token_ids",)),
    ]
    gate = Gate(groups_per_step=groups_per_step, max_staleness=max_staleness, steps=100, look_ahead=look_ahead)
    queue = keep(LocalQueue(tasks, gate, log=log))
    queue.advance(PolicyVersion(step=0))
    return queue


def group(ticket: int, *lengths: int) -> dict[str, Ragged]:
    """Rows whose every token is the ticket's number."""
    return {"token_ids": Ragged.stack([np.full(n, ticket, np.int32) for n in lengths])}


def whole(ticket: int, *lengths: int) -> dict[str, Ragged]:
    return {**group(ticket, *lengths), "advantage": ones(len(lengths))}


def named(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.tickets.tolist(), rows.indices.tolist(), strict=True))


def ones(num_rows: int) -> Ragged:
    return Ragged(values=np.ones(num_rows, np.float32), lengths=np.ones(num_rows, np.int32))
