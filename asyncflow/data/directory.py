"""Where the columns of each row lie: in which block, at which place.

A put makes one block with all its columns, in which its rows stand one after another; a
write makes another with the columns it adds, for any rows. Lookups are array operations over
all rows asked for. Numbers only: the memory is the arena's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LedgerError, StaleHandleError
from asyncflow.core.types import Rows
from asyncflow.data.layout import ColumnSpec
from asyncflow.data.tickets import TicketArray, Tickets, as_array, places, reach_before
from asyncflow.data.window import Window

NOWHERE = -1


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """The bytes of a block: where in which arena, and the stamp its first bytes must carry."""

    arena: int
    offset: int
    num_bytes: int
    stamp: int


class Span(msgspec.Struct, frozen=True, array_like=True, tag="s"):
    """Rows of a block that stand one after another."""

    start: int
    stop: int


class Places(msgspec.Struct, frozen=True, array_like=True, tag="p"):
    """Rows of a block in any order, as int32."""

    places: bytes


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """Some rows of one block, in the order in which they were asked for."""

    extent: Extent
    columns: tuple[ColumnSpec, ...]
    group_size: int
    rows: Span | Places


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Columns, and the pieces that make them up."""

    names: tuple[str, ...]
    pieces: tuple[Piece, ...]


@dataclass(slots=True)
class Block:
    """A block in use. `num_left`: tickets (of a put) or rows (of a write) that may still be read."""

    extent: Extent
    columns: tuple[ColumnSpec, ...]
    group_size: int
    num_left: int
    first: int = -1
    first_row: int = -1


