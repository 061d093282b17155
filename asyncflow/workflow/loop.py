"""The main loop: prompts become rollouts, rollouts become gradients, weights go back.

::

    produce    reserve ──> roll out ──> put ─────┐           waits for: the staleness gate
    stages             take ──> write a column ──┤           waits for: complete groups
    gradients                  stream micro-batches ──> accumulate      waits for: groups of this step
    publish    export weights ──> load ──> advance           waits for: nothing; opens the gate
               └──────── the same step ────────┘ then: apply, acknowledge

Everything runs at once. Two barriers a step: the optimizer step needs all gradients, and
the next export needs the optimizer step. `max_staleness = 0` is synchronous training on
this same path: the gate then admits the groups of a step only once its weights are live.

The simulator, the fault tests and the supervised warm-up run this loop too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from asyncflow.core.causes import first_cause
from asyncflow.core.errors import RolloutError
from asyncflow.core.ports import Loss, TensorT, TrainEngine
from asyncflow.core.types import PolicyVersion, Ragged, StepReport, Ticket
from asyncflow.data.local_queue import Lease, LocalQueue
from asyncflow.workflow.failures import FailureBudget
from asyncflow.workflow.totals import StepTotals

TRAIN = "train"
"""The queue's task that trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """The numbers of the loop. `concurrent_groups` rollouts run at once at most.

    With `deterministic`, a step's gradients wait for all its groups, so that nothing depends on when they came.
    """

    steps: int
    groups_per_step: int
    concurrent_groups: int
    micro_batch_tokens: int
    deterministic: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopParts(Generic[TensorT]):
    """What the loop drives.

    `roll_out` gives the columns of a ticket's group or raises `RolloutError`; `publish` makes
    the trainer's weights live and returns their version; a stage takes groups from the queue
    and writes columns back, for ever; `after_step` reports and saves.
    """

    queue: LocalQueue
    trainer: TrainEngine[TensorT]
    loss: Loss[TensorT]
    roll_out: Callable[[Ticket], Awaitable[Mapping[str, Ragged]]]
    publish: Callable[[], Awaitable[PolicyVersion]]
    after_publish: Callable[[PolicyVersion], Awaitable[None]]
    after_step: Callable[[StepReport, StepTotals], Awaitable[None]]
    failures: FailureBudget
    stages: Sequence[Callable[[], Awaitable[None]]] = ()


async def run(config: LoopConfig, parts: LoopParts[TensorT]) -> None:
    """Train until the trainer's version is `config.steps`; returns, or raises, with every task ended.

    Raises the first cause when anything but a rollout fails.
    """
    try:
        await _run(config, parts)
    except BaseExceptionGroup as group:
        raise first_cause(group) from group


async def _run(config: LoopConfig, parts: LoopParts[TensorT]) -> None:
    queue, trainer = parts.queue, parts.trainer

    async def produce() -> None:
        while True:
            ticket = await queue.reserve()  # waits while a group started now could end up too stale
            try:
                columns = await parts.roll_out(ticket)
            except RolloutError as error:  # a failed rollout is data, until there are too many
                queue.drop(ticket, reason=error.reason)
                parts.failures.spend(error)
            else:
                await queue.put(ticket, columns)
                parts.failures.succeed()

    async def publish() -> None:
        version = await parts.publish()
        queue.advance(version)
        await parts.after_publish(version)

    async def compute_gradients(lease: Lease) -> StepTotals:
        totals = StepTotals(step=trainer.version.step, bound=queue.bound)
        queue.begin_step(trainer.version.step)
        async for batch in queue.stream(
            lease,
            groups=config.groups_per_step,
            max_tokens=config.micro_batch_tokens,
            at_once=config.deterministic,
        ):
            totals.add(batch, parts.loss.denominator(batch))  # asserts the staleness bound
            await trainer.accumulate(batch, parts.loss)  # starts before the whole step is there
        return totals

    async with asyncio.TaskGroup() as background:
        workers = [background.create_task(produce(), name=f"producer {i}") for i in range(config.concurrent_groups)] + [
            background.create_task(_forever(stage), name=f"stage {i}") for i, stage in enumerate(parts.stages)
        ]
        while trainer.version.step < config.steps:
            lease = queue.lease(TRAIN)
            async with asyncio.TaskGroup() as overlap:  # weights travel while the next gradients are computed
                overlap.create_task(publish(), name="publish")
                gradients = overlap.create_task(compute_gradients(lease), name="gradients")
            report = await trainer.apply(gradients.result().denominator)
            # With the optimizer step, so a row is trained exactly once.
            await queue.acknowledge(lease, step=report.version.step, threads=report.num_threads)
            await parts.after_step(report, gradients.result())
        for worker in workers:
            worker.cancel()
    await publish()


async def _forever(stage: Callable[[], Awaitable[None]]) -> None:
    """A stage as a coroutine, which a task needs."""
    await stage()
