"""What staleness costs in learning: the quickstart at staleness bounds 0, 1, 2 and 4.

    python benchmarks/learning.py --json FILE [--plot FILE.png] [--quick]

For each seed the model is warmed up once; from that model every bound takes the same number of
reinforcement-learning steps on the same prompts, in an order that changes from seed to seed.
Then each model answers the same 2,048 held-out problems, sampled at temperature 1.

Reported: accuracy after equal steps; its paired difference to synchronous training, with the
95 % interval of the mean over seeds (Student's t); seconds and steps until the accuracy on
the way (512 problems every 5 steps; the time that evaluation takes is left out) first
reaches 0.8.

A run that was done is kept in `--work` and not repeated, so an interrupted benchmark goes on.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import msgspec
from report import Row, print_table, t_interval, write_json

BOUNDS = (0, 1, 2, 4)
TARGET = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much work. The quick one shows that the benchmark works, not how well anything learns."""

    seeds: int
    steps: int
    warmup_steps: int
    held_out: int
    on_the_way: int
    every: int
    drop_no_signal: bool


FULL = Scale(seeds=5, steps=60, warmup_steps=350, held_out=2048, on_the_way=512, every=5, drop_no_signal=True)
QUICK = Scale(seeds=1, steps=2, warmup_steps=5, held_out=64, on_the_way=32, every=1, drop_no_signal=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One run: final accuracy, and accuracy by (step, training seconds) on the way."""

    seed: int
    bound: int
    accuracy: float
    curve: tuple[tuple[int, float, float], ...]

    def reached(self, target: float) -> tuple[int, float]:
        """Steps and seconds until the accuracy first reached the target; infinite if it never did."""
        for step, seconds, accuracy in self.curve:
            if accuracy >= target:
                return step, seconds
        return 0, math.inf


def main() -> None:
    """Run, or go on, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, default=Path("bench-results/learning.png"), help="draw the curves here")
    parser.add_argument("--work", type=Path, default=Path("bench-results/learning"), help="runs are kept here")
    parser.add_argument("--quick", action="store_true", help="the same rows on very little work")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    work = options.work / ("quick" if options.quick else "full")
    outcomes = [outcome for seed in range(scale.seeds) for outcome in outcomes_of_seed(seed, scale, work)]
    rows = summarize(outcomes)
    print_table(rows)
    plot(outcomes, options.plot)
    print(f"curves: {options.plot}")
    if options.json:
        write_json(options.json, rows, seeds=list(range(scale.seeds)))


def outcomes_of_seed(seed: int, scale: Scale, work: Path) -> list[Outcome]:
    """All bounds of one seed; the order rotates, so that no bound always meets a warm machine."""
    turn = seed % len(BOUNDS)
    return [outcome_of(seed, bound, scale, work) for bound in (*BOUNDS[turn:], *BOUNDS[:turn])]


def outcome_of(seed: int, bound: int, scale: Scale, work: Path) -> Outcome:
    """One run, or what is kept of it."""
    kept = work / f"seed{seed}-bound{bound}.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=Outcome)
    outcome = train(seed, bound, warm_model(seed, scale, work), scale, work)
    kept.write_bytes(msgspec.json.encode(outcome))
    print(f"seed {seed}  bound {bound}  accuracy {outcome.accuracy:.3f}", flush=True)
    return outcome


def warm_model(seed: int, scale: Scale, work: Path) -> Path:
    """The model of a seed after its warm-up."""
    from asyncflow.recipes import runner

    target = work / f"warm-{seed}"
    if not target.exists():
        words = [f"seed={seed}", f"name=warm-up-{seed}", "steps=0", f"warmup.steps={scale.warmup_steps}"]
        runner.export(run([*words, "evaluate.final_num_prompts=64"], work), target)
    return target


def train(seed: int, bound: int, model: Path, scale: Scale, work: Path) -> Outcome:
    """Reinforcement learning from the warm model under one bound."""
    from asyncflow.observe.records import read_metrics

    folder = run(
        [
            f"name=seed{seed}-bound{bound}",
            f"seed={seed}",
            f"model={model}",
            f"max_staleness={bound}",
            f"steps={scale.steps}",
            "warmup.steps=0",
            f"evaluate.every={scale.every}",
            f"evaluate.num_prompts={scale.on_the_way}",
            f"evaluate.final_num_prompts={scale.held_out}",
            "checkpoint.every=0",
            f"algorithm.drop_no_signal={str(scale.drop_no_signal).lower()}",
        ],
        work,
    )
    metrics = read_metrics(folder)
    tests = {int(m.values["step"]): float(m.values["accuracy"]) for m in metrics if m.kind == "evaluation"}
    step_s = [float(m.values["step_s"]) for m in metrics if m.kind == "step"]
    seconds = training_seconds(step_s, measured_after=set(tests))
    curve = tuple((step, seconds[step], accuracy) for step, accuracy in tests.items())
    return Outcome(seed=seed, bound=bound, accuracy=curve[-1][2], curve=curve)


