"""The verbs on runs: start one, resume it, evaluate it, export it."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from asyncflow.algo.algorithms import make_warmup_loss
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.settings import resolve
from asyncflow.core.world import World
from asyncflow.engines.cores import Cores
from asyncflow.engines.models import check_weights, load_tokenizer
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.engines.rollout.client import start_rollout_engine
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from asyncflow.observe.observer import RunObserver
from asyncflow.observe.progress import Progress
from asyncflow.observe.progress_state import RunPlan
from asyncflow.observe.records import read_metrics
from asyncflow.observe.run_folder import RunFolder, read_config
from asyncflow.recipes.recipe import Recipe, Task, check_task, load_recipe
from asyncflow.recipes.session import Session, open_session, reinforcement_phase
from asyncflow.workflow.checkpoint import EMPTY_LEDGER, newest_checkpoint, read_ledger
from asyncflow.workflow.checkpoint_folder import checkpoint_step
from asyncflow.workflow.evaluation import evaluate as answer_all
from asyncflow.workflow.reinforce import evaluation_parts, make_gate, reinforce, rollout_parts
from asyncflow.workflow.warmup import tokenize, warm_up

FIXED = ("recipe", "model", "data", "seed", "groups_per_step", "group_size")
"""Settings that a resumed run can't change: the ledger's tickets mean what they say."""

REFERENCE = "reference"
"""The folder of a run that holds the policy from which KL is measured."""

MODEL = "model"
"""The folder of a run that holds the model its recipe built."""

TRAINING_FILES = ("optimizer*", "trainer*", "ledger.json", "manifest.json")
"""Files of a checkpoint that no user of the model needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended. Accuracies are held-out; None where none was measured."""

    folder: Path
    steps: int
    accuracy_before: float | None
    accuracy_after: float | None
    elapsed_s: float


def run(recipe: Recipe, config: RunConfig, runs_dir: Path, progress: Progress) -> RunSummary:
    """Run a recipe in a new run folder. Raises `ConfigError` before anything starts."""
    world = World(seed=config.seed)
    task = checked_task(recipe, config)
    runs_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=runs_dir) as scratch:
        source = make_model(task, Path(scratch) / MODEL)
        with RunFolder.create(config, root=runs_dir, world=world) as folder:
            if source == str(Path(scratch) / MODEL):
                source = shutil.move(source, str(folder.path / MODEL))
            return asyncio.run(_run(folder, task, world, progress, source=str(source), is_new=True))


def resume(folder: Path, words: Sequence[str], progress: Progress) -> RunSummary:
    """Go on from a run's newest checkpoint, with changed settings where `words` give any."""
    before = read_config(folder)
    config = resolve(before, words=words)
    changed = [name for name in FIXED if getattr(before, name) != getattr(config, name)]
    if changed:
        raise ConfigError(*(f"{name} can't change in a resumed run; start a new one" for name in changed))
    world = World(seed=config.seed)
    task = checked_task(load_recipe(config.recipe), config)
    source = str(newest_checkpoint(folder))
    _check_reference(folder, Path(source), config)
    with RunFolder.reopen(folder, world=world, config=config) as reopened:
        return asyncio.run(_run(reopened, task, world, progress, source=source, is_new=False))


def checked_task(recipe: Recipe, config: RunConfig) -> Task:
    """The recipe's task. Raises `ConfigError` when it can't be trained."""
    task = recipe.task(config)
    check_task(task, config)
    return task


def make_model(task: Task, folder: Path) -> str:
    """Build or name the model, in an empty folder. Raises `ConfigError` when it is not one that can be used."""
    folder.mkdir(parents=True)
    source = task.model(folder)
    load_tokenizer(source)
    check_weights(source)
    return source


