"""Where the trained model comes from: a folder or the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from asyncflow.core.errors import ConfigError
from asyncflow.engines.devices import pick_device
from asyncflow.engines.models import open_weights
from asyncflow.engines.train.forward import Forward, choose_forward


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model in float32 on its device, how to run it, and the tokenizer that came with it, if one did."""

    model: PreTrainedModel
    forward: Forward
    tokenizer: PreTrainedTokenizerBase | None

    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer beside the weights, so that the folder is a complete model."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def load_model(source: str, device: str) -> LoadedModel:
    """Load a causal language model by folder or hub name; `device` may be `auto`. Raises `ConfigError`."""
    if source.startswith((".", "/")) and not Path(source).is_dir():
        raise ConfigError(f"{source} does not exist: expected the folder of a model")
    model = open_weights(source, pick_device(device, "train"), torch.float32)
    return LoadedModel(model=model, forward=choose_forward(model), tokenizer=_load_tokenizer(source))


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    try:
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError):  # the weights can be trained without one
        return None
