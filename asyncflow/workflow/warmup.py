"""Supervised warm-up: the main loop with a teacher in place of rollouts.

A group is the demonstrations of one step, its columns exist at once, and nobody has to be sent weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from asyncflow.algo.samples import demonstration_columns
from asyncflow.core.columns import LOSS_MASK, TOKEN_IDS
from asyncflow.core.config import RunConfig
from asyncflow.core.ports import Loss, Renderer, TensorT, TrainEngine
from asyncflow.core.types import Demonstration, IntArray, PolicyVersion, Ragged, StepReport, Ticket
from asyncflow.core.world import World
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.workflow.failures import FailureBudget
from asyncflow.workflow.loop import TRAIN, LoopConfig, LoopParts, run
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.totals import StepTotals

LOOK_BEHIND = 2
"""Demonstrations of so many coming steps wait in the queue, so that training never waits."""


async def warm_up(
    config: RunConfig,
    trainer: TrainEngine[TensorT],
    loss: Loss[TensorT],
    samples: Sequence[tuple[IntArray, IntArray]],
    meter: Meter,
    world: World,
) -> None:
    """Take `config.warmup.steps` steps on samples of (prompt tokens, completion tokens), in a drawn order."""
    steps, batch_size = config.warmup.steps, config.warmup.batch_size
    gate = Gate(groups_per_step=1, max_staleness=LOOK_BEHIND, steps=steps)
    queue = LocalQueue([QueueTask(name=TRAIN, needs=(TOKEN_IDS, LOSS_MASK), trains=True)], gate)
    meter.begin(steps=steps, now_s=world.now_s())
    order = world.rng("warm-up").permutation(len(samples))

    async def show(ticket: Ticket) -> Mapping[str, Ragged]:
        chosen = order[np.arange(ticket * batch_size, (ticket + 1) * batch_size) % len(samples)]
        return demonstration_columns([samples[place] for place in chosen.tolist()])

    async def publish() -> PolicyVersion:
        return trainer.version

    async def after_publish(version: PolicyVersion) -> None:
        """Nobody is served."""

    async def after_step(report: StepReport, totals: StepTotals) -> None:
        record = meter.step(report, totals, queue.counts(), queue.num_groups_held, world.now_s())
        meter.record("warmup", record)

    loop = LoopConfig(
        steps=steps,
        groups_per_step=1,
        concurrent_groups=1,
        micro_batch_tokens=config.train.micro_batch_tokens,
        deterministic=config.deterministic,
    )
    parts = LoopParts(
        queue=queue,
        trainer=trainer,
        loss=loss,
        roll_out=show,
        publish=publish,
        after_publish=after_publish,
        after_step=after_step,
        failures=FailureBudget(0, tell=lambda text: None),
    )
    try:
        await run(loop, parts)
    finally:
        queue.close()


def tokenize(demonstrations: Sequence[Demonstration], renderer: Renderer) -> list[tuple[IntArray, IntArray]]:
    """Prompt and completion tokens of each demonstration; the completion ends with the stop token."""
    return [(renderer.prompt_ids(one.prompt.text), renderer.completion_ids(one.completion)) for one in demonstrations]