class Directory:
    """Which block holds which column of which row."""

    def __init__(self, first_ticket: int = 0) -> None:
        self._blocks: dict[int, Block] = {}
        self._num_blocks = 0
        self._num_rows = 0
        self._tickets = Window(
            {"block": (np.int64, NOWHERE), "at": (np.int32, 0), "row": (np.int64, NOWHERE), "size": (np.int32, 0)},
            base=first_ticket,
        )
        self._rows = Window({"unused": (np.bool_, 0)})
        self._late: list[str] = []
        self._late_set: set[str] = set()

    def __len__(self) -> int:
        """Blocks in use."""
        return len(self._blocks)

    # -- what comes ---------------------------------------------------------------------------

    def add(self, first: int, count: int, group_size: int, extent: Extent, columns: tuple[ColumnSpec, ...]) -> None:
        """The block of a put: groups of consecutive tickets, of `group_size` rows each."""
        tickets = self._tickets
        if first + count > tickets.end:
            tickets.extend(first + count - tickets.end)
        here = slice(first - tickets.base, first - tickets.base + count)
        tickets["block"][here] = self._num_blocks
        at = np.arange(0, count * group_size, group_size)
        tickets["at"][here] = at
        tickets["row"][here] = at + self._num_rows
        tickets["size"][here] = group_size
        self._blocks[self._num_blocks] = Block(extent, columns, group_size, count, first, self._num_rows)
        self._num_blocks += 1
        self._num_rows += count * group_size
        if self._late:
            self._rows.extend(self._num_rows - self._rows.end)

    def add_late(self, rows: Rows, extent: Extent, columns: tuple[ColumnSpec, ...], order: NDArray[np.int32]) -> None:
        """The block of a write: `order` says where in the block each of these rows stands."""
        for spec in columns:
            self._begin_late(spec.name)
        numbers = self._numbers(rows) - self._rows.base
        for spec in columns:
            self._rows[f"block {spec.name}"][numbers] = self._num_blocks
            self._rows[f"at {spec.name}"][numbers] = order
        self._blocks[self._num_blocks] = Block(extent, columns, 1, len(rows))
        self._num_blocks += 1

    def _begin_late(self, name: str) -> None:
        if name in self._late:
            return
        if not self._late:
            oldest = next((block.first_row for block in self._blocks.values() if block.first_row >= 0), self._num_rows)
            self._rows = Window({"unused": (np.bool_, 0)}, base=oldest)
            self._rows.extend(self._num_rows - oldest)
        self._late.append(name)
        self._late_set.add(name)
        self._rows.add(f"block {name}", np.int64, NOWHERE)
        self._rows.add(f"at {name}", np.int32, 0)

    def is_written(self, rows: Rows, name: str) -> NDArray[np.bool_]:
        """Whether each row has got the column by a write."""
        if name not in self._late:
            return np.zeros(len(rows), np.bool_)
        written: NDArray[np.bool_] = self._rows[f"block {name}"][self._numbers(rows) - self._rows.base] != NOWHERE
        return written

    # -- where it is --------------------------------------------------------------------------

    def rows_of(self, tickets: Tickets, generation: int) -> Rows:
        """All rows of these groups, in order. Raises `StaleHandleError` when some are not here."""
        size = self.common_size(tickets)
        tickets = as_array(tickets)
        if size:
            return Rows.of_groups(tickets, size, generation)
        sizes = self.group_sizes(tickets)
        within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return Rows(np.repeat(tickets, sizes), within.astype(np.int32), generation)

    def common_size(self, tickets: Tickets) -> int:
        """Rows of each of these groups; 0 where they differ, or are not here."""
        if reach_before(tickets, self._tickets.base):
            return 0
        sizes = self._tickets["size"][places(tickets, self._tickets.base)]
        size = int(sizes[0]) if len(sizes) else 1
        return size if (sizes == size).all() else 0

    def group_sizes(self, tickets: NDArray[np.int64]) -> NDArray[np.int32]:
        """Rows of each group. Raises `StaleHandleError` when one is not here."""
        self._check(tickets)
        sizes: NDArray[np.int32] = self._tickets["size"][tickets - self._tickets.base].astype(np.int32)
        return sizes

    def check_rows(self, rows: Rows) -> None:
        """Raise `StaleHandleError` for rows that are not here, or that their groups do not have."""
        sizes = self.group_sizes(rows.tickets)
        if (rows.indices < 0).any() or (rows.indices >= sizes).any():
            raise StaleHandleError("a handle names rows that its groups do not have")

    def block_of(self, tickets: Tickets) -> Block | None:
        """The block in which consecutive groups lie, all of them; None where there is no such block."""
        window = self._tickets
        if not isinstance(tickets, range) or tickets.start < window.base or tickets.stop > window.end:
            return None
        blocks = window["block"]
        number = int(blocks[tickets.start - window.base])
        if number == NOWHERE or int(blocks[tickets.stop - 1 - window.base]) != number:
            return None  # the tickets of a block are consecutive, so those between are in it too
        return self._blocks[number]

    def locate_groups(self, block: Block, tickets: range, names: Sequence[str]) -> tuple[Source, ...] | None:
        """The same for all rows of consecutive groups of one block; None where a column was written later."""
        if not self._late_set.isdisjoint(names):
            return None
        start = (tickets.start - block.first) * block.group_size
        span = Span(start, start + block.group_size * len(tickets))
        return (Source(tuple(names), (Piece(block.extent, block.columns, block.group_size, span),)),)

    def locate(self, rows: Rows, names: Sequence[str]) -> tuple[Source, ...]:
        """Where these columns of these rows lie. Raises `StaleHandleError` for rows that are not here."""
        self._check(rows.tickets)
        here = rows.tickets - self._tickets.base
        blocks, at = self._tickets["block"][here], self._tickets["at"][here] + rows.indices
        if not self._late:
            return (Source(tuple(names), tuple(self._pieces(blocks, at))),)
        late = [name for name in names if name in self._late]
        sources = [Source(tuple(name for name in names if name not in late), tuple(self._pieces(blocks, at)))]
        numbers = self._tickets["row"][here] + rows.indices - self._rows.base
        for name in late:
            own = self._rows[f"block {name}"][numbers]
            is_own = own != NOWHERE
            own_at = np.where(is_own, self._rows[f"at {name}"][numbers], at)
            sources.append(Source((name,), tuple(self._pieces(np.where(is_own, own, blocks), own_at))))
        return tuple(source for source in sources if source.names)

    def _pieces(self, blocks: NDArray[np.generic], at: NDArray[np.generic]) -> Iterator[Piece]:
        """Runs of rows in the same block."""
        if len(blocks) == 0:
            return
        if blocks[0] == blocks[-1] and (blocks == blocks[0]).all():
            starts = [0, len(blocks)]
        else:
            starts = [0, *(np.flatnonzero(blocks[1:] != blocks[:-1]) + 1).tolist(), len(blocks)]
        for start, stop in pairwise(starts):
            block = self._blocks[int(blocks[start])]
            yield Piece(block.extent, block.columns, block.group_size, _span(at[start:stop]))

    # -- what goes ----------------------------------------------------------------------------

    def free(self, tickets: Tickets, *, oldest: int = 0) -> list[Extent]:
        """These groups are not needed any more, nor any before `oldest`; the blocks in which nothing is needed now."""
        window = self._tickets
        blocks = window["block"]
        if not isinstance(tickets, range) or tickets.start < window.base or tickets.stop > window.end:
            tickets = as_array(tickets)
            tickets = tickets[(tickets >= window.base) & (tickets < window.end)]
        here = places(tickets, window.base)
        left = blocks[here]
        if (left == NOWHERE).any():
            tickets = as_array(tickets)[left != NOWHERE]
            here, left = places(tickets, window.base), left[left != NOWHERE]
        freed = self._free_late(here) if self._late else []
        freed += self._leave(left)
        blocks[here] = NOWHERE
        self._forget(oldest)
        return freed

    def _free_late(self, here: slice | TicketArray) -> list[Extent]:
        sizes = self._tickets["size"][here]
        first = np.repeat(self._tickets["row"][here], sizes)
        within = np.arange(len(first)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        numbers = first + within - self._rows.base
        # Columns of one write share a block, in which each row counts once.
        owners = np.stack([self._rows[f"block {name}"][numbers] for name in self._late])
        for name in self._late:
            self._rows[f"block {name}"][numbers] = NOWHERE
        owners.sort(axis=0)
        is_first = np.vstack([np.ones((1, len(numbers)), np.bool_), owners[1:] != owners[:-1]])
        return self._leave(owners[is_first & (owners != NOWHERE)])

    def _leave(self, blocks: NDArray[np.generic]) -> list[Extent]:
        if len(blocks) == 0:
            return []
        if (blocks == blocks[0]).all():
            counted = [(int(blocks[0]), len(blocks))]
        else:
            numbers, counts = np.unique(blocks, return_counts=True)
            counted = list(zip(numbers.tolist(), counts.tolist(), strict=True))
        freed = []
        for number, count in counted:
            block = self._blocks[number]
            block.num_left -= count
            if block.num_left < 0:
                raise LedgerError(f"block {number} was freed twice")
            if block.num_left == 0:
                freed.append(block.extent)
                del self._blocks[number]
        return freed

    def _forget(self, oldest: int) -> None:
        """Move the windows past what is gone; the oldest block of a put is the first in the dictionary."""
        self._tickets.forget(min(oldest, self._tickets.end))
        if self._late:
            oldest = next((block.first_row for block in self._blocks.values() if block.first_row >= 0), self._num_rows)
            self._rows.forget(oldest)

    def _numbers(self, rows: Rows) -> NDArray[np.int64]:
        self._check(rows.tickets)
        return self._tickets["row"][rows.tickets - self._tickets.base].astype(np.int64) + rows.indices

    def _check(self, tickets: NDArray[np.int64]) -> None:
        window = self._tickets
        if len(tickets) == 0:
            return
        here = tickets - window.base
        if here.min() < 0 or tickets.max() >= window.end or (window["block"][here] == NOWHERE).any():
            raise StaleHandleError(
                "some of these rows are no longer in the queue: acknowledged by every task, dropped or cleared"
            )


def _span(at: NDArray[np.generic]) -> Span | Places:
    start, count = int(at[0]), len(at)
    if int(at[-1]) - start == count - 1 and (count < 3 or bool((np.diff(at) == 1).all())):
        return Span(start, start + count)
    return Places(at.astype(np.int32).tobytes())
