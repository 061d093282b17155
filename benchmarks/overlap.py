"""What asynchrony gains: rollout and training at once, at staleness bounds 0 (synchronous), 1 and 2.

    python benchmarks/overlap.py [--json FILE] [--quick]

Every arm does the same work in the same process, in short blocks whose order alternates
(`_overlap_blocks.py`); ratios are taken block by block within a round, and the median and range
of the rounds are printed, so that other load on the machine falls on all arms.

(a) **Pure computation**, the quickstart. Two roles on the same cores gain nothing from being
apart as such (with perfect scaling, the same work takes the same time); what can be gained is
what does not scale, such as decoding on one core while the other idles. The goal says that
asynchrony costs next to nothing where there is nothing to wait for.

(b) **Waiting**: the same, with a reward that waits for something outside, log-normally
(median 0.2 s, sigma 1). The *two-role law* says what no schedule can beat. Let t be the seconds
for which training computes in a step, r those for which rollout does, x the longest
time in a step's groups from asking for a trajectory until its reward is there, S the bound.

- Neither role can do more than it does when always busy: a step takes at least max(t, r).
- The groups from which version v + 1 is made start once version v - S is live, and it is made
  after the slowest of them. With D(v) the time at which version v is made,
  D(v + 1) >= D(v - S) + x(v). Summed over steps: a step takes at least mean(x) / (S + 1).

So steps/s <= 1 / max(t, r, mean(x) / (S + 1)) over many steps, with t, r and x measured in the
same block. When x varies, the means promise too much: a step with a short x can't lend its
slack to another across the strict order. How much of them even a perfect schedule reaches is
printed, for x the longest of 256 such waits and t = 0.4 s. What is possible follows from the
same inequalities without averaging: the least D with D(0) = 0 and
D(v + 1) = max(D(v) + t(v), D(v - S) + x(v)). The goal is set against both,
and so is what remains when x counts the drawn waits alone, which owe nothing to this program.

(c) **Scripted engines** on the virtual clock, so on no machine in particular: the real loop and
queue, log-normal times with sigma 1 for every completion and every micro-batch, steps of 16
groups of 4. The rollout engine has so many places, so a step takes rollout 64 / places mean
completions at least; training takes `training/rollout` of that. The limit is the larger of
the two, on the times that were drawn; filling and draining the pipeline count as lost. The
longest of 64 completions lasts about 7 mean ones, so by the law above strict order can keep the
places full where 7 is well below (S + 1) 64 / places: with 4 places (16 a step) from
bound 1 on, with 16 places (4 a step) at bound 2 only just, so it falls short of the goal
there. Bound 4 reaches it, and so does bound 2 with a look-ahead of two steps, under which a
token may be 4 versions old as well.

`--quick` waits for 0.05 s at the median and simulates 40 steps in place of 200, of which filling
and draining the pipeline are several percent, which the goals of (c) need not survive: it
shows that the benchmark works.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from report import Goal, Row, print_table, row, write_json

from asyncflow.cli.main import ENVIRONMENT
from asyncflow.core.config import CheckpointConfig, EvaluateConfig, RolloutConfig, RunConfig, TrainConfig
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import simulate
from asyncflow.recipes import quickstart

if TYPE_CHECKING:
    from _overlap_blocks import Bench, Block

LAW_GOAL = Goal(">=", 0.9)
BOUNDS = (0, 1, 2)
GROUPS, SIBLINGS = 32, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much work."""

    warmup_steps: int
    rounds: int
    measured: int
    waiting_rounds: int
    waiting_measured: int
    wait_s: float
    simulated_steps: int
    simulated_seeds: int


FULL = Scale(
    warmup_steps=200,
    rounds=8,
    measured=6,
    waiting_rounds=2,
    waiting_measured=12,
    wait_s=0.2,
    simulated_steps=400,
    simulated_seeds=2,
)
QUICK = Scale(
    warmup_steps=20,
    rounds=1,
    measured=3,
    waiting_rounds=1,
    waiting_measured=2,
    wait_s=0.05,
    simulated_steps=40,
    simulated_seeds=1,
)


# -- the laws --------------------------------------------------------------------------------


def law_step_s(block: Block, bound: int) -> float:
    """The shortest mean step that the two-role law allows."""
    return max(block.train_s, block.rollout_s, block.longest_s / (bound + 1))


def course_s(longest_s: Sequence[float], train_s: Sequence[float], bound: int) -> float:
    """The shortest time in which these steps can be made, from the first rollout on.

    >>> course_s([3.0, 3.0], [1.0, 1.0], bound=0), course_s([3.0, 3.0], [1.0, 1.0], bound=1)
    (6.0, 4.0)
    """
    made_s = [0.0]  # when each version is made; 0 is there at the beginning
    for step, (longest, train) in enumerate(zip(longest_s, train_s, strict=True)):
        made_s.append(max(made_s[step] + train, made_s[max(0, step - bound)] + longest))
    return made_s[-1]


