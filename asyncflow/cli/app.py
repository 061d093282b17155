"""The verbs. Each reads its words, calls one function of `recipes.runner`, and prints.

Nothing heavy is imported before a command needs it, so that help is there at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

import asyncflow
from asyncflow.cli import output, proof
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError, RunFolderError
from asyncflow.core.setting_list import list_settings
from asyncflow.core.world import World
from asyncflow.observe.plain_text import harmless
from asyncflow.observe.progress import Progress, progress_on
from asyncflow.observe.run_audit import audit_run, log_bytes
from asyncflow.observe.run_folder import check_free, find_run, read_config
from asyncflow.plan.compare import Times, compare
from asyncflow.recipes.recipe import Recipe, list_recipes, load_recipe

if TYPE_CHECKING:
    from asyncflow.recipes.runner import RunSummary

HELP = """Post-train language models with reinforcement learning, rollouts and training at the same time.

\b
Settings are written NAME=VALUE behind the recipe, without dashes.
They are listed by: asyncflow settings RECIPE

A RUN is a run folder, or a part of its name that no other run has.

\b
asyncflow run quickstart steps=20 train.learning_rate=3e-4
asyncflow resume blue-fox steps=200
asyncflow eval blue-fox --pass-at 4
asyncflow audit blue-fox
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help=HELP,
    epilog="Begin with: asyncflow run quickstart",
)

VIOLATION = 3
"""The exit code where a run broke a promise."""

# Options that we do not know come to the settings, whose errors teach how to write them.
SETTINGS_FOLLOW = {"ignore_unknown_options": True}

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME=VALUE", help="settings, such as train.learning_rate=3e-4", show_default=False),
]
Root = Annotated[Path, typer.Option("--runs-dir", help="where run folders are")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or a unique part of a run's name")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """What comes before the verb."""
    if version:
        print(f"asyncflow {asyncflow.__version__}")
        raise typer.Exit


@app.command(context_settings=SETTINGS_FOLLOW, epilog="Example: asyncflow run quickstart steps=80 max_staleness=2")
def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe's name, a .py file or a .toml file")],
    words: Words = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything and say what would run")] = False,
    name: Annotated[str, typer.Option(help="name of the run; invented when empty", show_default=False)] = "",
    root: Root = output.DEFAULT_ROOT,
) -> None:
    """Train a model by a recipe."""
    found = load_recipe(recipe)
    config = configure(found, recipe, [*(words or []), *([f"name={name}"] if name else [])])
    if dry_run:
        _show_plan(found, config, root)
        return
    with torch_needed():
        from asyncflow.recipes import runner

    progress = progress_on(Console())
    summary = _watch(progress, root, lambda: runner.run(found, config, root, progress))
    _show_summary(summary, recipe)


@app.command(context_settings=SETTINGS_FOLLOW, epilog="Example: asyncflow resume blue-fox steps=200")
def resume(run: Run, words: Words = None, root: Root = output.DEFAULT_ROOT) -> None:
    """Continue a run that was interrupted, or go on with one that is finished."""
    with torch_needed():
        from asyncflow.recipes import runner

    folder = find_run(run, root)
    recipe = read_config(folder).recipe
    progress = progress_on(Console())
    summary = _watch(progress, folder.parent, lambda: runner.resume(folder, words or [], progress))
    _show_summary(summary, recipe)


@app.command(context_settings=SETTINGS_FOLLOW, epilog="Example: asyncflow simulate quickstart --rollout-s 20 --sigma 1")
def simulate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="a recipe's name, a .py file or a .toml file")],
    words: Words = None,
    rollout_s: Annotated[float, typer.Option(min=0.001, help="mean seconds of one completion")] = 1.0,
    sigma: Annotated[float, typer.Option(min=0, help="log-normal spread of completions: 0 none, 1 heavy-tailed")] = 0.5,
    train_s: Annotated[float, typer.Option(min=0, help="seconds that a step's gradients take")] = 1.0,
    load_s: Annotated[float, typer.Option(min=0, help="seconds that a weight load takes")] = 0.1,
    bounds: Annotated[str, typer.Option(help="staleness bounds to compare")] = "0,1,2,4",
    as_json: AsJson = False,
) -> None:
    """Compare staleness bounds before a run: the real loop and queue, simulated, without torch."""
    if not all(bound.strip().isdecimal() for bound in bounds.split(",")):
        raise ConfigError(f"--bounds {bounds!r}: expected whole numbers >= 0 with commas between, such as 0,1,2")
    config = configure(load_recipe(recipe), recipe, words or [])
    if config.steps < 1:
        raise ConfigError("steps=0: there is nothing to simulate; give steps >= 1")
    times = Times(rollout_s=rollout_s, sigma=sigma, train_s=train_s, load_s=load_s)
    output.show_simulations(compare(config, times, [int(bound) for bound in bounds.split(",")]), as_json=as_json)


