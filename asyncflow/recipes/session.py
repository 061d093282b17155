"""A session: the engines of one run, opened in order and closed whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from asyncflow.algo.algorithms import make_algorithm
from asyncflow.core.config import RunConfig
from asyncflow.core.metrics import Observer
from asyncflow.core.ports import Scorer
from asyncflow.core.world import World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.engines.cores import Cores
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.engines.rollout.client import TorchRolloutEngine, start_rollout_engine
from asyncflow.engines.train.optimizer import Phase
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from asyncflow.recipes.recipe import Task
from asyncflow.recipes.run_log import LEDGER, NO_LOG, RunLog, thin_out
from asyncflow.recipes.thinning import Thinner
from asyncflow.workflow.checkpoint import save_checkpoint
from asyncflow.workflow.checkpoint_folder import checkpoint_step, list_checkpoints
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.reinforce import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is open while a run lasts."""

    config: RunConfig
    task: Task
    world: World
    meter: Meter
    cores: Cores
    trainer: TorchTrainEngine
    rollout: TorchRolloutEngine
    renderer: TokenizerRenderer
    folder: Path
    thinner: Thinner

    def setup(self, reference: Scorer | None, run_log: RunLog = NO_LOG) -> Setup[Tensor]:
        """The parts of reinforcement learning."""
        return Setup(
            world=self.world,
            trainer=self.trainer,
            rollout=self.rollout,
            renderer=self.renderer,
            agent=self.task.agent,
            algorithm=make_algorithm(self.config.algorithm, max_tokens=self.config.sampling.max_tokens),
            prompts=self.task.train,
            held_out=self.task.held_out,
            meter=self.meter,
            save=self.save,
            reference=reference,
            log=run_log.log,
            history=run_log.history,
            use_threads=self.cores.fix,
        )

    async def save(self, step: int, ledger: LedgerSnapshot) -> int:
        """Publish a checkpoint; the step of the oldest one that is kept. Rows that none of them needs leave the log."""
        checkpoints = self.folder / "checkpoints"
        await save_checkpoint(checkpoints, self.trainer, step, ledger, self.config.checkpoint.keep, self.world)
        oldest_kept = checkpoint_step(list_checkpoints(checkpoints)[0]) or 0
        if self.config.queue.keep == "checkpoints":
            await thin_out(self.thinner, oldest_kept, self.world)
        return oldest_kept


def first_phase(config: RunConfig) -> Phase:
    """The optimizer of a run's first step."""
    if config.warmup.steps:
        return Phase.supervised(config.warmup, config.train)
    return reinforcement_phase(config)


def reinforcement_phase(config: RunConfig) -> Phase:
    """The optimizer of reinforcement learning."""
    return Phase.reinforcement(config.train, temperature=config.sampling.temperature)


@asynccontextmanager
async def open_session(
    config: RunConfig, task: Task, *, source: str, folder: Path, lineage: str, observer: Observer, world: World
) -> AsyncIterator[Session]:
    """Load the model of the folder or hub name `source` into both engines.

    If the rollout process dies, at whatever moment, the block ends with `EngineLostError`.
    """
    meter = Meter(observer)
    renderer = TokenizerRenderer(source)
    cores = Cores.of(config)
    trainer = await TorchTrainEngine.open(
        source,
        config.train,
        phase=first_phase(config),
        export_dtype=config.rollout.dtype,
        lineage=lineage,
        observer=meter,
        num_threads=cores.for_training,
        disk=world.disk,
        deterministic=config.deterministic,
    )
    try:
        async with (
            start_rollout_engine(
                model=source,
                config=config.rollout,
                world=world,
                channel=trainer.channel,
                log=folder / "logs" / "rollout.log",
                observer=meter,
                deterministic=config.deterministic,
            ) as rollout,
            asyncio.TaskGroup() as watch,
        ):
            cores.rollout = rollout
            watcher = watch.create_task(rollout.watch(), name="watch the rollout process")
            yield Session(
                config=config,
                task=task,
                world=world,
                meter=meter,
                cores=cores,
                trainer=trainer,
                rollout=rollout,
                renderer=renderer,
                folder=folder,
                thinner=Thinner(folder / LEDGER),
            )
            watcher.cancel()
    finally:
        await trainer.aclose()
