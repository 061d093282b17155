"""The durable log of a run: opened, taken up on a resume, set aside where it does not fit, thinned out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from asyncflow.algo.algorithms import columns_of
from asyncflow.core.config import RunConfig
from asyncflow.core.world import World
from asyncflow.data import records
from asyncflow.data.history import History, read_history
from asyncflow.data.ledger import Ledger, LedgerSnapshot
from asyncflow.data.log import FileLog, Log, LoggedRecord, LogMode, NoLog, compact, read_log
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


async def thin_out(folder: Path, oldest_kept: int, world: World) -> None:
    """Give back the disk space of rows that no checkpoint from step `oldest_kept` on can need."""
    home = folder / LEDGER
    if home.is_dir():
        await world.run_blocking(lambda: _thin_out(home, oldest_kept))


def _thin_out(home: Path, oldest_kept: int) -> None:
    done: set[int] = set()
    for logged in read_log(home):
        match records.decode(logged.meta):
            case records.Trained(step=step, tickets=tickets) if step <= oldest_kept:
                done.update(records.read_tickets(tickets).tolist())
            case records.Dropped(tickets=tickets):
                done.update(records.read_tickets(tickets).tolist())
    compact(home, lambda logged: not _tickets_of(logged) <= done)


def _tickets_of(logged: LoggedRecord) -> set[int]:
    """The tickets whose rows a record's payload holds."""
    match records.decode(logged.meta):
        case records.Produced(first=first, count=number):
            return set(range(first, first + number))
        case records.Written(rows=rows):
            return set(np.unique(records.read_tickets(rows.tickets)).tolist())
    return set()
