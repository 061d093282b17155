"""A control plane that goes on where its log ended: finished groups are there again, unfinished ones issued again."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asyncflow.core.columns import VERSIONS
from asyncflow.core.types import NOT_SAMPLED
from asyncflow.data import records
from asyncflow.data.arena import FIRST_BYTES, HEADER_BYTES, Arena
from asyncflow.data.control import ControlPlane
from asyncflow.data.gate import Gate
from asyncflow.data.history import History, StoredBlock, holds, pending_blocks, pending_writes, read_history
from asyncflow.data.layout import ALIGNMENT_BYTES
from asyncflow.data.ledger import Ledger, QueueTask, State
from asyncflow.data.log import Log, read_payload
from asyncflow.data.plane import Writer
from asyncflow.data.tickets import TicketArray

NEVER_PUT = "never put"
NEVER_PRODUCED = "it was not finished when the run ended"
TOO_OLD = "too old for the bound of the resumed run"


def open_control(
    tasks: Sequence[QueueTask], gate: Gate | None, log: Log, folder: Path | None, *, wall_clock: str = ""
) -> ControlPlane:
    """A queue on a log that is open; what the log holds already, in `folder`, is taken up."""
    if folder is None:
        return ControlPlane(Ledger(tasks, gate), log, generation=secrets.randbits(31))
    return restore(read_history(folder, tasks, gate), log, wall_clock=wall_clock)


def restore(history: History, log: Log, *, restored_step: int = 0, wall_clock: str = "") -> ControlPlane:
    """Go on from a history. Groups that would be too old by the ledger's gate are rolled out again.

    In a queue without a gate nobody issues tickets again: those that were never put are dropped.
    """
    ledger = history.ledger
    ledger.last_step = max(history.last_step, restored_step)
    blocks = pending_blocks(history)
    pending = ledger.pending()
    first = min([block.first for block in blocks] + pending.tolist(), default=ledger.num_admitted)
    epoch = len(history.opened) + 1
    control = ControlPlane(ledger, log, generation=secrets.randbits(31), first_ticket=first)
    carried = None if history.opened else carry(ledger)
    control.note(opened(ledger, epoch, restored_step, wall_clock, carried))
    _load(control, history, blocks)
    ledger.mark_redelivered(np.arange(ledger.oldest, ledger.num_admitted))
    states = ledger.state_of(pending)
    if ledger.gate is None:
        _drop(control, pending[states != State.PRODUCED], NEVER_PUT)
        return control
    control.issue_again(pending[states == State.ADMITTED], NEVER_PRODUCED)
    control.issue_again(_too_old(control, ledger), TOO_OLD)
    return control


def _drop(control: ControlPlane, tickets: TicketArray, reason: str) -> None:
    if len(tickets):
        session = control.open_session("the log", lambda extent: None)
        control.drop(session, tickets, reason)
        control.close_session(session)


def opened(
    ledger: Ledger, epoch: int, restored_step: int = 0, wall_clock: str = "", carried: records.Carried | None = None
) -> records.Opened:
    """The record with which a process takes a log over."""
    gate = ledger.gate
    return records.Opened(
        epoch=epoch,
        tasks={name: task.needs for name, task in ledger.tasks.items()},
        trains=next((name for name, task in ledger.tasks.items() if task.trains), ""),
        groups_per_step=gate.groups_per_step if gate else 0,
        max_staleness=gate.max_staleness if gate else 0,
        look_ahead=gate.look_ahead if gate else 0,
        steps=gate.steps if gate else 0,
        restored_step=restored_step,
        wall_clock=wall_clock,
        carried=carried,
    )


def carry(ledger: Ledger) -> records.Carried | None:
    """What a log has to say first that begins where this ledger stands; nothing at the beginning of a run."""
    if ledger.num_admitted == 0:
        return None
    snapshot = ledger.snapshot()
    return records.Carried(
        snapshot.admitted,
        snapshot.trained,
        dict(snapshot.dropped),
        records.ticket_bytes(np.array(snapshot.pending, np.int64)),
        records.ticket_bytes(np.array(snapshot.dropped_since, np.int64)),
    )


def _load(control: ControlPlane, history: History, blocks: Sequence[StoredBlock]) -> None:
    """Copy what is still needed from the disk into an arena of the control plane's own."""
    writes = pending_writes(history)
    places = [*(block.place for block in blocks), *(write.place for write, _ in writes)]
    if not places:
        return
    total = sum(-(-place.length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES + HEADER_BYTES for place in places)
    session = control.open_session("the log", lambda extent: None)
    arena = control.memory.attach(session, lambda number: Arena.create(max(FIRST_BYTES, total), number))
    writer = Writer(arena)
    for block in blocks:
        extent = writer.copy(read_payload(block.place))
        control.directory.add(block.first, block.count, block.group_size, extent, block.columns)
        control.memory.keep(extent, block.columns)
        tickets = np.arange(block.first, block.first + block.count)
        control.directory.free(tickets[~holds(history, block)])
    for write, is_held in writes:
        extent = writer.copy(read_payload(write.place))
        control.directory.add_late(write.rows[is_held], extent, write.columns, write.order[is_held])
        control.memory.keep(extent, write.columns)
    control.close_session(session)


def _too_old(control: ControlPlane, ledger: Ledger) -> TicketArray:
    """Groups that a gate with a smaller bound would train too late: by the oldest version among their tokens."""
    gate, pending = ledger.gate, ledger.pending()
    if gate is None:
        return pending[:0]
    found = []
    for ticket in pending[ledger.state_of(pending) == State.PRODUCED].tolist():
        versions = control.read(control.rows_of(np.array([ticket])), VERSIONS)
        if versions is None:
            continue
        sampled = versions.values[versions.values != NOT_SAMPLED]
        if len(sampled) and gate.last_step(ledger.rank(ticket)) - int(sampled.min()) > gate.bound:
            found.append(ticket)
    return np.array(found, np.int64)
