"""A simulated run: the real loop, queue and gate on the virtual clock, with scripted engines.

Nothing here decides anything about the run; it only says how long things take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass

from asyncflow.algo.advantages import grpo
from asyncflow.algo.algorithms import Algorithm
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, REF_LOGPROBS, TOKEN_IDS, VERSIONS
from asyncflow.core.config import RunConfig
from asyncflow.core.types import Group, Prompt
from asyncflow.core.world import MemoryDisk, World
from asyncflow.data.history import History
from asyncflow.data.ledger import Ledger, LedgerCounts, LedgerSnapshot
from asyncflow.data.log import Log, NoLog
from asyncflow.engines.scripted import CountTokens, Script, ScriptedRenderer, ScriptedRollout, ScriptedTrainer
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Agent, Chat
from asyncflow.workflow.meter import Meter, common_spans, join_spans, total_s
from asyncflow.workflow.reinforce import Setup, make_gate, make_tasks, reinforce

COLUMNS = (TOKEN_IDS, LOSS_MASK, LOGPROBS, VERSIONS, ADVANTAGE)
NUM_PROMPTS = 1000
NUM_HELD_OUT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What came of a simulated run: seconds of virtual time, shares of it, and the accounts."""

    elapsed_s: float
    steps: int
    train_busy: float
    rollout_busy: float
    both_busy: float
    staleness_max: int
    counts: LedgerCounts
    trained_rows: tuple[tuple[int, int, int], ...]
    snapshots: tuple[LedgerSnapshot, ...]

    @property
    def steps_per_s(self) -> float:
        """Throughput."""
        return self.steps / self.elapsed_s


class _Recorder:
    """An observer that keeps spans and step records."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[float, float]]] = {"train": [], "rollout": []}
        self.steps: list[Mapping[str, float | int | str]] = []

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Keep the records of steps."""
        if kind == "step":
            self.steps.append(values)

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Keep it."""
        self.spans[role].append((start_s, end_s))

    def group(self, group: Group) -> None:
        """Forget it."""


def simulate(
    config: RunConfig,
    script: Script,
    *,
    agent: Agent | None = None,
    seed: int | None = None,
    snapshot: LedgerSnapshot | None = None,
    interrupt_at_s: float | None = None,
    log: Log | None = None,
) -> Simulation:
    """Run `config` with engines that follow `script`; `seed` draws the order of simultaneous events.

    Where `kl_coef` is above 0, a reference policy scores the samples. With a `snapshot` of an
    earlier run, goes on where that one stopped. A `log` is told everything. Raises whatever the run
    raises, `DeadlockError` instead of hanging, and `TimeoutError` when it was interrupted.
    """

    async def main() -> Simulation:
        async with asyncio.timeout(interrupt_at_s):
            return await _run(config, script, agent or answer_once, snapshot, log)

    return run_virtually(main(), seed=seed)


async def answer_once(prompt: Prompt, chat: Chat) -> float:
    """An agent whose reward depends on what was sampled: 1 where the last token's number is odd."""
    return float((await chat.respond(prompt.text)).endswith(("1", "3", "5", "7", "9")))


async def _run(
    config: RunConfig, script: Script, agent: Agent, snapshot: LedgerSnapshot | None, log: Log | None
) -> Simulation:
    world = World(seed=config.seed, disk=MemoryDisk(), is_real=False)
    recorder = _Recorder()
    meter = Meter(recorder)
    first_step = snapshot.trained // config.groups_per_step if snapshot else 0
    trainer = ScriptedTrainer(world=world, script=script, observer=meter, step=first_step)
    prompts = [Prompt(id=str(i), text=f"prompt {i:03d}") for i in range(NUM_PROMPTS)]
    saved: list[LedgerSnapshot] = []
    has_reference = config.algorithm.kl_coef > 0
    reference = ScriptedTrainer(world=world, script=script) if has_reference else None
    columns = (*COLUMNS, REF_LOGPROBS) if has_reference else COLUMNS

    async def save(step: int, snapshot: LedgerSnapshot) -> int:
        saved.append(snapshot)
        return 0

    setup = Setup(
        world=world,
        trainer=trainer,
        rollout=ScriptedRollout(world=world, script=script, slots=config.rollout.max_running, observer=meter),
        renderer=ScriptedRenderer(),
        agent=agent,
        algorithm=Algorithm(columns=columns, loss=CountTokens(), advantages=grpo),
        reference=reference,
        prompts=prompts,
        held_out=prompts[:NUM_HELD_OUT],
        meter=meter,
        save=save,
        log=log or NoLog(),
        history=History(ledger=Ledger(make_tasks(config, columns), make_gate(config), snapshot)) if log else None,
    )
    counts = await reinforce(config, setup, snapshot)
    elapsed_s = max(1e-9, world.now_s())  # a run that was at its end already may take no time at all
    train, rollout = (join_spans(recorder.spans[role], 0.0, elapsed_s) for role in ("train", "rollout"))
    return Simulation(
        elapsed_s=elapsed_s,
        steps=trainer.version.step - first_step,
        train_busy=total_s(train) / elapsed_s,
        rollout_busy=total_s(rollout) / elapsed_s,
        both_busy=total_s(common_spans(train, rollout)) / elapsed_s,
        staleness_max=max((int(record["staleness_max"]) for record in recorder.steps), default=0),
        counts=counts,
        trained_rows=tuple(trainer.trained_rows),
        snapshots=tuple(saved),
    )