def training_seconds(step_s: Sequence[float], *, measured_after: set[int]) -> list[float]:
    """Seconds after 0, 1, 2, … steps, had nobody evaluated: a step beside an evaluation counts as a median one.

    Weights are evaluated while the next step is made, so the evaluation after step n slows step n + 1.
    """
    undisturbed = [s for step, s in enumerate(step_s) if step not in measured_after] or list(step_s)
    usual_s = statistics.median(undisturbed)
    taken = [usual_s if step in measured_after else s for step, s in enumerate(step_s)]
    return [0.0, *accumulate(taken)]


def run(words: Sequence[str], work: Path) -> Path:
    """Run the quickstart with these settings; the run folder."""
    import shutil

    from asyncflow.core.settings import resolve
    from asyncflow.observe.progress import SilentProgress
    from asyncflow.recipes import runner
    from asyncflow.recipes.recipe import load_recipe

    recipe = load_recipe("quickstart")
    config = resolve(recipe.defaults(), words=words)
    shutil.rmtree(work / "runs" / config.name, ignore_errors=True)  # of a benchmark that was interrupted
    return runner.run(recipe, config, work / "runs", SilentProgress()).folder


def summarize(outcomes: Sequence[Outcome]) -> list[Row]:
    """The table: for each bound accuracy, difference to synchronous, and time to 0.8."""
    by_bound = {bound: sorted((o for o in outcomes if o.bound == bound), key=lambda o: o.seed) for bound in BOUNDS}
    rows: list[Row] = []
    for bound, mine in by_bound.items():
        accuracies = [100 * outcome.accuracy for outcome in mine]
        mean, half = t_interval(accuracies)
        rows.append(Row(name=f"accuracy at bound {bound}", value=mean, unit="%", spread=f"± {half:.1f}"))
    for bound in BOUNDS[1:]:
        pairs = zip(by_bound[bound], by_bound[0], strict=True)
        mean, half = t_interval([100 * (mine.accuracy - synchronous.accuracy) for mine, synchronous in pairs])
        is_bound_by_goal = bound in (1, 2)
        rows.append(
            Row(
                name=f"accuracy at bound {bound} minus synchronous",
                value=mean,
                unit="points",
                spread=f"95 % interval {mean - half:.1f} to {mean + half:.1f}",
                goal="within 2 points" if is_bound_by_goal else "",
                met=mean >= -2 if is_bound_by_goal else None,
            )
        )
    for bound, mine in by_bound.items():
        reached = [outcome.reached(TARGET) for outcome in mine]
        seconds = [s for _, s in reached if math.isfinite(s)]
        steps = [n for n, s in reached if math.isfinite(s)]
        spread = f"{len(seconds)} of {len(mine)} seeds, median after {statistics.median(steps or [0]):g} steps"
        median = statistics.median(seconds) if seconds else math.nan
        rows.append(Row(name=f"time to {TARGET:g} at bound {bound}", value=median, unit="s", spread=spread))
    return rows


def plot(outcomes: Sequence[Outcome], file: Path) -> None:
    """Accuracy over steps and over seconds: a thin line for each seed, the mean in bold."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (over_steps, over_time) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for color, bound in zip(("C0", "C1", "C2", "C3"), BOUNDS, strict=True):
        curves = [outcome.curve for outcome in outcomes if outcome.bound == bound]
        for curve in curves:
            over_time.plot([s for _, s, _ in curve], [100 * a for *_, a in curve], color=color, alpha=0.3, lw=0.8)
        steps = [step for step, *_ in curves[0]]
        means = [100 * statistics.mean(curve[i][2] for curve in curves) for i in range(len(steps))]
        seconds = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        over_steps.plot(steps, means, color=color, lw=2, label=f"bound {bound}")
        over_time.plot(seconds, means, color=color, lw=2, label=f"bound {bound}")
    over_steps.set(xlabel="optimizer steps", ylabel="held-out accuracy, %", title="equal steps")
    over_time.set(xlabel="seconds without evaluation", title="equal time")
    over_steps.legend()
    for axes in (over_steps, over_time):
        axes.axhline(100 * TARGET, color="grey", lw=0.7, ls=":")
        axes.grid(alpha=0.25)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
