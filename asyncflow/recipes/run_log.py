"""The durable log of a run: opened, taken up on a resume, set aside where it does not fit, thinned out."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from asyncflow.algo.algorithms import columns_of
from asyncflow.core.columns import REWARD
from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.world import World
from asyncflow.data import records
from asyncflow.data.history import History, read_history
from asyncflow.data.ledger import Ledger, LedgerSnapshot
from asyncflow.data.log import FileLog, Log, LogMode, NoLog
from asyncflow.data.log_reader import list_segments, read_metas, read_segment
from asyncflow.recipes.thinning import Thinner
from asyncflow.workflow.checkpoint_folder import checkpoint_name
from asyncflow.workflow.reinforce import make_gate, make_tasks

LEDGER = "ledger"
"""The folder of a run that holds the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLog:
    """A run's log while it is open. `history` is what it held before; None where none is kept."""

    log: Log
    history: History | None
    warnings: tuple[str, ...] = ()


NO_LOG = RunLog(log=NoLog(), history=None)


@asynccontextmanager
async def open_run_log(config: RunConfig, folder: Path, snapshot: LedgerSnapshot, step: int) -> AsyncIterator[RunLog]:
    """Open the log of the run in `folder`, which goes on from a checkpoint after `step` steps with this ledger.

    If the disk does not take what is logged, the block ends with that error. Raises
    `LogDamagedError` when the log can't be read.
    """
    home = folder / LEDGER
    if config.queue.log == "off":
        warnings = _set_aside(home, "queue.log=off")
        yield RunLog(log=NoLog(), history=None, warnings=warnings)
        return
    history, warnings = _take_up(config, home, snapshot, step)
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(error: Exception) -> None:
        if not failure.done():
            failure.set_exception(error)

    log = FileLog.open(
        home, mode=LogMode(config.queue.log), group_commit_s=config.queue.group_commit_ms / 1000, on_failure=fail
    )
    try:
        async with asyncio.TaskGroup() as watch:
            watcher = watch.create_task(_wait(failure), name="watch the log")
            yield RunLog(log=log, history=history, warnings=warnings)
            watcher.cancel()
    finally:
        failure.cancel()
        await log.aclose()


async def _wait(failure: asyncio.Future[None]) -> None:
    await failure


def _take_up(config: RunConfig, home: Path, snapshot: LedgerSnapshot, step: int) -> tuple[History, tuple[str, ...]]:
    """What the log holds, or an empty history that begins with the checkpoint's ledger."""
    tasks, gate = make_tasks(config, columns_of(config.algorithm)), make_gate(config)
    fresh = History(ledger=Ledger(tasks, gate, snapshot))
    if not home.is_dir():
        return fresh, ()
    history = read_history(home, tasks, gate)
    if history.last_step < step:
        reason = f"it ends at step {history.last_step}, the checkpoint is of step {step}"
        return fresh, _set_aside(home, reason)
    return history, ()


def _set_aside(home: Path, reason: str) -> tuple[str, ...]:
    """Rename a log that the run does not go on with; what to say about it."""
    if not home.is_dir():
        return ()
    target = next(path for n in count(1) if not (path := home.with_name(f"{home.name}.old-{n}")).exists())
    home.rename(target)
    return (f"the run does not go on with its log ({reason}), which is now {target.name}",)


async def thin_out(thinner: Thinner, oldest_kept: int, world: World) -> None:
    """Give back the disk space of rows that no checkpoint from step `oldest_kept` on can need."""
    await world.run_blocking(lambda: thinner.thin_out(oldest_kept))


def steps_to_take_again(folder: Path, step: int, config: RunConfig) -> list[int]:
    """The steps that the run's log holds after its checkpoint of `step`; a resume takes them again.

    Raises `ConfigError` when it could not: with fewer steps in `config`, or with columns that they lack.
    """
    home = folder / LEDGER
    if config.queue.log == "off" or not home.is_dir():
        return []
    logged = _Logged()
    segments = list_segments(home)
    for path in segments:
        for record in read_segment(path, len(segments)) if path is segments[-1] else read_metas(path):
            logged.add(records.decode(record.meta))
    steps = sorted(done for done in logged.steps if done > step)
    if not steps:
        return []
    if config.steps < steps[-1]:
        raise ConfigError(
            f"steps={config.steps} is below the {steps[-1]} that the log holds: give at least steps={steps[-1]}"
        )
    missing = logged.missing(steps, (*columns_of(config.algorithm), REWARD))
    if missing:
        raise ConfigError(
            f"steps {steps[0]} to {steps[-1]} are to be taken again from the log after {checkpoint_name(step)}, and "
            f"their rows have no {', '.join(missing)}, which algorithm.kl_coef={config.algorithm.kl_coef:g} needs. "
            "Resume with the settings of before, or give these steps up with queue.log=off"
        )
    return steps


@dataclass(slots=True)
class _Logged:
    """The steps of a log, and which columns its rows have: with the put, or how many rows by later writes."""

    steps: dict[int, bytes] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    put: dict[int, frozenset[str]] = field(default_factory=dict)
    late: dict[int, Counter[str]] = field(default_factory=dict)

    def add(self, record: records.AnyRecord) -> None:
        """The next record."""
        match record:
            case records.Produced(first=first, count=number, group_size=size, columns=columns):
                tickets = range(first, first + number)
                self.sizes.update(dict.fromkeys(tickets, size))
                self.put.update(dict.fromkeys(tickets, frozenset(spec.name for spec in columns)))
            case records.Written(rows=rows, columns=columns):
                for ticket in records.read_tickets(rows.tickets).tolist():
                    self.late.setdefault(ticket, Counter()).update(spec.name for spec in columns)
            case records.Reissued(tickets=tickets):
                for ticket in records.read_tickets(tickets).tolist():
                    self.late.pop(ticket, None)
            case records.Trained(step=step, tickets=tickets):
                self.steps[step] = tickets

    def missing(self, steps: Sequence[int], names: Sequence[str]) -> list[str]:
        """Which of these columns some row of these steps has not."""
        tickets = [ticket for step in steps for ticket in records.read_tickets(self.steps[step]).tolist()]
        return [name for name in names if not all(self._has(ticket, name) for ticket in tickets)]

    def _has(self, ticket: int, name: str) -> bool:
        late = self.late.get(ticket, Counter())
        return name in self.put.get(ticket, ()) or late[name] >= self.sizes.get(ticket, 1)
