"""Checkpoints: a model folder that `from_pretrained` loads, with all it takes to go on.

`step-000040/` holds the training engine's files (weights, optimizer, tokenizer) and
`ledger.json`: which tickets were trained, dropped, or are to be issued again. A checkpoint
is written between two optimizer steps, so weights and ledger agree.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from asyncflow.core.causes import disk_reason
from asyncflow.core.errors import RunFolderError
from asyncflow.core.ports import TensorT, TrainEngine
from asyncflow.core.world import World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.workflow.checkpoint_folder import (
    begin_draft,
    draft_of,
    has_checkpoints,
    list_checkpoints,
    newest_valid,
    prune,
    publish,
)

LEDGER_FILE = "ledger.json"

EMPTY_LEDGER = LedgerSnapshot(admitted=0, trained=0, dropped={}, pending=())
"""The ledger before the first rollout."""


async def save_checkpoint(
    checkpoints: Path, trainer: TrainEngine[TensorT], step: int, ledger: LedgerSnapshot, keep: int, world: World
) -> Path:
    """Write, make durable and publish the checkpoint after `step` steps; remove the oldest.

    A checkpoint that is not published leaves no draft. Raises `RunFolderError` when the disk
    does not take it.
    """
    draft = draft_of(checkpoints, step)
    try:
        await world.run_blocking(lambda: begin_draft(checkpoints, step))
        await trainer.save(draft)
        world.disk.write(draft / LEDGER_FILE, msgspec.json.encode(ledger))
        folder = await world.run_blocking(lambda: publish(draft, world.disk))
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)  # a draft may be what fills the disk
        if isinstance(error, Exception) and (reason := disk_reason(error)):
            raise RunFolderError(
                f"the checkpoint of step {step} could not be written: {reason}. "
                f"Once that is repaired: asyncflow resume {checkpoints.parent}"
            ) from error
        raise
    await world.run_blocking(lambda: prune(folder, keep))
    return folder


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run. Raises `RunFolderError` when there is none."""
    checkpoints = run / "checkpoints"
    searched: list[Path] | None = None
    while (listed := list_checkpoints(checkpoints)) != searched:  # a live run may prune while we search
        searched = listed
        if found := newest_valid(checkpoints):
            return found
    if has_checkpoints(checkpoints):
        raise RunFolderError(f"{checkpoints} holds no whole checkpoint: every one of them is damaged. Start a new run")
    raise RunFolderError(
        f"{run} holds no checkpoint: the run has not come to its first one. "
        f"If it has ended, start it from the beginning: asyncflow resume {run}"
    )


def read_ledger(checkpoint: Path, world: World) -> LedgerSnapshot:
    """The ledger of a checkpoint. Raises `RunFolderError` when it is damaged."""
    try:
        return msgspec.json.decode(world.disk.read(checkpoint / LEDGER_FILE), type=LedgerSnapshot)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{checkpoint} has no readable {LEDGER_FILE}: {error}") from error