async def _run(
    folder: RunFolder, task: Task, world: World, progress: Progress, *, source: str, is_new: bool
) -> RunSummary:
    config = folder.config
    start_s = world.now_s()
    observer = RunObserver(folder.path, world, progress, is_resumed=folder.is_resumed)
    progress.open(_plan(config, folder.name))
    try:
        lineage = f"{folder.name}.{folder.state.num_starts}"
        async with open_session(
            config, task, source=source, folder=folder.path, lineage=lineage, observer=observer, world=world
        ) as session:
            await _train(session, folder.path, None if is_new else Path(source))
    finally:
        observer.flush()
        progress.close()
    accuracies = [
        float(metric.values["accuracy"]) for metric in read_metrics(folder.path) if metric.kind == "evaluation"
    ]
    return RunSummary(
        folder=folder.path,
        steps=config.steps,
        accuracy_before=accuracies[0] if accuracies else None,
        accuracy_after=accuracies[-1] if accuracies else None,
        elapsed_s=world.now_s() - start_s,
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
        ledger = None
    else:
        await trainer.load(checkpoint)
        await trainer.change_phase(reinforcement_phase(config))
        ledger = read_ledger(checkpoint, session.world)
    reference = await _reference(session, folder) if config.algorithm.kl_coef > 0 else None
    try:
        await reinforce(config, session.setup(reference), ledger)
    finally:
        if reference is not None:
            await reference.aclose()


def _check_reference(folder: Path, checkpoint: Path, config: RunConfig) -> None:
    """Raise `ConfigError` where KL is asked for and the policy to measure it from was not kept."""
    if config.algorithm.kl_coef > 0 and checkpoint_step(checkpoint) and not (folder / REFERENCE).exists():
        raise ConfigError(
            "algorithm.kl_coef can't be switched on in a resumed run: the policy before reinforcement learning, "
            "from which KL is measured, was not kept. Start a new run"
        )


async def _reference(session: Session, folder: Path) -> TorchTrainEngine:
    """The policy before reinforcement learning, kept in the run folder for a resume."""
    home = folder / REFERENCE
    if not home.exists():
        draft = home.with_suffix(".draft")  # renamed when whole: a crash must leave no half of a policy
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        await session.trainer.save(draft)
        shutil.move(draft, home)
    config = session.config
    return await TorchTrainEngine.open(str(home), config.train, phase=reinforcement_phase(config))


def evaluate(folder: Path, *, num_prompts: int, temperature: float, samples: int) -> dict[str, float]:
    """Answer held-out prompts with a run's newest checkpoint, `samples` times each."""
    config = read_config(folder)
    task = checked_task(load_recipe(config.recipe), config)
    world = World(seed=config.seed)
    return asyncio.run(_evaluate(config, task, folder, num_prompts, temperature, samples, world))


async def _evaluate(
    config: RunConfig, task: Task, folder: Path, num_prompts: int, temperature: float, samples: int, world: World
) -> dict[str, float]:
    checkpoint = newest_checkpoint(folder)
    async with start_rollout_engine(
        model=str(checkpoint), config=config.rollout, world=world, channel=None, log=folder / "logs" / "eval.log"
    ) as engine:
        parts = rollout_parts(config, engine, TokenizerRenderer(str(checkpoint)), task.agent, world)
        parts = evaluation_parts(parts, temperature)
        result = await answer_all(task.held_out[:num_prompts], parts, name="eval", samples=samples)
    return {"step": float(checkpoint.name.rpartition("-")[2]), **asdict(result)}


def export(folder: Path, target: Path) -> None:
    """Copy a run's newest checkpoint as a model folder for `from_pretrained`, without the trainer's state."""
    shutil.copytree(
        newest_checkpoint(folder), target, ignore=shutil.ignore_patterns(*TRAINING_FILES), dirs_exist_ok=True
    )


def dry_run(recipe: Recipe, config: RunConfig) -> list[tuple[str, str]]:
    """Check everything a run needs, its model too, and say what it would do; nothing is started or kept."""
    task = checked_task(recipe, config)
    with tempfile.TemporaryDirectory(prefix="asyncflow-") as scratch:
        make_model(task, Path(scratch) / MODEL)
    samples = config.groups_per_step * config.group_size
    return [
        ("recipe", f"{recipe.name}: {recipe.summary}"),
        ("model", config.model),
        ("prompts", f"{len(task.train):,} to train on, {len(task.held_out):,} held out"),
        ("warm-up", f"{config.warmup.steps} steps of {config.warmup.batch_size} demonstrations"),
        ("steps", f"{config.steps} of {config.groups_per_step} prompts x {config.group_size} rollouts"),
        ("tokens", f"at most {samples * config.sampling.max_tokens:,} sampled in a step"),
        *run_facts(config),
    ]


def run_facts(config: RunConfig) -> list[tuple[str, str]]:
    """How a configuration would run on this machine."""
    cores = Cores.of(config)
    return [
        ("staleness", f"at most {make_gate(config).bound}"),
        ("rollout", f"{config.rollout.engine}, threads: {cores.rollout_threads}"),
        ("training", f"{config.train.engine}, threads: {cores.for_training()}, less while rollout is busy"),
    ]


def _plan(config: RunConfig, name: str) -> RunPlan:
    return RunPlan(
        name=name,
        title=(f"seed {config.seed}",),
        plan=tuple(f"{name} {fact}" for name, fact in run_facts(config)),
        steps=config.steps,
        bound=make_gate(config).bound,
    )
