"""Reinforcement learning: the loop's parts, put together from a configuration and engines.

The engines may be real or scripted: a run, a simulation and a fault test differ in nothing
but what is handed in here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Generic

from asyncflow.algo.algorithms import Algorithm
from asyncflow.algo.samples import to_columns
from asyncflow.core.columns import REWARD, TOKEN_IDS
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import FailureBudgetError, NoSignalError, RolloutTimeout
from asyncflow.core.ports import Renderer, RolloutEngine, Scorer, TensorT, TrainEngine
from asyncflow.core.types import PolicyVersion, Prompt, Ragged, SamplingParams, StepReport, Ticket
from asyncflow.core.world import World
from asyncflow.data.gate import Gate
from asyncflow.data.history import History
from asyncflow.data.ledger import LedgerCounts, LedgerSnapshot, QueueTask
from asyncflow.data.local_queue import LocalQueue
from asyncflow.data.log import Log, NoLog
from asyncflow.data.restore import restore
from asyncflow.rollout.chat import Agent
from asyncflow.rollout.groups import RolloutParts, prompt_order, roll_out_group
from asyncflow.workflow.evaluation import Evaluation, evaluate
from asyncflow.workflow.failures import FailureBudget
from asyncflow.workflow.health import Health
from asyncflow.workflow.loop import TRAIN, LoopConfig, LoopParts, run
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.replay import catch_up
from asyncflow.workflow.stages import ADVANTAGES, REFERENCE, advantage_stage, reference_stage
from asyncflow.workflow.totals import StepTotals


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup(Generic[TensorT]):
    """What a run is made of. `reference` is needed where there is a KL penalty.

    `save` keeps a checkpoint of the step just made, with the ledger as it stands, and returns the
    step of the oldest one that is kept. `log` and `history` are the run's durable log and what it held when
    it was opened; without a history the queue begins where the snapshot of a checkpoint left off. `use_threads`
    fixes the CPU threads of the trainer's next calls (0: as ever), so that logged steps are taken again to the bit.
    """

    world: World
    trainer: TrainEngine[TensorT]
    rollout: RolloutEngine
    renderer: Renderer
    agent: Agent
    algorithm: Algorithm[TensorT]
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt]
    meter: Meter
    save: Callable[[int, LedgerSnapshot], Awaitable[int]]
    reference: Scorer | None = None
    log: Log = field(default_factory=NoLog)
    history: History | None = None
    use_threads: Callable[[int], None] | None = None


async def reinforce(config: RunConfig, setup: Setup[TensorT], snapshot: LedgerSnapshot | None = None) -> LedgerCounts:
    """Run the main loop to `config.steps`, from where the log or `snapshot` left off. Returns the accounts."""
    queue = make_queue(config, setup, snapshot)
    try:
        await _reinforce(config, setup, queue)
        return queue.counts()
    finally:
        queue.close()


async def _reinforce(config: RunConfig, setup: Setup[TensorT], queue: LocalQueue) -> None:
    setup.meter.begin(steps=config.steps, now_s=setup.world.now_s())
    calls = _Calls(config, setup, queue)
    parts = LoopParts(
        queue=queue,
        trainer=setup.trainer,
        loss=setup.algorithm.loss,
        roll_out=calls.roll_out,
        publish=calls.publish,
        after_publish=calls.after_publish,
        after_step=calls.after_step,
        failures=FailureBudget(config.rollout.max_failures, tell=partial(tell_health, setup.meter)),
        stages=make_stages(config, setup, queue),
    )
    if setup.history is not None:
        await _catch_up(config, setup, setup.history, queue, calls.load_weights)
    try:
        await run(make_loop(config), parts)
    except NoSignalError:  # perhaps the task is learnt: keep what was learnt
        await save_last(config, setup, queue)
        raise


class _Calls(Generic[TensorT]):
    """What the main loop calls: how a group is rolled out, weights are published, and a step is reported and saved."""

    def __init__(self, config: RunConfig, setup: Setup[TensorT], queue: LocalQueue) -> None:
        self._config = config
        self._setup = setup
        self._queue = queue
        self._health = Health(config.max_staleness)
        self._parts = rollout_parts(config, setup.rollout, setup.renderer, setup.agent, setup.world)
        self._prompt_of = prompt_order(setup.prompts, setup.world)

    async def roll_out(self, ticket: Ticket) -> Mapping[str, Ragged]:
        prompt = self._prompt_of(ticket)
        self._queue.dispatch(ticket, prompt.id, len(self._setup.renderer.prompt_ids(prompt.text)))
        try:
            group = await roll_out_group(ticket, prompt, self._config.group_size, self._parts)
        except RolloutTimeout as error:
            if self._config.deterministic:
                raise FailureBudgetError(
                    f"{error}. How long it takes depends on the machine, so a deterministic run can't drop its group: "
                    "raise rollout.time_limit_s, or set deterministic=false"
                ) from error
            raise
        self._setup.meter.group(group)
        return to_columns(group)

    async def load_weights(self) -> PolicyVersion:
        return await self._setup.rollout.load_weights(await self._setup.trainer.export_weights())

    async def publish(self) -> PolicyVersion:
        if self._config.deterministic:  # so that every token of a group has one version, whatever the timing
            await self._queue.settled()
        return await self.load_weights()

    async def after_publish(self, version: PolicyVersion) -> None:
        if is_evaluated(self._config, version.step):
            result = await measure(self._config, self._setup, self._parts, version)
            self._tell(self._health.check_accuracy(result.accuracy, result.stderr), version.step)

    async def after_step(self, report: StepReport, totals: StepTotals) -> None:
        meter, queue, step = self._setup.meter, self._queue, report.version.step
        record = meter.step(report, totals, queue.counts(), queue.num_groups_held, self._setup.world.now_s())
        meter.record("step", record)
        self._tell(self._health.check(record), step)
        if is_saved(self._config, step):
            await save_whole(self._config, self._setup, queue)

    def _tell(self, messages: Iterable[str], step: int) -> None:
        for message in messages:
            tell_health(self._setup.meter, message, step=step)


def make_loop(config: RunConfig) -> LoopConfig:
    """The numbers of the main loop: as many groups are rolled out at once as the gate may allow."""
    return LoopConfig(
        steps=config.steps,
        groups_per_step=config.groups_per_step,
        concurrent_groups=min(1 + config.max_staleness, max(1, config.steps)) * config.groups_per_step,
        micro_batch_tokens=config.train.micro_batch_tokens,
        deterministic=config.deterministic,
    )


async def _catch_up(
    config: RunConfig,
    setup: Setup[TensorT],
    history: History,
    queue: LocalQueue,
    load_weights: Callable[[], Awaitable[PolicyVersion]],
) -> None:
    """Take the steps again that the log holds after the checkpoint, and see whether they made the same weights.

    The run may have ended between its last step and that step's checkpoint: then it is made now.
    """

    async def publish() -> None:
        version = await load_weights()
        check_lineage(setup.meter, history, version)
        queue.advance(version)

    def after_step(report: StepReport) -> None:
        setup.meter.record("replayed", {"step": report.version.step, "loss": report.loss})

    columns, restored_step = (*setup.algorithm.columns, REWARD), setup.trainer.version.step
    await catch_up(setup.trainer, setup.algorithm.loss, history, columns, publish, after_step, setup.use_threads)
    if setup.use_threads is not None:
        setup.use_threads(0)
    step = setup.trainer.version.step
    if step > restored_step and is_saved(config, step):
        await save(setup, queue)


def check_lineage(meter: Meter, history: History, version: PolicyVersion) -> None:
    """Tell when weights are not, bit for bit, those that had this version before the run was resumed."""
    before = history.live.get(version.step)
    if before is not None and before.fingerprint and version.fingerprint not in ("", before.fingerprint):
        tell_health(
            meter,
            f"the weights of step {version.step}, taken again from the log, differ in bits from those before the run "
            f"ended ({version.fingerprint[:8]} and {before.fingerprint[:8]}): a new lineage, {version.lineage}. "
            "With deterministic=true they would be equal",
        )


async def save_last(config: RunConfig, setup: Setup[TensorT], queue: LocalQueue) -> None:
    """Keep a checkpoint of the last step made, unless it has one or was cut off before its groups were acknowledged."""
    step = setup.trainer.version.step
    is_whole = queue.counts().trained == step * config.groups_per_step
    if step > 0 and is_whole and not is_saved(config, step):
        await save(setup, queue)


async def save_whole(config: RunConfig, setup: Setup[TensorT], queue: LocalQueue) -> None:
    """Keep a checkpoint; in a deterministic run, once no group is left that newer weights would roll out again."""
    if config.deterministic:
        await queue.settled()
    await save(setup, queue)


async def save(setup: Setup[TensorT], queue: LocalQueue) -> None:
    """Keep a checkpoint of the step just made. What the log says of it is on the disk before it is."""
    await queue.flush()
    step = setup.trainer.version.step
    oldest_kept = await setup.save(step, queue.snapshot())
    queue.note_checkpoint(step, oldest_kept)


def make_queue(config: RunConfig, setup: Setup[TensorT], snapshot: LedgerSnapshot | None) -> LocalQueue:
    """The transfer queue with the tasks that this configuration needs, as its log or a checkpoint left it."""
    memory_bytes = config.queue.memory_mb << 20
    tasks, gate = make_tasks(config, setup.algorithm.columns), make_gate(config)
    if setup.history is None:
        return LocalQueue(tasks, gate, log=setup.log, snapshot=snapshot, memory_bytes=memory_bytes)
    control = restore(
        setup.history,
        setup.log,
        restored_step=setup.trainer.version.step,
        wall_clock=setup.world.wall_clock().isoformat(timespec="seconds"),
    )
    return LocalQueue(tasks, gate, memory_bytes=memory_bytes, control=control)


def make_tasks(config: RunConfig, columns: Sequence[str]) -> list[QueueTask]:
    """The consumers of the queue, and the columns that each needs."""
    tasks = [
        QueueTask(name=TRAIN, needs=(*columns, REWARD), trains=True),
        QueueTask(name=ADVANTAGES, needs=(REWARD,)),
    ]
    if config.algorithm.kl_coef > 0:
        tasks.append(QueueTask(name=REFERENCE, needs=(TOKEN_IDS,)))
    return tasks


def make_gate(config: RunConfig) -> Gate:
    """The staleness gate of a run."""
    return Gate(
        groups_per_step=config.groups_per_step,
        max_staleness=config.max_staleness,
        steps=config.steps,
        look_ahead=config.look_ahead,
    )


def make_stages(config: RunConfig, setup: Setup[TensorT], queue: LocalQueue) -> list[Callable[[], Awaitable[None]]]:
    """The stages between rollout and training."""
    advantages = partial(
        advantage_stage, queue, setup.algorithm.advantages, drop_no_signal=config.algorithm.drop_no_signal
    )
    if setup.reference is None:
        return [advantages]
    return [advantages, partial(reference_stage, queue, setup.reference, max_tokens=config.train.micro_batch_tokens)]


def rollout_parts(
    config: RunConfig, engine: RolloutEngine, renderer: Renderer, agent: Agent, world: World
) -> RolloutParts:
    """What training rollouts share."""
    sampling = config.sampling
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        stop_token_ids=renderer.stop_token_ids,
    )
    return RolloutParts(
        engine=engine,
        renderer=renderer,
        agent=agent,
        params=params,
        time_limit_s=config.rollout.time_limit_s,
        world=world,
    )


def evaluation_parts(parts: RolloutParts, temperature: float) -> RolloutParts:
    """The same rollouts, at another temperature."""
    return replace(parts, params=replace(parts.params, temperature=temperature))


async def measure(config: RunConfig, setup: Setup[TensorT], parts: RolloutParts, version: PolicyVersion) -> Evaluation:
    """Evaluate the served weights on held-out prompts and record the result."""
    at_an_end = version.step in (0, config.steps)
    wanted = config.evaluate.final_num_prompts if at_an_end else config.evaluate.num_prompts
    parts = evaluation_parts(parts, config.evaluate.temperature)
    tell = partial(tell_health, setup.meter)
    result = await evaluate(
        setup.held_out[:wanted],
        parts,
        name=f"evaluation {version.step}",
        at_once=evaluations_at_once(config),
        tell=tell,
    )
    setup.meter.record("evaluation", {"step": version.step, **asdict(result)})
    return result


def tell_health(meter: Meter, text: str, **where: int) -> None:
    """Record that something is wrong which does not end the run, and where, such as at which step."""
    meter.record("health", {"message": text, **where})


def evaluations_at_once(config: RunConfig) -> int:
    """Held-out answers that are asked for at once: what the engine runs, and as many that wait."""
    return 2 * config.rollout.max_running


def is_evaluated(config: RunConfig, step: int) -> bool:
    """Whether the weights after `step` steps are evaluated: the first, the last, and some between."""
    every = config.evaluate.every
    return step in (0, config.steps) or (every > 0 and step % every == 0)


def is_saved(config: RunConfig, step: int) -> bool:
    """Whether there is a checkpoint after `step` steps: the last, and some before."""
    every = config.checkpoint.every
    return step == config.steps or (every > 0 and step % every == 0)
