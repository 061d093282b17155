"""Short, comparable pieces of a real run: the same model, prompts and completions at any staleness bound.

A block starts from the same warm-started checkpoint, with engines that stay open. Its learning
rate is 0: every computation is made, but the policy stays as it is. So all arms sample the
same completions for the same tickets, and what differs is only when. (With a learning rate
the policy of the synchronous arm learns first, writes longer answers, and has more to do.)

The first steps of a block fill the pipeline and the last ones drain it; neither is measured.
"""

from __future__ import annotations

import asyncio
import statistics
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from asyncflow.algo.algorithms import make_warmup_loss
from asyncflow.core.config import RunConfig
from asyncflow.core.types import Group, Prompt
from asyncflow.core.world import World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.recipes import quickstart
from asyncflow.recipes.session import Session, open_session, reinforcement_phase
from asyncflow.rollout.chat import Agent, Chat
from asyncflow.rollout.rewards import score
from asyncflow.workflow.meter import Span, common_spans, join_spans, total_s
from asyncflow.workflow.reinforce import reinforce
from asyncflow.workflow.warmup import tokenize, warm_up

FILL_STEPS = 2
SIGMA = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What was seen: seconds for each measured step, and of each role in it; then the whole course.

    The course is all steps up to the last measured one: `elapsed_s` from the first rollout to its end,
    and for each step the seconds that training computed (`course_train_s`) and those from
    asking for its slowest trajectory until that was rewarded (`course_longest_s`), and the
    longest wait among them, which no engine can shorten (`course_waits_s`).
    """

    step_s: float
    train_s: float
    rollout_s: float
    both_busy: float
    elapsed_s: float
    course_train_s: tuple[float, ...]
    course_longest_s: tuple[float, ...]
    course_waits_s: tuple[float, ...]

    @property
    def longest_s(self) -> float:
        """Seconds of a measured step's slowest trajectory on average."""
        return statistics.mean(self.course_longest_s[FILL_STEPS:])


@dataclass(slots=True)
class Recorder:
    """The observer of a session; emptied before each block."""

    spans: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    step_ends_s: list[float] = field(default_factory=list)
    tickets: dict[str, int] = field(default_factory=dict)
    chains_s: dict[str, list[Span]] = field(default_factory=lambda: defaultdict(list))
    waits_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def clear(self) -> None:
        """Forget the block before."""
        self.spans.clear()
        self.step_ends_s.clear()
        self.tickets.clear()
        self.chains_s.clear()
        self.waits_s.clear()

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Note when a step ended."""
        if kind == "step":
            self.step_ends_s.append(World.now_s())

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Note when a role was busy."""
        self.spans[role].append((start_s, end_s))

    def group(self, group: Group) -> None:
        """Note which ticket a prompt was."""
        self.tickets[group.prompt.id] = group.ticket

    def chain(self, prompt: Prompt, start_s: float, end_s: float) -> None:
        """Note how long a trajectory took, reward included."""
        self.chains_s[prompt.id].append((start_s, end_s))

    def block(self, measured: int, groups_per_step: int) -> Block:
        """The `measured` steps after the pipeline was filled."""
        start_s, end_s = self.step_ends_s[FILL_STEPS - 1], self.step_ends_s[FILL_STEPS + measured - 1]
        train, rollout = (join_spans(self.spans[role], start_s, end_s) for role in ("train", "rollout"))
        begin_s = min(start for chains in self.chains_s.values() for start, _ in chains)
        chains_s = {name: [end - start for start, end in chains] for name, chains in self.chains_s.items()}
        step_ends_s = [begin_s, *self.step_ends_s[: FILL_STEPS + measured]]
        return Block(
            step_s=(end_s - start_s) / measured,
            train_s=total_s(train) / measured,
            rollout_s=total_s(rollout) / measured,
            both_busy=total_s(common_spans(train, rollout)) / (end_s - start_s),
            elapsed_s=end_s - begin_s,
            course_train_s=tuple(total_s(join_spans(self.spans["train"], *step)) for step in pairwise(step_ends_s)),
            course_longest_s=self._longest_s(chains_s, FILL_STEPS + measured, groups_per_step),
            course_waits_s=self._longest_s(self.waits_s, FILL_STEPS + measured, groups_per_step),
        )

    def _longest_s(self, seconds: Mapping[str, Sequence[float]], steps: int, groups_per_step: int) -> tuple[float, ...]:
        """Of each step; the order is strict and nothing is dropped, so tickets say which step a group is of."""
        longest_s = [0.0] * steps
        for prompt_id, ticket in self.tickets.items():
            step = ticket // groups_per_step
            if step < steps:
                longest_s[step] = max(longest_s[step], *seconds.get(prompt_id, [0.0]))
        return tuple(longest_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Open engines and the weights that every block starts from."""

    config: RunConfig
    session: Session
    recorder: Recorder
    checkpoint: Path

    async def run(self, *, bound: int, measured: int, seed: int, wait_s: float) -> Block:
        """One block at this bound; rewards wait for `wait_s` at the median; the seed draws prompts and waits."""
        self.recorder.clear()
        await self.session.trainer.load(self.checkpoint)
        steps = FILL_STEPS + measured + bound  # at its end the gate must not hold back what is measured
        config = self.config.model_copy(update={"steps": steps, "max_staleness": bound})
        world = World(seed=seed)
        setup = replace(self.session.setup(None), world=world, agent=self._agent(world, wait_s), save=_save_nothing)
        await reinforce(config, setup)
        return self.recorder.block(measured, config.groups_per_step)

    def _agent(self, world: World, wait_s: float) -> Agent:
        """The quickstart's agent; its reward waits for something outside."""

        async def reward(prompt: Prompt, completion: str) -> float:
            if wait_s:  # the n-th sibling to finish waits equally long in every arm
                waits_s = self.recorder.waits_s[prompt.id]
                rng = world.rng("wait", prompt.id, len(waits_s))
                waits_s.append(wait_s * float(np.exp(SIGMA * rng.standard_normal())))
                await asyncio.sleep(waits_s[-1])
            return quickstart.reward(prompt, completion)

        async def agent(prompt: Prompt, chat: Chat) -> float:
            start_s = world.now_s()
            value = await score(reward, prompt, await chat.respond(prompt.text), world)
            self.recorder.chain(prompt, start_s, world.now_s())
            return value

        return agent


async def _save_nothing(step: int, ledger: LedgerSnapshot) -> int:
    """A block leaves no checkpoint."""
    return 0


@asynccontextmanager
async def open_bench(config: RunConfig, folder: Path) -> AsyncIterator[Bench]:
    """The quickstart's engines with a warm-started model, in an empty folder."""
    task, world, recorder = quickstart.task(config), World(seed=config.seed), Recorder()
    (folder / "model").mkdir()
    async with open_session(
        config,
        task,
        source=task.model(folder / "model"),
        folder=folder,
        lineage="benchmark",
        observer=recorder,
        world=world,
    ) as session:
        samples = tokenize(task.demonstrations, session.renderer)
        await warm_up(config, session.trainer, make_warmup_loss(), samples, session.meter, world)
        await session.trainer.begin_phase(reinforcement_phase(config))
        checkpoint = folder / "checkpoint"
        checkpoint.mkdir()
        await session.trainer.save(checkpoint)
        yield Bench(config=config, session=session, recorder=recorder, checkpoint=checkpoint)
