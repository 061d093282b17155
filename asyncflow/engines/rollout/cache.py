"""The keys and values of running sequences: one row each, every row with its own length.

Implements the part of transformers' `Cache` that attention layers use when the caller hands
them a ready four-dimensional mask and position ids: `update`. Memory follows what is
running: never a whole context in advance, and what outgrew its need is given back.

Columns at or beyond a row's length hold leftovers; the mask hides them until they are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

COLUMN_BLOCK = 8
"""What GPU kernels want masks aligned to."""
SLACK = 1.25
"""Memory is taken for this many times the need, so that it is not moved at every step. Attention
is slower the more unused memory lies between the rows."""


def round_up(number: int, block: int) -> int:
    """The next multiple of `block`.

    >>> round_up(33, 32), round_up(32, 32)
    (64, 32)
    """
    return -(-number // block) * block


class SlotCache:
    """Keys and values of every layer, `[rows, heads, columns, head_dim]` each.

    `reserve` memory before rows are filled; `begin` a forward pass, then hand this over as its
    `past_key_values`.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._capacity = (0, 0)
        self._positions = torch.empty(0, dtype=torch.int64)
        self._columns = 0

    def reserve(self, rows: int, length: int) -> None:
        """Make room for this many rows with sequences of this length; what lies outside is lost."""
        columns = round_up(length, COLUMN_BLOCK)
        if rows <= self._capacity[0] and columns <= self._capacity[1]:
            return
        self._capacity = int(rows * SLACK), round_up(int(length * SLACK), COLUMN_BLOCK)
        for store in (self._keys, self._values):
            for index, old in enumerate(store):
                store[index] = self._empty(old)
                kept_rows, kept_columns = min(rows, len(old)), min(columns, old.shape[2])
                store[index][:kept_rows, :, :kept_columns] = old[:kept_rows, :, :kept_columns]

    def begin(self, lengths: Tensor, longest: int) -> None:
        """Prepare to append one token to rows 0 .. B - 1, at columns `lengths [B]`; `longest` is their maximum."""
        self.reserve(len(lengths), longest + 1)
        self._positions = lengths
        self._columns = round_up(longest + 1, COLUMN_BLOCK)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What the new tokens attend to, added to the attention scores: 0 or -inf, `[B, 1, 1, columns]`."""
        hidden = torch.arange(self._columns, device=self._positions.device) > self._positions[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, heads, 1, head_dim]`; gives whole rows, `[B, heads, columns, head_dim]`."""
        keys = self._layer(self._keys, layer_idx, key_states)
        values = self._layer(self._values, layer_idx, value_states)
        return self._append(keys, key_states), self._append(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use; some models ask, though positions and mask are given."""
        return self._columns

    def fill(self, prefix: DynamicCache, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Take over prefixes computed in another cache: `rows[i]` begins with its row `sources[i]`."""
        for index, layer in enumerate(prefix.layers):
            for store, states in ((self._keys, layer.keys), (self._values, layer.values)):
                memory = self._layer(store, index, states)
                memory[list(rows), :, : states.shape[2]] = states[list(sources)]

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of rows; no row may be both source and target."""
        for memory in (*self._keys, *self._values):
            memory[list(targets), :, :length] = memory[list(sources), :, :length]

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what rows hold. Hidden columns must be finite: a weight of 0 does not hide a NaN."""
        for memory in (*self._keys, *self._values):
            memory[list(rows)] = 0

    def _append(self, memory: Tensor, states: Tensor) -> Tensor:
        _, heads, columns, size = memory.shape
        rows = len(self._positions)
        pieces = torch.arange(rows * heads, device=memory.device).view(rows, heads) * columns
        where = (pieces + self._positions[:, None]).flatten()
        memory.view(-1, size).index_copy_(0, where, states.reshape(-1, size))
        return memory[:rows, :, : self._columns]

    def _layer(self, store: list[Tensor], index: int, like: Tensor) -> Tensor:
        if index == len(store):
            store.append(self._empty(like))
        return store[index]

    def _empty(self, like: Tensor) -> Tensor:
        """Memory for a layer with the heads and sizes of these states. Zeros: hidden columns must not be NaN."""
        rows, columns = self._capacity
        return like.new_zeros(rows, like.shape[1], columns, like.shape[3])
