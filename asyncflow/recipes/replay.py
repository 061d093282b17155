"""A step taken again from the log: its batch bit for bit, and from a checkpoint before it the same weights.

Nothing is written into the run folder and no rollout engine is started. Each micro-batch computes
on as many CPU threads as it did in the run, which the log knows, so that an ordinary run can come
out bit for bit too; only a deterministic one has promised to.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from asyncflow.algo.algorithms import Algorithm, make_algorithm
from asyncflow.core.columns import LOSS_MASK, REWARD, TOKEN_IDS
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError, LogDamagedError, RunFolderError
from asyncflow.core.types import MicroBatch, Ragged, StepReport
from asyncflow.core.world import RealDisk
from asyncflow.data.gate import Gate
from asyncflow.data.history import History, read_history, tasks_of
from asyncflow.data.records import read_tickets
from asyncflow.engines.renderer import TokenizerRenderer
from asyncflow.engines.train.torch_engine import TorchTrainEngine
from asyncflow.observe.records import read_metrics
from asyncflow.observe.run_audit import LEDGER, log_bytes
from asyncflow.observe.run_folder import read_config
from asyncflow.observe.run_state import installed_versions, read_state
from asyncflow.recipes.session import reinforcement_phase
from asyncflow.workflow.checkpoint_folder import checkpoint_name, checkpoint_step, damage, list_checkpoints
from asyncflow.workflow.replay import replay_step

Outcome = Literal["equal", "differs", "not compared"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedBatch:
    """A micro-batch as it was trained on: its rows as `TICKET.INDEX`, and the SHA-256 of each column."""

    rows: tuple[str, ...]
    num_tokens: int
    threads: int
    sha256: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Something of the step, taken again, and of the run: whether they are equal, and how far they are apart."""

    what: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A row as text."""

    row: str
    prompt: str
    completion: str
    reward: float | None


@dataclass(slots=True, kw_only=True)
class Replay:
    """What came of taking a step again. `started_from` is the step of the checkpoint, where there was one."""

    run: str
    step: int
    num_groups: int
    is_deterministic: bool
    started_from: int | None = None
    batches: list[ReplayedBatch] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    @property
    def breaks_a_promise(self) -> bool:
        """Whether something differs in a run that promised equal bits."""
        return self.is_deterministic and any(one.outcome == "differs" for one in self.comparisons)

    def compare(self, what: str, outcome: Outcome, detail: str) -> None:
        """Note a comparison."""
        self.comparisons.append(Comparison(what=what, outcome=outcome, detail=detail))


class Threads:
    """How many CPU threads the trainer's next call computes on."""

    def __init__(self, now: int) -> None:
        self.now = now

    def use(self, number: int) -> None:
        """From the next call on; 0 leaves it as it is."""
        self.now = number or self.now

    def __call__(self) -> int:
        """The number."""
        return self.now


def replay(folder: Path, step: int, *, num_shown: int, tell: Tell) -> Replay:
    """Rebuild the batch of a step and take the step again; `tell` hears what is being done.

    Raises `ConfigError` for a step that the log does not hold, `LogDamagedError` when it can't be read.
    """
    log_bytes(folder)
    config = read_config(folder)
    tell("reading the log")
    tasks, numbers = tasks_of(folder / LEDGER)
    gate = Gate(**numbers) if numbers["groups_per_step"] else None
    history = read_history(folder / LEDGER, tasks, gate)
    if step not in history.steps:
        span = f"steps {min(history.steps)} to {max(history.steps)}" if history.steps else "no step"
        raise ConfigError(f"--step {step}: the log of {folder.name} holds {span}")
    result = Replay(
        run=folder.resolve().name,
        step=step,
        num_groups=len(read_tickets(history.steps[step].tickets)),
        is_deterministic=config.deterministic,
    )
    tell(f"rebuilding the batch of step {step}")
    try:
        _rebuild(result, history, folder, num_shown)
    except LogDamagedError:
        raise
    except RunFolderError:
        result.compare("batch", "not compared", _compacted(step))
    asyncio.run(_take_again(result, config, folder, history, tell))
    return result


def _compacted(step: int) -> str:
    return (
        f"the rows of step {step} are gone from the log: once no kept checkpoint needed them they were dropped. "
        "A run with queue.keep=all keeps them"
    )


