"""Causal attention for a packed row: samples lie one after the other in `[1, T]`, nothing is padded.

Linear layers, norms and embeddings run on the packed row. Only attention looks across
tokens, so only it needs to know where samples begin. It is given to transformers as an
attention function by name; a model calls it in place of its own.

Inside, samples of similar length share a bucket, a rectangle padded on the right to its
longest sample. With a causal mask no token sees what is on its right, so padding needs no
mask. Tokens are moved by index, forward and backward: nothing is added up, so the sums do
not depend on what else is in the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import IntArray

NAME = "asyncflow_packed"
"""What transformers knows the function by. No mask function has this name, so no mask is made."""

MAX_STRETCH = 1.3
"""A bucket's longest sample has at most this many times the tokens of its shortest."""

SHORT = 16
"""Samples up to this length share a bucket: padding them is cheaper than another call."""

UNSUPPORTED = ("sliding_window", "softcap", "s_aux")
"""What a model may ask of its attention function and this one can't do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """Where the samples of a packed row lie, and the rectangles that attention works on.

    The cells of all rectangles are counted through, row by row. `token_of_cell [cells]` says
    which token a cell reads (padding reads its sample's first), `cell_of_token [T]` where a
    token went; `rectangles` are `(samples, longest)`.

    Samples of 2 and 1 tokens: one rectangle (2, 2), with samples by length::

        cells           c -  a b        tokens  a b c
        token_of_cell   2 2  0 1        cell_of_token  2 3 0
    """

    position_ids: Tensor
    token_of_cell: Tensor
    cell_of_token: Tensor
    rectangles: tuple[tuple[int, int], ...]


def plan_packing(lengths_S: IntArray, device: torch.device) -> Packing:
    """Sort samples by length into rectangles with little padding.

    >>> plan_packing(np.array([2, 1], np.int32), torch.device("cpu")).token_of_cell.tolist()
    [2, 2, 0, 1]
    """
    starts_S = np.cumsum(lengths_S) - lengths_S
    token_of_cell: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    is_token: list[np.ndarray[tuple[int], np.dtype[np.bool_]]] = []
    rectangles: list[tuple[int, int]] = []
    for samples in _similar(lengths_S):
        longest = int(lengths_S[samples[-1]])
        column = np.arange(longest)[None]
        inside = column < lengths_S[samples][:, None]
        token_of_cell.append((starts_S[samples][:, None] + np.where(inside, column, 0)).reshape(-1))
        is_token.append(inside.reshape(-1))
        rectangles.append((len(samples), longest))
    tokens = np.concatenate(token_of_cell)
    cells = np.flatnonzero(np.concatenate(is_token))
    cell_of_token = np.empty(len(cells), np.int64)
    cell_of_token[tokens[cells]] = cells
    return Packing(
        position_ids=torch.tensor(np.arange(len(cells)) - np.repeat(starts_S, lengths_S), device=device),
        token_of_cell=torch.tensor(tokens, device=device),
        cell_of_token=torch.tensor(cell_of_token, device=device),
        rectangles=tuple(rectangles),
    )


def _similar(lengths_S: IntArray) -> list[list[int]]:
    """Samples by ascending length, cut where they would need too much padding."""
    buckets: list[list[int]] = []
    limit = 0.0
    for sample in np.argsort(lengths_S, kind="stable").tolist():
        if not buckets or lengths_S[sample] > limit:
            buckets.append([])
            limit = max(SHORT, MAX_STRETCH * int(lengths_S[sample]))
        buckets[-1].append(sample)
    return buckets


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    asyncflow_packing: Packing,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: object,
) -> tuple[Tensor, None]:
    """The attention function, in the form transformers calls: `[1, H, T, D]` to `[1, T, H, D]`.

    Raises `ConfigError` when the model asks for what is not implemented here.
    """
    asked_for = [name for name in UNSUPPORTED if options.get(name) is not None]
    if asked_for or attention_mask is not None:
        raise ConfigError(f"packed attention has no {', '.join(asked_for) or 'attention mask'}")
    rectangles = [_to_rectangles(states, asyncflow_packing) for states in (query, key, value)]
    shares_heads = key.shape[1] != query.shape[1]
    outputs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=shares_heads)
        for q, k, v in zip(*rectangles, strict=True)
    ]
    row_width = query.shape[1] * value.shape[3]
    cells = torch.cat([output.transpose(1, 2).reshape(-1, row_width) for output in outputs])
    tokens = cast(Any, _CellsToTokens).apply(cells, asyncflow_packing.cell_of_token)
    return tokens.view(1, -1, query.shape[1], value.shape[3]), None


def _to_rectangles(states: Tensor, packing: Packing) -> list[Tensor]:
    """`[1, H, T, D]` to one `[samples, H, longest, D]` for each rectangle."""
    _, num_heads, num_tokens, width = states.shape
    tokens = states.transpose(1, 2).reshape(num_tokens, num_heads * width)
    cells = cast(Any, _TokensToCells).apply(tokens, packing.token_of_cell, packing.cell_of_token)
    sizes = [samples * longest for samples, longest in packing.rectangles]
    return [
        part.view(samples, longest, num_heads, width).transpose(1, 2)
        for part, (samples, longest) in zip(cells.split(sizes), packing.rectangles, strict=True)
    ]


class _TokensToCells(torch.autograd.Function):
    """Copies tokens to their cells. Padding gets no gradient: no real token attends to it."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of_cell: Tensor, cell_of_token: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(cell_of_token)
        return tokens.index_select(0, token_of_cell)

    @staticmethod
    def backward(ctx: Any, grad_cells: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (cell_of_token,) = ctx.saved_tensors
        return grad_cells.index_select(0, cell_of_token), None, None


class _CellsToTokens(torch.autograd.Function):
    """Copies cells back to their tokens. Padding is left behind, with gradient 0."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, cell_of_token: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(cell_of_token)
        ctx.num_cells = len(cells)
        return cells.index_select(0, cell_of_token)

    @staticmethod
    def backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (cell_of_token,) = ctx.saved_tensors
        grad_cells = grad_tokens.new_zeros(ctx.num_cells, grad_tokens.shape[1])
        return grad_cells.index_copy_(0, cell_of_token, grad_tokens), None


AttentionInterface.register(NAME, cast(Any, packed_attention))
