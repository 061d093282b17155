"""Logits of a packed micro-batch, by the fastest way that a model is right with.

`packed` runs one row without padding and needs the model to use the attention function that
it is given. `padded` runs any causal language model as its authors meant. Which of the two is
decided once, when the model is loaded, by comparing their logits.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import IntArray
from asyncflow.engines.train.packed_attention import NAME, plan_packing

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference between the two ways, as a part of the largest logit, in float32."""


class Forward(Protocol):
    """Logits `[N, V]` at the places `keep_N` of the packed tokens `token_ids_T`."""

    def __call__(self, model: PreTrainedModel, token_ids_T: Tensor, lengths_S: IntArray, keep_N: Tensor) -> Tensor:
        """The logits; those at place t predict token t + 1."""
        ...


def packed(model: PreTrainedModel, token_ids_T: Tensor, lengths_S: IntArray, keep_N: Tensor) -> Tensor:
    """One row, no padding; the model must have been given packed attention."""
    packing = plan_packing(lengths_S, token_ids_T.device)
    output = model(
        input_ids=token_ids_T[None],
        position_ids=packing.position_ids[None],
        use_cache=False,
        logits_to_keep=keep_N,
        asyncflow_packing=packing,
    )
    return cast(Tensor, output.logits[0])


def padded(model: PreTrainedModel, token_ids_T: Tensor, lengths_S: IntArray, keep_N: Tensor) -> Tensor:
    """One row for each sample, padded on the right to the longest."""
    inside_SL = torch.tensor(np.arange(lengths_S.max())[None] < lengths_S[:, None], device=token_ids_T.device)
    token_ids_SL = torch.zeros(inside_SL.shape, dtype=token_ids_T.dtype, device=token_ids_T.device)
    token_ids_SL[inside_SL] = token_ids_T
    output = model(input_ids=token_ids_SL, attention_mask=inside_SL.long(), use_cache=False)
    cells_T = inside_SL.reshape(-1).nonzero().squeeze(1)
    return cast(Tensor, output.logits.flatten(0, 1).index_select(0, cells_T[keep_N]))


def choose_forward(model: PreTrainedModel) -> Forward:
    """`packed` where the model gives the same logits that way, else `padded`; says so in the log."""
    own_attention = model.config._attn_implementation
    try:
        expected = _probe(model, padded)
        model.set_attn_implementation(NAME)
        difference = (_probe(model, packed) - expected).abs().max() / expected.abs().max()
        problem = f"logits differ by {difference:.2g}" if difference > TOLERANCE else ""
    except (ConfigError, TypeError, ValueError, KeyError, RuntimeError) as error:  # by models of all kinds
        problem = str(error).splitlines()[0]
    if not problem:
        log.info("train forward path=packed model=%s", type(model).__name__)
        return packed
    model.set_attn_implementation(own_attention)
    log.warning("train forward path=padded model=%s reason=%r", type(model).__name__, problem)
    return padded


@torch.no_grad()
def _probe(model: PreTrainedModel, forward: Forward) -> Tensor:
    lengths_S = np.array([5, 2, 20], np.int32)
    token_ids_T = torch.arange(27, device=model.device) % cast(Any, model.config.get_text_config()).vocab_size
    return forward(model, token_ids_T, lengths_S, torch.arange(27, device=model.device)).float()
