"""The data plane: blocks written into one's own arena, rows read out of anybody's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        pieces = [_OpenPiece(piece, arena) for piece in source.pieces]
        for name in source.names:
            column = join([piece.read(name) for piece in pieces])
            columns[name] = _copy(column) if is_copied and len(pieces) == 1 else column
    if is_copied:  # else a lease holds what is read
        for extent in {piece.extent for source in sources for piece in source.pieces}:
            arena(extent.arena).block(extent)
    return {name: columns[name] for name in names}


class _OpenPiece:
    """Rows of one block, with its memory."""

    def __init__(self, piece: Piece, arena: Callable[[int], Arena]) -> None:
        self._block = arena(piece.extent.arena).block(piece.extent)
        self._specs = {spec.name: spec for spec in piece.columns}
        self._group_size = piece.group_size
        rows = piece.rows
        self._places = slice(rows.start, rows.stop) if isinstance(rows, Span) else np.frombuffer(rows.places, "<i4")

    def read(self, name: str) -> Ragged:
        """A column of these rows. Raises `ColumnError` when the block does not have it."""
        spec = self._specs.get(name)
        if spec is None:
            raise ColumnError(f"column {name} does not exist for all of these rows")
        column, places = read(spec, self._block), self._places
        if spec.is_shared:
            numbers = np.arange(places.start, places.stop) if isinstance(places, slice) else places
            return select(column, numbers // self._group_size)
        return select(column, places)


def _copy(column: Ragged) -> Ragged:
    return Ragged(
        values=column.values.copy(), lengths=column.lengths.copy(), dtype=column.dtype, is_dense=column.is_dense
    )