@app.command("eval", epilog="Example: asyncflow eval blue-fox --pass-at 8 --num-prompts 200")
def evaluate(
    run: Run,
    num_prompts: Annotated[
        int | None,
        typer.Option(min=1, help="held-out prompts; the run's evaluate.final_num_prompts", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="the run's evaluate.temperature", show_default=False)
    ] = None,
    pass_at: Annotated[int, typer.Option(min=1, metavar="K", help="answers to each prompt")] = 1,
    greedy: Annotated[bool, typer.Option("--greedy", help="always the most likely token")] = False,
    as_json: AsJson = False,
    root: Root = output.DEFAULT_ROOT,
) -> None:
    """Measure a run's last checkpoint on held-out prompts."""
    if greedy and (temperature or pass_at > 1):
        raise ConfigError("--greedy gives the same answer each time: leave out --temperature and --pass-at")
    folder = find_run(run, root)
    settings = read_config(folder).evaluate
    with torch_needed():
        from asyncflow.recipes import runner

    numbers = runner.evaluate(
        folder,
        num_prompts=settings.final_num_prompts if num_prompts is None else num_prompts,
        temperature=0.0 if greedy else settings.temperature if temperature is None else temperature,
        samples=pass_at,
        tell=output.show_note,
    )
    (output.show_json if as_json else output.show_numbers)(numbers)


@app.command(epilog="Example: asyncflow export blue-fox my-model")
def export(
    run: Run,
    folder: Annotated[Path, typer.Argument(help="a new or an empty folder")],
    root: Root = output.DEFAULT_ROOT,
) -> None:
    """Write a run's last checkpoint as a model folder that transformers and vLLM load."""
    source = find_run(run, root)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} is not empty: give a new folder")
    with torch_needed():
        from asyncflow.recipes import runner

    runner.export(source, folder)
    print(harmless(f"{folder} holds the model of {source.name}"))


@app.command(epilog="Example: asyncflow audit blue-fox --json")
def audit(run: Run, as_json: AsJson = False, root: Root = output.DEFAULT_ROOT) -> None:
    """Prove from a run's log that every prompt was trained once or dropped for a reason; exit code 3 if not."""
    folder = find_run(run, root)
    with proof.log_progress(log_bytes(folder), "reading the log") as tell:
        found = audit_run(folder, tell)
    proof.show_audit(found, as_json=as_json)
    if not found.is_ok:
        raise typer.Exit(VIOLATION)


@app.command(epilog="Example: asyncflow replay blue-fox --step 12 --show 3")
def replay(
    run: Run,
    step: Annotated[int, typer.Option(min=1, help="the step to take again")],
    show: Annotated[int, typer.Option(min=0, help="print so many of its samples as text")] = 0,
    as_json: AsJson = False,
    root: Root = output.DEFAULT_ROOT,
) -> None:
    """Rebuild a step's batch from the log, take the step again, and compare loss and weights with the run's."""
    folder = find_run(run, root)
    with torch_needed():
        from asyncflow.recipes import replay as replaying

    with proof.status() as tell:
        result = replaying.replay(folder, step, num_shown=show, tell=tell)
    proof.show_replay(result, as_json=as_json)
    if result.breaks_a_promise:
        raise typer.Exit(VIOLATION)


@app.command(epilog="Example: asyncflow recipes --json")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with asyncflow."""
    found = list_recipes()
    if as_json:
        output.show_json([dataclasses.asdict(recipe) for recipe in found])
    else:
        output.show_rows([(recipe.name, recipe.summary) for recipe in found])


@app.command(epilog="Example: asyncflow settings quickstart")
def settings(
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help="show this recipe's defaults")] = "",
    as_json: AsJson = False,
) -> None:
    """List every setting with its default, what it does and what it accepts."""
    listed = list_settings(configure(load_recipe(recipe), recipe, []) if recipe else RunConfig())
    if as_json:
        output.show_json([dataclasses.asdict(setting) for setting in listed])
    else:
        output.show_settings(listed)


def configure(recipe: Recipe, word: str, words: list[str]) -> RunConfig:
    """The configuration of a run: the recipe's, the TOML file's where `word` is one, and the words'.

    It holds the recipe's own name, which finds the recipe again from any folder.
    """
    if any(one.startswith("recipe=") for one in words):
        raise ConfigError(f"the recipe is {word!r} already, the first word: leave out recipe=")
    return recipe.configure(file=Path(word) if word.endswith(".toml") else None, words=words)


@contextmanager
def torch_needed() -> Iterator[None]:
    """For imports of what runs models: raises `ConfigError` where a package of the extra is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"this command needs {error.name}: pip install 'asyncflow[torch]'") from error


def _show_plan(recipe: Recipe, config: RunConfig, root: Path) -> None:
    if config.name:
        check_free(root, config.name, World(seed=config.seed))
    with torch_needed():
        from asyncflow.recipes import runner

    where = ("run folder", str(root / (config.name or "(a new name)")))
    output.show_rows([*runner.dry_run(recipe, config), where], title="This would run. Nothing was started.")


def _watch(progress: Progress, root: Path, work: Callable[[], RunSummary]) -> RunSummary:
    """Do the work while its progress is shown; on Ctrl-C say how to continue, and exit with 130."""
    try:
        try:
            return work()
        finally:
            progress.close()
    except KeyboardInterrupt:
        output.show_interrupted(progress.state, root)
        raise typer.Exit(130) from None


def _show_summary(summary: RunSummary, recipe: str) -> None:
    output.show_summary(
        summary.folder,
        recipe=recipe,
        steps=summary.steps,
        before=summary.accuracy_before,
        after=summary.accuracy_after,
        elapsed_s=summary.elapsed_s,
        dropped=summary.dropped,
        failures=summary.failures,
    )
