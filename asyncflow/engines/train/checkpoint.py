"""A training engine on disk: safetensors and JSON, nothing that could run code when read.

A checkpoint is a model folder, so `from_pretrained` loads it, with two more files::

    config.json, model.safetensors, tokenizer…    the model, float32
    optimizer.safetensors                         AdamW's tensors, `exp_avg.PARAMETER` and so on
    trainer.json                                  version, phase and its steps

Everything is flushed to the disk. The caller writes into a draft folder and renames it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from asyncflow.core.errors import RunFolderError
from asyncflow.core.types import PolicyVersion
from asyncflow.core.world import Disk, sync_folder
from asyncflow.engines.models import progress_bars_hidden
from asyncflow.engines.train.optimizer import Phase

OPTIMIZER = "optimizer.safetensors"
TRAINER = "trainer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What is left of an engine besides its tensors."""

    version: PolicyVersion
    phase: Phase
    phase_steps: int


def write_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer_state: Mapping[str, Tensor], state: TrainerState, disk: Disk
) -> None:
    """Write all but the tokenizer, and flush every file of the folder to the disk.

    Tensors are written by their own libraries, which know no `disk`.
    """
    with progress_bars_hidden():
        model.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in optimizer_state.items()}, folder / OPTIMIZER)
    disk.write(folder / TRAINER, msgspec.json.encode(state))
    for path in sorted(folder.iterdir()):
        sync_folder(path)


def read_weights(folder: Path, model: PreTrainedModel) -> None:
    """Copy a checkpoint's weights into `model`, whose parameters stay the same objects."""
    with progress_bars_hidden():
        saved = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    values = dict(saved.named_parameters())
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if {name: value.shape for name, value in values.items()} != expected:
        raise RunFolderError(f"{folder} holds the weights of another model than {type(model).__name__} of this run")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def read_state(folder: Path) -> tuple[TrainerState, dict[str, Tensor]]:
    """The rest of a checkpoint. Raises `RunFolderError` for a folder that `write_checkpoint` did not complete."""
    try:
        state = msgspec.json.decode((folder / TRAINER).read_bytes(), type=TrainerState)
        return state, load_file(folder / OPTIMIZER)
    except (OSError, msgspec.MsgspecError) as error:
        raise RunFolderError(f"{folder} is not a checkpoint of a training engine: {error}") from error