def _rebuild(result: Replay, history: History, folder: Path, num_shown: int) -> None:
    record = history.steps[result.step]
    names = history.column_names(int(read_tickets(record.tickets)[0]))
    shown = _renderer(folder) if num_shown else None
    for place, batch in enumerate(history.micro_batches(result.step, names)):
        rows = _row_names(batch)
        result.batches.append(
            ReplayedBatch(
                rows=rows,
                num_tokens=batch.num_tokens,
                threads=record.threads[place] if record.threads else 0,
                sha256={name: _hash(column) for name, column in batch.columns.items()},
            )
        )
        if shown is not None:
            result.samples += _texts(batch, rows, shown)[: num_shown - len(result.samples)]


def _row_names(batch: MicroBatch) -> tuple[str, ...]:
    pairs = zip(batch.rows.tickets.tolist(), batch.rows.indices.tolist(), strict=True)
    return tuple(f"{ticket}.{index}" for ticket, index in pairs)


def _hash(column: Ragged) -> str:
    """The SHA-256 of a column: dtype, lengths of the rows, values."""
    lengths = np.ascontiguousarray(column.lengths, "<i4")
    values = np.ascontiguousarray(column.values)
    whole = sha256(f"{column.dtype or values.dtype.str} {values.shape[1:]} {column.is_dense} {len(lengths)}".encode())
    whole.update(lengths.tobytes())
    whole.update(values.tobytes())
    return whole.hexdigest()


def _renderer(folder: Path) -> TokenizerRenderer:
    checkpoints = list_checkpoints(folder / "checkpoints")
    if not checkpoints:
        raise RunFolderError(f"{folder} holds no checkpoint, whose tokenizer could read the samples")
    return TokenizerRenderer(str(checkpoints[-1]))


def _texts(batch: MicroBatch, names: Sequence[str], renderer: TokenizerRenderer) -> list[Sample]:
    texts = zip(names, batch.columns[TOKEN_IDS].rows(), batch.columns[LOSS_MASK].rows(), strict=True)
    rewards = batch.columns[REWARD].values.tolist() if REWARD in batch.columns else [None] * len(names)
    return [
        Sample(
            row=name,
            prompt=renderer.text(ids[: int(np.argmax(mask))].astype(np.int32)),
            completion=renderer.text(ids[int(np.argmax(mask)) :].astype(np.int32)),
            reward=reward,
        )
        for (name, ids, mask), reward in zip(texts, rewards, strict=True)
    ]


async def _take_again(result: Replay, config: RunConfig, folder: Path, history: History, tell: Tell) -> None:
    """From the newest whole checkpoint before the step, take the steps up to it and compare."""
    checkpoints = list_checkpoints(folder / "checkpoints")
    older = [path for path in checkpoints if (checkpoint_step(path) or 0) < result.step]
    start = next((path for path in reversed(older) if not damage(path)), None)
    if start is None:
        kept = f"the oldest is of step {checkpoint_step(checkpoints[0])}" if checkpoints else "there is none"
        reason = (
            f"no checkpoint from before step {result.step} is kept: {kept} (checkpoint.keep={config.checkpoint.keep})"
        )
        result.compare("loss and weights", "not compared", reason)
        return
    result.started_from = checkpoint_step(start) or 0
    algorithm = make_algorithm(config.algorithm, max_tokens=config.sampling.max_tokens)
    first = history.steps.get(result.started_from + 1)
    threads = Threads(first.threads[0] if first is not None and first.threads else config.train.threads or 1)
    _note_changes(result, config, folder, history)
    trainer = await TorchTrainEngine.open(
        str(start),
        config.train,
        phase=reinforcement_phase(config),
        export_dtype=config.rollout.dtype,
        lineage="replay",
        num_threads=threads,
        deterministic=config.deterministic,
    )
    try:
        await trainer.load(start)
        if history.epochs[result.step] == len(history.opened):  # else, the settings of back then are the checkpoint's
            await trainer.change_phase(reinforcement_phase(config))
        report = await _steps(result, trainer, history, algorithm, threads, tell)
        if report is not None:
            _compare_numbers(result, folder, report)
            await _compare_weights(result, trainer, folder, history, tell)
    finally:
        await trainer.aclose()


