"""The verbs on runs: start one, resume it, evaluate it, export it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from asyncflow.algo.algorithms import make_warmup_loss
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError, RunFolderError
from asyncflow.core.settings import resolve
from asyncflow.core.world import World
from asyncflow.engines.cores import Cores
from asyncflow.engines.devices import pick_device
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.engines.rollout.client import start_rollout_engine
from asyncflow.engines.train.torch_scorer import TorchScorer
from asyncflow.observe.observer import RunObserver
from asyncflow.observe.progress import Progress
from asyncflow.observe.progress_state import RunPlan
from asyncflow.observe.records import read_metrics
from asyncflow.observe.run_folder import RunFolder, read_config
from asyncflow.recipes.checks import (
    REFERENCE,
    changed_settings,
    check_devices,
    check_reference,
    check_steps,
    checked_task,
    fit,
    full_disk_said,
    make_model,
    same_task,
)
from asyncflow.recipes.inputs import prompts_fingerprint, with_absolute_paths
from asyncflow.recipes.recipe import Recipe, Task, load_recipe
from asyncflow.recipes.run_log import open_run_log, steps_to_take_again
from asyncflow.recipes.session import Session, open_session, reinforcement_phase
from asyncflow.workflow.checkpoint import EMPTY_LEDGER, newest_checkpoint, read_ledger
from asyncflow.workflow.checkpoint_folder import checkpoint_step, has_checkpoints, set_aside_newer
from asyncflow.workflow.evaluation import evaluate as answer_all
from asyncflow.workflow.failures import FAILED
from asyncflow.workflow.meter import DROPPED
from asyncflow.workflow.reinforce import evaluation_parts, evaluations_at_once, make_gate, reinforce, rollout_parts
from asyncflow.workflow.warmup import tokenize, warm_up

ResultT = TypeVar("ResultT")

FIXED = ("recipe", "model", "data", "seed", "groups_per_step", "group_size")
"""Settings that a resumed run can't change: the ledger's tickets mean what they say."""

MODEL = "model"
"""The folder of a run that holds the model its recipe built."""

TRAINING_FILES = ("optimizer*", "trainer*", "ledger.json", "manifest.json")
"""Files of a checkpoint that no user of the model needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended. Accuracies are held-out; None where none was measured.

    `dropped` counts groups by reason; `failures` are the first failed rollouts of each reason.
    """

    folder: Path
    steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    elapsed_s: float
    dropped: Mapping[str, int]
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """From where a run sets out: a model, or a checkpoint; and what the user should know about it."""

    source: str
    checkpoint: Path | None = None
    warnings: Sequence[str] = ()


def run(recipe: Recipe, config: RunConfig, runs_dir: Path, progress: Progress) -> RunSummary:
    """Run a recipe in a new run folder. Raises `ConfigError` before anything starts."""
    config = with_absolute_paths(config, recipe)
    check_devices(config)
    world = World(seed=config.seed)
    task = checked_task(recipe, config)
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=runs_dir) as scratch:
        made = Path(scratch) / MODEL
        source = make_model(task, made)
        warnings = fit(task, source, config)
        prompts = prompts_fingerprint(task)
        with RunFolder.create(config, root=runs_dir, world=world, prompts=prompts) as folder:
            if folder.moved_aside:
                warnings.append(f"an earlier {folder.name} came to no checkpoint; it is now {folder.moved_aside.name}")
            start = Start(source=_keep_model(source, made, folder.path), warnings=warnings)
            return asyncio.run(_run(folder, task, world, progress, start))


def resume(folder: Path, words: Sequence[str], progress: Progress) -> RunSummary:
    """Go on from a run's newest checkpoint, or from the beginning; `words` may change settings."""
    before = read_config(folder)
    recipe = load_recipe(before.recipe)
    before = with_absolute_paths(before, recipe)
    config = with_absolute_paths(resolve(before, words=words), recipe)
    changed = [name for name in FIXED if getattr(before, name) != getattr(config, name)]
    if changed:
        raise ConfigError(*(f"{name} can't change in a resumed run; start a new one" for name in changed))
    check_devices(config)
    world = World(seed=config.seed)
    task = same_task(recipe, config, folder)
    if not has_checkpoints(folder / "checkpoints"):
        return _begin_again(folder, config, task, world, progress)
    checkpoint = newest_checkpoint(folder)
    check_steps(checkpoint, config)
    check_reference(folder, checkpoint, config)
    steps = steps_to_take_again(folder, checkpoint_step(checkpoint) or 0, config)
    warnings = fit(task, str(checkpoint), config)
    if steps and (others := changed_settings(before, config)):
        warnings.append(
            f"steps {steps[0]} to {steps[-1]} are taken again from the log after {checkpoint.name}, now under other "
            f"settings: {', '.join(others)}"
        )
    with RunFolder.reopen(folder, world=world, config=config) as reopened:
        warnings += [
            f"{told}. The run goes on from {checkpoint.name}"
            for told in set_aside_newer(reopened.checkpoints, checkpoint)
        ]
        start = Start(source=str(checkpoint), checkpoint=checkpoint, warnings=warnings)
        return asyncio.run(_run(reopened, task, world, progress, start))


