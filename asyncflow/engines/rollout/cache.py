"""The keys and values of running sequences: one row each, every row with its own length.

Implements the part of transformers' `Cache` that attention layers use when the caller hands
them a ready four-dimensional mask and position ids: `update`. Memory is taken as rows and
columns are needed, never for a whole context in advance.

Columns at or beyond a row's length hold leftovers; the mask hides them until they are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

COLUMN_BLOCK = 32
ROW_BLOCK = 8


def round_up(number: int, block: int) -> int:
    """The next multiple of `block`.

    >>> round_up(33, 32), round_up(32, 32)
    (64, 32)
    """
    return -(-number // block) * block


class SlotCache:
    """Keys and values of every layer, `[rows, heads, columns, head_dim]` each.

    Used as `past_key_values` between `begin` and the end of that forward pass.
    """

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._positions = torch.empty(0, dtype=torch.int64)
        self._index = self._positions
        self._rows = 0
        self._columns = 0

    def begin(self, lengths: Tensor, longest: int) -> None:
        """Prepare to append one token to rows 0 .. B - 1, at columns `lengths [B]` (longest: their maximum)."""
        self._positions = lengths
        self._rows = len(lengths)
        self._index = torch.arange(self._rows, device=lengths.device)
        self._columns = round_up(longest + 1, COLUMN_BLOCK)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """What the new tokens attend to, added to the attention scores: 0 or -inf, `[B, 1, 1, columns]`."""
        columns = torch.arange(self._columns, device=self._positions.device)
        hidden = columns > self._positions[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)[
            :, None, None
        ]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, heads, 1, head_dim]`; gives whole rows, `[B, heads, columns, head_dim]`."""
        keys = self._room(self._keys, layer_idx, key_states, self._rows, self._columns)
        values = self._room(self._values, layer_idx, value_states, self._rows, self._columns)
        return self._append(keys, key_states), self._append(values, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use; some models ask, though positions and mask are given."""
        return self._columns

    def fill(self, prefix: DynamicCache, sources: Sequence[int], rows: Sequence[int]) -> None:
        """Take over prefixes computed in another cache: `rows[i]` begins with its row `sources[i]`."""
        for index, layer in enumerate(prefix.layers):
            for store, states in ((self._keys, layer.keys), (self._values, layer.values)):
                length = states.shape[2]
                memory = self._room(store, index, states, max(rows) + 1, round_up(length, COLUMN_BLOCK))
                memory[list(rows), :, :length] = states[list(sources)]

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` columns of rows; no row may be both source and target."""
        for store in (self._keys, self._values):
            for index, old in enumerate(store):
                memory = self._room(store, index, old, max(targets) + 1, length)
                memory[list(targets), :, :length] = memory[list(sources), :, :length]

    def _append(self, memory: Tensor, states: Tensor) -> Tensor:
        memory[self._index, :, self._positions] = states[:, :, 0]
        return memory[: self._rows, :, : self._columns]

    @staticmethod
    def _room(store: list[Tensor], layer: int, like: Tensor, rows: int, columns: int) -> Tensor:
        """The memory of a layer, grown to at least this many rows and columns; growing doubles."""
        if layer == len(store):
            store.append(like.new_empty(0, like.shape[1], 0, like.shape[3]))
        old = store[layer]
        old_rows, heads, old_columns, size = old.shape
        if rows > old_rows or columns > old_columns:
            new_rows = max(round_up(rows, ROW_BLOCK), 2 * old_rows) if rows > old_rows else old_rows
            new_columns = max(columns, 2 * old_columns) if columns > old_columns else old_columns
            store[layer] = old.new_zeros(new_rows, heads, new_columns, size)
            store[layer][:old_rows, :, :old_columns] = old
        return store[layer]
