"""The warm-up: the real loop with demonstrations in place of rollouts, on the virtual clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from asyncflow.core.columns import LOSS_MASK, TOKEN_IDS
from asyncflow.core.config import RunConfig, TrainConfig, WarmupConfig
from asyncflow.core.ports import Loss
from asyncflow.core.types import Demonstration, FloatArray, Group, IntArray, MicroBatch, Prompt
from asyncflow.core.world import MemoryDisk, World
from asyncflow.engines.scripted import CountTokens, Script, ScriptedRenderer, ScriptedTrainer
from asyncflow.plan.virtual import run_virtually
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.warmup import tokenize, warm_up

WORLD = World(seed=4, disk=MemoryDisk(), is_real=False)


class Imitator(ScriptedTrainer):
    """Keeps the samples of every step, and the denominators."""

    seen: list[tuple[int, list[int], list[bool]]]
    denominators: list[float]

    async def accumulate(self, batch: MicroBatch, loss: Loss[FloatArray]) -> None:
        assert set(batch.columns) == {TOKEN_IDS, LOSS_MASK}
        tokens, masks = (batch.columns[name].rows() for name in (TOKEN_IDS, LOSS_MASK))
        self.seen += [(self.step, one.tolist(), mask.tolist()) for one, mask in zip(tokens, masks, strict=True)]
        await ScriptedTrainer.accumulate(self, batch, loss)


class Records:
    def __init__(self) -> None:
        self.kinds: list[str] = []
        self.last: Mapping[str, float | int | str] = {}

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        self.kinds.append(kind)
        self.last = values

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Forget it."""

    def group(self, group: Group) -> None:
        raise AssertionError("a demonstration is no rollout")


def samples(count: int) -> list[tuple[IntArray, IntArray]]:
    """Prompt (i, i) and completion (100 + i, 0)."""
    return [(np.array([i, i], np.int32), np.array([100 + i, 0], np.int32)) for i in range(count)]


def imitate(
    demonstrations: Sequence[tuple[IntArray, IntArray]], steps: int, batch_size: int
) -> tuple[Imitator, Records]:
    config = RunConfig(
        warmup=WarmupConfig(steps=steps, batch_size=batch_size), train=TrainConfig(micro_batch_tokens=10)
    )
    trainer, records = Imitator(world=WORLD, script=Script()), Records()
    trainer.seen = []
    run_virtually(warm_up(config, trainer, CountTokens(), demonstrations, Meter(records), WORLD))
    return trainer, records


def test_every_step_gets_its_batch_and_every_demonstration_comes_once_an_epoch() -> None:
    trainer, records = imitate(samples(12), steps=6, batch_size=4)
    assert trainer.version.step == 6
    assert Counter(step for step, _, _ in trainer.seen) == dict.fromkeys(range(6), 4)
    for epoch in (range(3), range(3, 6)):
        firsts = [tokens[0] for step, tokens, _ in trainer.seen if step in epoch]
        assert sorted(firsts) == list(range(12))
    assert records.kinds == ["warmup"] * 6
    assert (records.last["step"], records.last["steps"], records.last["trained"]) == (6, 6, 6)


def test_the_completion_is_learnt_and_the_prompt_is_not() -> None:
    trainer, _ = imitate(samples(5), steps=1, batch_size=5)
    for _, tokens, mask in trainer.seen:
        assert tokens == [tokens[0], tokens[0], 100 + tokens[0], 0]
        assert mask == [False, False, True, True]


def test_the_order_is_drawn_from_the_seed_and_not_the_files() -> None:
    orders = [[tokens[0] for _, tokens, _ in imitate(samples(20), steps=4, batch_size=5)[0].seen] for _ in range(2)]
    assert orders[0] == orders[1] != list(range(20))


def test_fewer_demonstrations_than_a_batch_come_again() -> None:
    trainer, _ = imitate(samples(3), steps=2, batch_size=6)
    assert Counter(tokens[0] for _, tokens, _ in trainer.seen) == {0: 4, 1: 4, 2: 4}


def test_demonstrations_are_tokenized_with_the_end_token() -> None:
    demonstration = Demonstration(prompt=Prompt(id="p", text="ab"), completion="c")
    [(prompt, completion)] = tokenize([demonstration], ScriptedRenderer())
    assert (prompt.tolist(), completion.tolist()) == ([97, 98], [99, 0])
