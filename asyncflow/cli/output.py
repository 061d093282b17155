"""What the commands print. Text comes from users and models, so none of it is read as markup."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from asyncflow.core.errors import AsyncFlowError, ConfigError
from asyncflow.core.setting_list import Setting
from asyncflow.core.settings import toml_value
from asyncflow.observe.plain_text import harmless, short_time
from asyncflow.observe.progress_state import ProgressState
from asyncflow.observe.run_folder import list_runs
from asyncflow.plan.simulate import Simulation
from asyncflow.workflow.checkpoint_folder import checkpoint_step, list_checkpoints

DEFAULT_ROOT = Path("runs")
_DATE = re.compile(r"\d{4}-\d\d-\d\d-")


def show_error(error: AsyncFlowError) -> None:
    """The error on stderr: each problem of a configuration on its own line."""
    console = Console(stderr=True)
    text = Text.assemble(("error: ", "bold red"))
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        text.append(f"{len(error.problems)} problems")
        for problem in error.problems:
            text.append(f"\n  {harmless(problem)}")
    else:
        message = harmless(str(error))
        text.append(re.sub(" {3,}", ": ", message) if isinstance(error, ConfigError) else message)
    console.print(text, soft_wrap=True, highlight=False)


def show_note(text: str) -> None:
    """Say something beside the result."""
    print(harmless(text), file=sys.stderr)


def show_json(value: object) -> None:
    """A value for other programs, on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(rows: Sequence[tuple[str, str]], *, title: str = "") -> None:
    """A title, and names with what belongs to them."""
    console = Console()
    if title:
        console.print(Text(title, "bold"), soft_wrap=True, highlight=False)
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(f"  {harmless(name)}", "cyan"), Text(harmless(value)))
    console.print(table, highlight=False)


def show_settings(settings: Sequence[Setting]) -> None:
    """Every setting by its section, with its default and what it does."""
    console = Console()
    for section, group in groupby(settings, key=lambda setting: setting.section):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column()
        for one in group:
            name = Text.assemble((f"  {one.name}", "cyan"), f"={_word(one)}")
            about = Text.assemble(one.description, ("" if one.expected == "text" else f"; {one.expected}", "dim"))
            table.add_row(name, about)
        console.print(Text(f"\n{section or 'the run'}", "bold"))
        console.print(table, highlight=False)


def show_numbers(numbers: Mapping[str, float]) -> None:
    """What an evaluation found, in the words of `workflow.evaluation.Evaluation`."""
    show_rows([(_measure(name, numbers), _number(name, numbers)) for name in numbers if _is_worth_a_row(name, numbers)])


def show_simulations(simulations: Mapping[int, Simulation], *, as_json: bool) -> None:
    """One row for each staleness bound; the ratio is to the first."""
    first = next(iter(simulations.values()))
    rows = [
        {
            "bound": bound,
            "steps_per_s": run.steps_per_s,
            "ratio": run.steps_per_s / first.steps_per_s,
            "train_busy": run.train_busy,
            "rollout_busy": run.rollout_busy,
            "both_busy": run.both_busy,
            "staleness_max": run.staleness_max,
        }
        for bound, run in simulations.items()
    ]
    if as_json:
        show_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("bound", "steps/s", "ratio", "training busy", "rollout busy", "both", "staleness"):
        table.add_column(column, justify="right")
    for row in rows:
        shares = (f"{row[name]:.0%}" for name in ("train_busy", "rollout_busy", "both_busy"))
        table.add_row(
            str(row["bound"]), f"{row['steps_per_s']:.3g}", f"{row['ratio']:.2f}", *shares, f"<= {row['staleness_max']}"
        )
    Console().print(table)


def show_summary(
    folder: Path,
    *,
    recipe: str,
    steps: int,
    before: float | None,
    after: float | None,
    elapsed_s: float,
    dropped: Mapping[str, int],
    failures: Sequence[str],
) -> None:
    """How a run ended, and what to try next."""
    console = Console()
    done = Text.assemble(("done ", "bold green"), f"{steps} steps in {short_time(elapsed_s)}")
    if before is not None and after is not None:
        done.append("   held-out accuracy ").append(f"{before:.1%} → {after:.1%}", "bold green")
    console.print(done, soft_wrap=True, highlight=False)
    word = run_word(folder)
    rows = [("run folder", f"{folder}")]
    if dropped:
        rows.append(
            ("dropped", ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in dropped.items()))
        )
    show_rows([*rows, *(("failed", failure) for failure in failures)])
    show_rows(
        [
            (f"asyncflow eval {word} --pass-at 4", "is one of four answers right?"),
            (f"asyncflow export {word} my-model", "for transformers and vLLM"),
            (f"asyncflow run {recipe} max_staleness=0", "without overlap, to compare"),
            ("asyncflow run my_recipe.py", "your own defaults() and task()"),
        ],
        title="\nnext",
    )


def show_interrupted(state: ProgressState, root: Path) -> None:
    """Where a run stands that was interrupted, and how to continue it."""
    text = Text.assemble(("interrupted ", "bold yellow"), harmless(_standing(root / state.plan.name, state)))
    Console(stderr=True).print(text, soft_wrap=True, highlight=False)


def run_word(folder: Path) -> str:
    """The shortest word that names a run on the command line: without its date where that is unique."""
    if folder.parent != DEFAULT_ROOT:
        return str(folder)
    short = _DATE.sub("", folder.name)
    return short if sum(short in run.name for run in list_runs(folder.parent)) == 1 else folder.name


def _standing(folder: Path, state: ProgressState) -> str:
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not state.plan.name:
        return "before the run began: nothing was kept"
    if not checkpoints:
        return f"before the first checkpoint. Start it from the beginning: asyncflow resume {run_word(folder)}"
    kept = f"the checkpoint of step {checkpoint_step(checkpoints[-1])} is on disk"
    return f"after step {state.step}; {kept}. Continue: asyncflow resume {run_word(folder)}"


def _word(setting: Setting) -> str:
    """The default as one would write it on the command line."""
    value = setting.default
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return value if isinstance(value, str) else toml_value(value)


def _measure(name: str, numbers: Mapping[str, float]) -> str:
    """What people call a measure."""
    samples = f"{numbers.get('samples', 1):.0f}"
    names = {
        "num_prompts": "held-out prompts",
        "samples": "answers to each",
        "pass_at_k": f"pass@{samples}",
        "reward": "mean reward",
        "length": "mean length",
        "num_failed": "failed rollouts",
    }
    return names.get(name, name.replace("_", " "))


def _is_worth_a_row(name: str, numbers: Mapping[str, float]) -> bool:
    """The standard error stands with the accuracy; one answer's pass@1 is the accuracy; no failures is the rule."""
    if name in {"samples", "pass_at_k"}:
        return numbers.get("samples", 1) > 1
    return name != "stderr" and (name != "num_failed" or numbers[name] > 0)


def _number(name: str, numbers: Mapping[str, float]) -> str:
    value = numbers[name]
    if name == "accuracy":
        return f"{value:.1%}" + (f" ± {numbers['stderr']:.1%}" if "stderr" in numbers else "")
    if name == "pass_at_k":
        return f"{value:.1%}"
    if name == "length":
        return f"{value:.1f} tokens"
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"
