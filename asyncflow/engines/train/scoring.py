"""From a micro-batch to what a loss sees: log-probs, entropies and columns, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncflow.core.columns import LOSS_MASK, TOKEN_IDS
from asyncflow.core.errors import InvariantError
from asyncflow.core.ports import Loss, LossInputs
from asyncflow.core.types import BoolArray, FloatArray, IntArray, MicroBatch, Ragged
from asyncflow.engines.train.forward import Forward
from asyncflow.engines.train.token_logprobs import token_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """A model, how to run it, and the temperature its log-probs are taken at.

    With `half` the forward pass runs in bfloat16, where that is safe; log-probs are always
    computed in float32. With `alone`, `logprobs` runs each sample by itself, so that its bits do
    not depend on what else is in the batch.
    """

    model: PreTrainedModel
    forward: Forward
    temperature: float
    half: bool
    alone: bool = False

    def score(self, batch: MicroBatch, wanted_T: BoolArray) -> tuple[Tensor, Tensor]:
        """Log-prob of each wanted token given those before it, and the entropy there; `[T]`, 0 elsewhere.

        A sample's first token is given by nothing, so it is never wanted.
        """
        device = self.model.device
        wanted_T = wanted_T & ~_is_first(batch.lengths)
        places_N = torch.tensor(np.flatnonzero(wanted_T), device=device)
        token_ids_T = torch.tensor(batch[TOKEN_IDS].astype(np.int64), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            logits_NV = self.forward(self.model, token_ids_T, batch.lengths, places_N - 1)
        logprobs_N, entropy_N = token_logprobs(logits_NV, token_ids_T[places_N], self.temperature)
        empty_T = torch.zeros(batch.num_tokens, device=device)
        return empty_T.index_copy(0, places_N, logprobs_N), empty_T.index_copy(0, places_N, entropy_N)

    def inputs(self, batch: MicroBatch, loss: Loss[Tensor]) -> LossInputs[Tensor]:
        """What `loss` sees of the batch; carries the gradients."""
        device = self.model.device
        mask_T = cast(BoolArray, batch[LOSS_MASK])
        logprobs_T, entropy_T = self.score(batch, mask_T)
        return LossInputs(
            logprobs=logprobs_T,
            entropy=entropy_T,
            loss_mask=torch.tensor(mask_T, device=device),
            weights=torch.tensor(loss.weights(batch), device=device),
            columns={
                name: torch.tensor(_per_token(name, column, batch.lengths), device=device)
                for name, column in batch.columns.items()
            },
        )

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-prob of every token given those before it, `[T]`; 0 for a sample's first."""
        parts = _one_by_one(batch) if self.alone else [batch]
        scores = [self.score(part, np.ones(part.num_tokens, np.bool_))[0].cpu().numpy() for part in parts]
        return np.concatenate([np.zeros(0, np.float32), *scores])


def _one_by_one(batch: MicroBatch) -> Iterator[MicroBatch]:
    """The tokens of each sample, as a batch of its own."""
    for index, token_ids in enumerate(batch.columns[TOKEN_IDS].rows()):
        yield MicroBatch(rows=batch.rows[index : index + 1], columns={TOKEN_IDS: Ragged.stack([token_ids])})


def _is_first(lengths_S: IntArray) -> BoolArray:
    is_first_T = np.zeros(int(lengths_S.sum()), np.bool_)
    is_first_T[np.cumsum(lengths_S) - lengths_S] = True
    return is_first_T


def _per_token(name: str, column: Ragged, lengths_S: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """A column with one value for each token; those of samples are repeated."""
    if np.array_equal(column.lengths, lengths_S):
        return column.values
    if len(column.lengths) == len(lengths_S) and (column.lengths == 1).all():
        return np.repeat(column.values, lengths_S)
    raise InvariantError(
        f"column {name} has rows of {column.lengths[:5].tolist()}… values, "
        f"expected one for each token ({lengths_S[:5].tolist()}…) or one for each sample"
    )