def _begin_again(folder: Path, config: RunConfig, task: Task, world: World, progress: Progress) -> RunSummary:
    """Run from the beginning in the folder of a run that came to no checkpoint."""
    with (
        RunFolder.reopen(folder, world=world, config=config) as reopened,
        tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch,
    ):
        made = Path(scratch) / MODEL
        source = make_model(task, made)
        warnings = [*fit(task, source, config), "there is no checkpoint yet: the run starts from the beginning"]
        start = Start(source=_keep_model(source, made, folder), warnings=warnings)
        return asyncio.run(_run(reopened, task, world, progress, start))


def _keep_model(source: str, made: Path, folder: Path) -> str:
    """Move a model that the recipe built into the run folder; where the model is then."""
    if source != str(made):
        return source
    home = folder / MODEL
    shutil.rmtree(home, ignore_errors=True)
    return str(shutil.move(source, home))


async def _run(folder: RunFolder, task: Task, world: World, progress: Progress, start: Start) -> RunSummary:
    config = folder.config
    start_s = world.now_s()
    observer = RunObserver(folder.path, world, progress, is_resumed=folder.is_resumed)
    progress.open(_plan(config, folder.name))
    for message in start.warnings:
        observer.record("health", {"message": message})
    try:
        lineage = f"{folder.name}.{folder.state.num_starts}"
        async with open_session(
            config, task, source=start.source, folder=folder.path, lineage=lineage, observer=observer, world=world
        ) as session:
            await _train(session, folder.path, start.checkpoint)
    finally:
        observer.flush()
        progress.close()
    return _summary(folder.path, config, world.now_s() - start_s)


def _summary(folder: Path, config: RunConfig, elapsed_s: float) -> RunSummary:
    metrics = read_metrics(folder)
    accuracies = [float(metric.values["accuracy"]) for metric in metrics if metric.kind == "evaluation"]
    last = next((metric.values for metric in reversed(metrics) if metric.kind == "step"), {})
    told = [str(metric.values.get("message", "")) for metric in metrics if metric.kind == "health"]
    return RunSummary(
        folder=folder,
        steps=config.steps,
        accuracy_before=accuracies[0] if accuracies else None,
        accuracy_after=accuracies[-1] if accuracies else None,
        elapsed_s=elapsed_s,
        dropped={name.removeprefix(DROPPED): int(n) for name, n in last.items() if name.startswith(DROPPED)},
        failures=tuple(dict.fromkeys(text for text in told if text.startswith(FAILED))),
    )


async def _train(session: Session, folder: Path, checkpoint: Path | None) -> None:
    """The warm-up, unless a checkpoint is past it, and reinforcement learning."""
    config, trainer = session.config, session.trainer
    if checkpoint is None:
        samples = tokenize(session.task.demonstrations, session.renderer) if config.warmup.steps else []
        if samples:
            await warm_up(config, trainer, make_warmup_loss(), samples, session.meter, session.world)
            await trainer.begin_phase(reinforcement_phase(config))
        await session.save(0, EMPTY_LEDGER)
        ledger = EMPTY_LEDGER
    else:
        await trainer.load(checkpoint)
        await trainer.change_phase(reinforcement_phase(config))
        ledger = read_ledger(checkpoint, session.world)
    async with AsyncExitStack() as open_things:
        run_log = await open_things.enter_async_context(open_run_log(config, folder, ledger, trainer.version.step))
        for message in run_log.warnings:
            session.meter.record("health", {"message": message})
        reference = None
        if config.algorithm.kl_coef > 0:
            reference = await _reference(session, folder)
            open_things.push_async_callback(reference.aclose)
        await reinforce(config, session.setup(reference, run_log), ledger)


async def _reference(session: Session, folder: Path) -> TorchScorer:
    """The policy before reinforcement learning, kept in the run folder for a resume."""
    home = folder / REFERENCE
    if not home.exists():
        draft = home.with_suffix(".draft")  # renamed when whole: a crash must leave no half of a policy
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        with full_disk_said("the reference policy"):
            await session.trainer.save(draft)
        shutil.move(draft, home)
    config = session.config
    return await TorchScorer.open(
        str(home),
        config.train,
        temperature=config.sampling.temperature,
        observer=session.meter,
        num_threads=session.cores.for_training,
        deterministic=config.deterministic,
    )