def perfect_rows() -> Iterator[Row]:
    """What part of the law on means is within reach of a schedule that loses nothing."""
    steps, train_s, rng = 4000, 0.4, np.random.default_rng(0)
    longest_s = (0.2 * np.exp(rng.standard_normal((steps, GROUPS * SIBLINGS)))).max(axis=1).tolist()
    for bound in BOUNDS:
        on_means_s = steps * max(train_s, statistics.mean(longest_s) / (bound + 1))
        reached = on_means_s / course_s(longest_s, [train_s] * steps, bound)
        yield row(f"(b) perfect schedule, bound {bound}: throughput to the law on means", [reached], "ratio")


# -- (a) and (b): the real engines -----------------------------------------------------------

Rounds = list[dict[int, "Block"]]


def make_config(scale: Scale) -> RunConfig:
    """The quickstart without evaluation, checkpoints, learning or dropped groups: equal work for all arms."""
    config = quickstart.defaults()
    changes: dict[str, object] = {
        "groups_per_step": GROUPS,
        "group_size": SIBLINGS,
        "warmup": config.warmup.model_copy(update={"steps": scale.warmup_steps}),
        "train": config.train.model_copy(update={"learning_rate": 0.0}),
        "algorithm": config.algorithm.model_copy(update={"drop_no_signal": False}),
        "evaluate": EvaluateConfig(every=0, final_num_prompts=1),
    }
    return config.model_copy(update=changes)


async def measure(scale: Scale) -> tuple[Rounds, Rounds]:
    """The blocks of (a) and of (b)."""
    from _overlap_blocks import open_bench  # not earlier: torch reads the environment when it is imported

    with tempfile.TemporaryDirectory() as folder:
        async with open_bench(make_config(scale), Path(folder)) as bench:
            await bench.run(bound=1, measured=1, seed=0, wait_s=0.0)  # the first calls of everything are slow
            pure = await run_rounds(bench, scale.rounds, scale.measured, wait_s=0.0)
            waiting = await run_rounds(bench, scale.waiting_rounds, scale.waiting_measured, wait_s=scale.wait_s)
    return pure, waiting


async def run_rounds(bench: Bench, rounds: int, measured: int, *, wait_s: float) -> Rounds:
    """One block of each bound in each round, in an order that turns round."""
    blocks: Rounds = []
    for seed in range(rounds):
        order = BOUNDS if seed % 2 == 0 else BOUNDS[::-1]
        blocks.append(
            {bound: await bench.run(bound=bound, measured=measured, seed=seed, wait_s=wait_s) for bound in order}
        )
    return blocks


def block_rows(label: str, rounds: Rounds, ratio_goal: Goal | None) -> Iterator[Row]:
    """What both (a) and (b) report."""
    for bound in BOUNDS:
        blocks = [one[bound] for one in rounds]
        yield row(f"{label}, bound {bound}: steps/s", (1 / block.step_s for block in blocks), "1/s")
        yield row(f"{label}, bound {bound}: both roles busy", (block.both_busy for block in blocks), "of the time")
    for bound in BOUNDS[1:]:
        ratios = (one[0].step_s / one[bound].step_s for one in rounds)
        yield row(f"{label}, bound {bound}: throughput to bound 0", ratios, "ratio", ratio_goal)


def law_rows(label: str, rounds: Rounds) -> Iterator[Row]:
    """How near to what is possible."""
    for bound in BOUNDS:
        blocks = [one[bound] for one in rounds]
        name = f"{label}, bound {bound}"
        yield row(f"{name}: training computes", (block.train_s for block in blocks), "s/step")
        yield row(f"{name}: rollout computes", (block.rollout_s for block in blocks), "s/step")
        yield row(f"{name}: slowest trajectory", (block.longest_s for block in blocks), "s/step")
        yield row(f"{name}: two-role law on means allows", (1 / law_step_s(block, bound) for block in blocks), "1/s")
        reached = (law_step_s(block, bound) / block.step_s for block in blocks)
        yield row(f"{name}: throughput to the law on means", reached, "ratio", LAW_GOAL)
        least_s = [course_s(block.course_longest_s, block.course_train_s, bound) for block in blocks]
        steps = len(blocks[0].course_train_s)
        yield row(f"{name}: from the start", (steps / block.elapsed_s for block in blocks), "1/s")
        yield row(f"{name}: two-role law allows from the start", (steps / seconds for seconds in least_s), "1/s")
        ratios = (seconds / block.elapsed_s for seconds, block in zip(least_s, blocks, strict=True))
        yield row(f"{name}: throughput to the two-role law", ratios, "ratio", LAW_GOAL)
        alone = (course_s(one.course_waits_s, one.course_train_s, bound) / one.elapsed_s for one in blocks)
        yield row(f"{name}: the same, if sampling took no time", alone, "ratio")


