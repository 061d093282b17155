"""The data plane: blocks written into one's own arena, rows read out of anybody's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError, QueueFullError
from asyncflow.core.types import Ragged
from asyncflow.data.arena import HEADER_BYTES, Allocator, Arena
from asyncflow.data.directory import Extent, Piece, Source, Span
from asyncflow.data.layout import ColumnSpec, Draft, fill, join, read, select


class Writer:
    """Puts blocks into an arena and knows what is free in it."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._space = Allocator(arena.num_bytes)

    def write(self, drafts: Sequence[Draft], num_bytes: int) -> tuple[Extent, tuple[ColumnSpec, ...]] | None:
        """A block with these columns; None when there is no room for it now.

        Raises `QueueFullError` when there never is. Nothing is taken unless the block is whole.
        """
        if num_bytes + HEADER_BYTES > self.arena.num_bytes:
            raise QueueFullError(
                f"{num_bytes:,} bytes in one put are more than the whole arena of {self.arena.num_bytes:,} bytes: "
                "put fewer rows at once, or give the queue more memory"
            )
        extent = self._space.take(num_bytes, self.arena.number)
        if extent is None:
            return None
        try:
            columns = fill(drafts, self.arena.begin(extent))
        except BaseException:
            self.free(extent)
            raise
        self.arena.commit(extent)
        return extent, columns

    def copy(self, block: NDArray[np.uint8]) -> Extent:
        """A block that exists elsewhere. Raises `QueueFullError` when there is no room."""
        extent = self._space.take(len(block), self.arena.number)
        if extent is None:
            raise QueueFullError(f"no room for a block of {len(block):,} bytes")
        np.copyto(self.arena.begin(extent)[: len(block)], block)
        self.arena.commit(extent)
        return extent

    def free(self, extent: Extent) -> None:
        """Nobody needs this block any more."""
        self._space.give_back(extent.offset, extent.num_bytes)

    @property
    def num_free(self) -> int:
        """Bytes that are free, perhaps in several pieces."""
        return self._space.num_free


def read_columns(
    sources: Sequence[Source], names: Sequence[str], arena: Callable[[int], Arena], *, is_copied: bool = False
) -> dict[str, Ragged]:
    """The columns of rows that lie at these places: views where all lie in one block, unless `is_copied`.

    Raises `StaleHandleError` when a block was freed; copies are safe against that at any time.
    """
    columns: dict[str, Ragged] = {}
    for source in sources:
        for name in source.names:
            column = join([_read_piece(piece, name, arena) for piece in source.pieces])
            columns[name] = _copy(column) if is_copied and len(source.pieces) == 1 else column
    if is_copied:
        for piece in {piece.extent: piece for source in sources for piece in source.pieces}.values():
            arena(piece.extent.arena).block(piece.extent)
    return {name: columns[name] for name in names}


def _read_piece(piece: Piece, name: str, arena: Callable[[int], Arena]) -> Ragged:
    spec = next((spec for spec in piece.columns if spec.name == name), None)
    if spec is None:
        raise ColumnError(f"column {name} does not exist for all of these rows")
    column = read(spec, arena(piece.extent.arena).block(piece.extent))
    if isinstance(piece.rows, Span):
        places: slice | NDArray[np.integer] = slice(piece.rows.start, piece.rows.stop)
    else:
        places = np.frombuffer(piece.rows.places, "<i4")
    if spec.is_shared:
        numbers = np.arange(places.start, places.stop) if isinstance(places, slice) else places
        return select(column, numbers // piece.group_size)
    return select(column, places)


def _copy(column: Ragged) -> Ragged:
    return Ragged(
        values=column.values.copy(), lengths=column.lengths.copy(), dtype=column.dtype, is_dense=column.is_dense
    )


def token_counts(columns: Mapping[str, Ragged], name: str) -> NDArray[np.int32]:
    """Values of a column in each row, for packing; a row that is None has none."""
    return np.maximum(columns[name].lengths, 0)