def evaluate(
    folder: Path, *, num_prompts: int, temperature: float, samples: int, tell: Callable[[str], None]
) -> dict[str, float]:
    """Answer held-out prompts with a run's newest checkpoint, `samples` times each; `tell` hears why some failed."""
    config = read_config(folder)
    pick_device(config.rollout.device, "rollout")
    prompts = same_task(load_recipe(config.recipe), config, folder)

    def answer(checkpoint: Path) -> dict[str, float]:
        return asyncio.run(_evaluate(config, prompts, folder, checkpoint, num_prompts, temperature, samples, tell))

    return _of_newest(folder, answer)


async def _evaluate(
    config: RunConfig,
    task: Task,
    folder: Path,
    checkpoint: Path,
    num_prompts: int,
    temperature: float,
    samples: int,
    tell: Callable[[str], None],
) -> dict[str, float]:
    world = World(seed=config.seed)
    async with start_rollout_engine(
        model=str(checkpoint),
        config=config.rollout,
        world=world,
        channel=None,
        log=folder / "logs" / "eval.log",
        deterministic=config.deterministic,
    ) as engine:
        parts = rollout_parts(config, engine, TokenizerRenderer(str(checkpoint)), task.agent, world)
        parts = evaluation_parts(parts, temperature)
        at_once = evaluations_at_once(config)
        result = await answer_all(
            task.held_out[:num_prompts], parts, name="eval", at_once=at_once, samples=samples, tell=tell
        )
    return {"step": float(checkpoint_step(checkpoint) or 0), **asdict(result)}


def export(folder: Path, target: Path) -> None:
    """Copy a run's newest checkpoint as a model folder for `from_pretrained`, without the trainer's state."""

    def copy(checkpoint: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        with full_disk_said(str(target)):
            shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*TRAINING_FILES))

    if target.exists() and any(target.iterdir()):
        raise RunFolderError(f"{target} is not empty: give a new folder")
    _of_newest(folder, copy)


def _of_newest(folder: Path, use: Callable[[Path], ResultT]) -> ResultT:
    """Use the newest checkpoint; when a live run removes it meanwhile, the next newest."""
    while True:
        checkpoint = newest_checkpoint(folder)
        try:
            return use(checkpoint)
        except Exception:
            if checkpoint.is_dir():
                raise


def dry_run(recipe: Recipe, config: RunConfig) -> list[tuple[str, str]]:
    """Check everything a run needs, its model too, and say what it would do; nothing is started or kept."""
    config = with_absolute_paths(config, recipe)
    check_devices(config)
    task = checked_task(recipe, config)
    with tempfile.TemporaryDirectory(prefix="asyncflow-") as scratch:
        warnings = fit(task, make_model(task, Path(scratch) / MODEL), config)
    samples = config.groups_per_step * config.group_size
    return [
        ("recipe", f"{recipe.name}: {recipe.summary}"),
        ("model", config.model),
        ("prompts", f"{len(task.train):,} to train on, {len(task.held_out):,} held out"),
        ("warm-up", f"{config.warmup.steps} steps of {config.warmup.batch_size} demonstrations"),
        ("steps", f"{config.steps} of {config.groups_per_step} prompts x {config.group_size} rollouts"),
        ("tokens", f"at most {samples * config.sampling.max_tokens:,} sampled in a step"),
        *run_facts(config),
        *(("warning", warning) for warning in warnings),
    ]


def run_facts(config: RunConfig) -> list[tuple[str, str]]:
    """How a configuration would run on this machine."""
    cores = Cores.of(config)
    bound = make_gate(config).bound
    return [
        ("rollout", _place(config.rollout.device, "rollout", cores.rollout_threads, cores.rollout_threads)),
        ("training", _place(config.train.device, "train", cores.while_sampling, cores.for_training())),
        ("staleness", f"≤ {bound}" if bound else "0"),
    ]


def _place(device: str, role: str, least: int, most: int) -> str:
    """Where a role computes: a GPU, or on how many threads."""
    name = pick_device(device, role)
    if name != "cpu":
        return f"on {name}"
    return f"{least} thread{'s' * (least > 1)}" if least == most else f"{least}–{most} threads"


def _plan(config: RunConfig, name: str) -> RunPlan:
    return RunPlan(
        name=name,
        title=(f"seed {config.seed}",),
        plan=(*(" ".join(fact) for fact in run_facts(config)), f"{config.steps} steps"),
        steps=config.steps,
        bound=make_gate(config).bound,
        drops_equal=config.algorithm.drop_no_signal,
    )