# -- (c): scripted engines -------------------------------------------------------------------

SIMULATED_GROUPS, SIMULATED_SIBLINGS = 16, 4
MEAN_TOKENS = 10.9
"""Of the simulated samples: `prompt 0` to `prompt 999`, one token for each character, and one sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A simulated run. A completion takes a second on average; training takes `train_share` of rollout's time."""

    bound: int
    look_ahead: int = 1
    places: int = 4
    train_share: float = 0.8

    @property
    def name(self) -> str:
        """What is printed."""
        window = f", look-ahead {self.look_ahead}" if self.look_ahead > 1 else ""
        return f"(c) {self.places} places, training/rollout {self.train_share:g}, bound {self.bound}{window}"


SHAPES = (
    *(Shape(bound=bound, train_share=share) for share in (0.8, 1.0, 1.25) for bound in (0, 1, 2, 4)),
    *(Shape(bound=bound, places=16) for bound in (2, 4, 8)),
    Shape(bound=1, places=16, look_ahead=SIMULATED_GROUPS + 1),
    Shape(bound=2, places=16, look_ahead=2 * SIMULATED_GROUPS + 1),
)


class LogNormalScript:
    """Times for a shape, and how much of each has been drawn."""

    def __init__(self, shape: Shape) -> None:
        self._token_s = shape.train_share / shape.places / MEAN_TOKENS
        self.rollout_s = 0.0
        self.train_s = 0.0

    def script(self) -> Script:
        """For the scripted engines."""
        return Script(
            completion_s=self._completion_s,
            num_tokens=lambda rng: 1,
            accumulate_s=self._accumulate_s,
            apply_s=lambda rng: 0.0,
            load_s=lambda rng: 0.0,
        )

    def _completion_s(self, rng: np.random.Generator) -> float:
        seconds = log_normal(rng, 1.0)
        self.rollout_s += seconds
        return seconds

    def _accumulate_s(self, rng: np.random.Generator, num_tokens: int) -> float:
        seconds = log_normal(rng, self._token_s * num_tokens)
        self.train_s += seconds
        return seconds


def simulated_ratio(shape: Shape, steps: int, seed: int) -> float:
    """The least time in which the slower role can do what was drawn, over the time that the run took."""
    config = RunConfig(
        seed=seed,
        steps=steps,
        max_staleness=shape.bound,
        look_ahead=shape.look_ahead,
        groups_per_step=SIMULATED_GROUPS,
        group_size=SIMULATED_SIBLINGS,
        rollout=RolloutConfig(max_running=shape.places, time_limit_s=1e6),
        train=TrainConfig(micro_batch_tokens=64),
        evaluate=EvaluateConfig(every=0, final_num_prompts=1),
        checkpoint=CheckpointConfig(every=0),
    )
    drawn = LogNormalScript(shape)
    elapsed_s = simulate(config, drawn.script()).elapsed_s
    return max(drawn.rollout_s / shape.places, drawn.train_s) / elapsed_s


def log_normal(rng: np.random.Generator, mean: float, sigma: float = 1.0) -> float:
    """A draw with this mean."""
    return mean * float(np.exp(sigma * rng.standard_normal() - sigma**2 / 2))


def simulated_rows(scale: Scale) -> Iterator[Row]:
    """Throughput of every shape."""
    for shape in SHAPES:
        ratios = (simulated_ratio(shape, scale.simulated_steps, seed) for seed in range(scale.simulated_seeds))
        yield row(f"{shape.name}: throughput to limit", ratios, "ratio", Goal(">=", 0.95) if shape.bound >= 2 else None)


# -- the table -------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--quick", action="store_true", help="the same rows on less work, in under a minute")
    options = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    scale = QUICK if options.quick else FULL
    pure, waiting = asyncio.run(measure(scale))
    rows = [*block_rows("(a) computation", pure, Goal(">=", 0.97)), *block_rows("(b) waiting", waiting, None)]
    rows += [*law_rows("(b) waiting", waiting), *perfect_rows(), *simulated_rows(scale)]
    print_table(rows)
    if options.json:
        write_json(options.json, rows, seeds=range(scale.rounds))


if __name__ == "__main__":
    main()