async def _steps(
    result: Replay,
    trainer: TorchTrainEngine,
    history: History,
    algorithm: Algorithm[Tensor],
    threads: Threads,
    tell: Tell,
) -> StepReport | None:
    """The report of the step, taken again after all from the checkpoint on; None where rows are gone."""
    report = None
    for step in range(trainer.version.step + 1, result.step + 1):
        tell(f"taking step {step} of {result.step} again")
        try:
            columns = (*algorithm.columns, REWARD)
            report = await replay_step(trainer, algorithm.loss, history, step, columns, threads.use)
        except LogDamagedError:
            raise
        except RunFolderError:
            result.compare("loss and weights", "not compared", _compacted(step))
            return None
    return report


def _note_changes(result: Replay, config: RunConfig, folder: Path, history: History) -> None:
    """What is not as it was when the step was taken."""
    before, now = read_state(folder, RealDisk()).versions, installed_versions()
    changed = [
        f"{name} {before[name]} is now {now.get(name, 'missing')}" for name in before if before[name] != now.get(name)
    ]
    if changed:
        result.notes.append(f"the run had other packages, which may compute other bits: {', '.join(changed)}")
    if history.epochs[result.step] < len(history.opened):
        result.notes.append(
            "the run was resumed after this step: if that changed settings of the loss, the earlier ones are not known"
        )
    start = (result.started_from or 0) + 1
    if history.epochs.get(start, 0) < history.epochs[result.step] and not config.deterministic:
        result.notes.append(
            "the run was resumed between the checkpoint and this step, and may have computed other bits"
        )
    if any(not history.steps[step].threads for step in range(start, result.step + 1) if step in history.steps):
        result.notes.append("the log does not say on how many threads the run computed")


def _compare_numbers(result: Replay, folder: Path, report: StepReport) -> None:
    """Loss and gradient norm, which metrics.jsonl holds to the last bit."""
    lines = [m.values for m in read_metrics(folder) if m.kind == "step" and m.values.get("step") == result.step]
    for what, name, value in (("loss", "loss", report.loss), ("gradient norm", "grad_norm", report.grad_norm)):
        before = lines[-1].get(name) if lines else None
        if not isinstance(before, int | float):
            result.compare(what, "not compared", f"{value!r}; metrics.jsonl does not hold it for step {result.step}")
        elif before == value:
            result.compare(what, "equal", f"{value!r}, to the last bit as in metrics.jsonl")
        else:
            result.compare(what, "differs", f"{value!r}; in metrics.jsonl {before!r} ({abs(value - before):.2g} apart)")


async def _compare_weights(
    result: Replay, trainer: TorchTrainEngine, folder: Path, history: History, tell: Tell
) -> None:
    tell("comparing weights")
    served = [text for text in history.served.get(result.step, []) if text]
    exported = (await trainer.export_weights()).version.fingerprint
    what = "served weights"
    if not served:
        result.compare(
            what, "not compared", f"fingerprint {exported}; the log does not say that version {result.step} was live"
        )
    elif exported in served:
        result.compare(what, "equal", f"fingerprint {exported}, as served according to the log")
    else:
        result.compare(
            what, "differs", f"fingerprint {exported}; served, according to the log, was {', '.join(served)}"
        )
    saved = folder / "checkpoints" / checkpoint_name(result.step)
    what = "checkpoint"
    if not saved.is_dir():
        result.compare(what, "not compared", f"no checkpoint of step {result.step} is kept")
    elif faults := damage(saved):
        result.compare(what, "not compared", faults[0])
    else:
        with tempfile.TemporaryDirectory(prefix="asyncflow-replay-") as scratch:
            await trainer.save(Path(scratch))
            apart = _distance(Path(scratch), saved)
        where = f"weights and optimizer state of {saved.name}"
        if apart is None:
            result.compare(what, "equal", f"every bit of the {where}")
        else:
            result.compare(what, "differs", f"{where}: up to {apart:.2g} apart")


def _distance(first: Path, second: Path) -> float | None:
    """How far the tensors of two checkpoints are apart at most; None when every bit is equal."""
    furthest: float | None = None
    for name in sorted(path.name for path in second.glob("*.safetensors")):
        ours, theirs = load_file(first / name), load_file(second / name)
        if ours.keys() != theirs.keys():
            return float("inf")
        for key, tensor in ours.items():
            other = theirs[key]
            if tensor.dtype != other.dtype or tensor.shape != other.shape:
                return float("inf")
            if tensor.numpy().tobytes() != other.numpy().tobytes():
                apart = float((tensor.double() - other.double()).abs().max())
                furthest = max(furthest or 0.0, apart)
    return furthest
