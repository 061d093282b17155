"""Stages: tasks between rollout and training that take groups and write a column back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from asyncflow.algo.algorithms import Advantages
from asyncflow.core.columns import ADVANTAGE, REF_LOGPROBS, REWARD
from asyncflow.core.errors import NoSignalError
from asyncflow.core.ports import Scorer
from asyncflow.core.types import MicroBatch, Ragged, Ticket
from asyncflow.data.layout import select
from asyncflow.data.local_queue import LocalQueue

ADVANTAGES = "advantages"
"""The queue's task that turns the rewards of a group into advantages."""

REFERENCE = "reference"
"""The queue's task that scores tokens under the reference policy."""

NO_SIGNAL = "no signal"
"""Why a group is dropped whose rewards are all equal."""

NO_SIGNAL_LIMIT = 1024
"""Groups in a row that may be dropped for it."""


async def advantage_stage(queue: LocalQueue, advantages: Advantages, *, drop_no_signal: bool) -> None:
    """Write the advantage of every group, for ever; or drop groups whose rewards are all equal.

    Raises `NoSignalError` after `NO_SIGNAL_LIMIT` of these in a row: dropping for ever would
    look busy and learn nothing.
    """
    lease = queue.lease(ADVANTAGES)
    dropped_in_a_row = 0
    while True:
        batch = await queue.take(lease, max_groups=1024)
        for ticket, group in split_groups(batch):
            rewards = group[REWARD].astype(np.float32)
            has_signal = np.ptp(rewards) > 0
            dropped_in_a_row = 0 if has_signal else dropped_in_a_row + 1
            if drop_no_signal and not has_signal:
                check_signal(dropped_in_a_row, float(rewards[0]))
                queue.drop(ticket, reason=NO_SIGNAL)
            else:
                values = advantages(rewards).astype(np.float32)
                column = Ragged(values=values, lengths=np.ones(len(values), np.int32))
                await queue.write(lease, group, ADVANTAGE, column)
        await queue.acknowledge(lease)


def check_signal(dropped_in_a_row: int, reward: float) -> None:
    """Raise `NoSignalError` when too many groups in a row had equal rewards, the last ones `reward`."""
    if dropped_in_a_row >= NO_SIGNAL_LIMIT:
        remedy = (
            "the task is too hard for this policy: warm up longer (warmup.steps), or reward part of an answer"
            if reward <= 0
            else "the task is learnt: stop here, or give it harder prompts"
        )
        raise NoSignalError(
            f"{dropped_in_a_row} groups in a row earned equal rewards (the last one {reward:g} each) and were dropped, "
            f"so no step can be made. Perhaps {remedy}; algorithm.drop_no_signal=false trains on all groups"
        )


async def reference_stage(queue: LocalQueue, reference: Scorer, *, max_tokens: int) -> None:
    """Write `ref_logprobs` for every group, for ever: of as many at once as are ready and fill a micro-batch."""
    lease = queue.lease(REFERENCE)
    while True:
        async for batch in queue.stream_ready(lease, max_tokens=max_tokens):
            values = await reference.logprobs(batch)
            await queue.write(lease, batch, REF_LOGPROBS, Ragged(values=values, lengths=batch.lengths))
        await queue.acknowledge(lease)


def split_groups(batch: MicroBatch) -> Iterator[tuple[Ticket, MicroBatch]]:
    """The groups of a batch that `take` gave: their rows stand together."""
    tickets = batch.rows.tickets
    for ticket in dict.fromkeys(tickets.tolist()):
        places = np.flatnonzero(tickets == ticket)
        columns = {name: select(column, places) for name, column in batch.columns.items()}
        yield Ticket(ticket), MicroBatch(rows=batch.rows[places], columns=columns)
