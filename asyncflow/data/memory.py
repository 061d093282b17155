"""The memory of a queue: whose arenas there are, what their blocks hold, and when their space goes back.

**Invariant.** The space of a block goes back to its writer when every task has acknowledged its
rows, nobody holds a lease on them any more, and the log has written them. An arena whose
writer is gone is closed with the last of its blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError, QueueError, StaleHandleError
from asyncflow.data.arena import HEADER_BYTES, Arena
from asyncflow.data.directory import Extent, Source
from asyncflow.data.journal import Journal
from asyncflow.data.layout import ColumnSpec, check, row_type
from asyncflow.data.sessions import Lease, Session

MAX_ROWS = 1 << 31
"""Of one put, whose columns may all be shared."""
MAX_GROUP_ROWS = 1 << 24


class Memory:
    """The arenas of all sessions, and who still reads what in them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._owners: dict[int, Session] = {}
        self._num_arenas = 0
        self._num_blocks: Counter[int] = Counter()
        self._held: Counter[Extent] = Counter()
        self._deferred: set[Extent] = set()
        self._types: dict[str, tuple[str, tuple[int, ...]]] = {}

    def attach(self, session: Session, arena: Callable[[int], Arena]) -> Arena:
        """Give a session its arena, made by `arena` from the number it gets."""
        if session.arena is not None:
            raise QueueError(f"{session.name} has an arena already")
        session.arena = arena(self._num_arenas)
        self._owners[self._num_arenas] = session
        self._num_arenas += 1
        return session.arena

    def arena(self, number: int) -> Arena:
        """The arena of this number. Raises `StaleHandleError`."""
        session = self._owners.get(number)
        if session is None or session.arena is None:
            raise StaleHandleError(f"there is no arena {number}")
        return session.arena

    def check_block(self, session: Session, extent: Extent, columns: Sequence[ColumnSpec]) -> NDArray[np.uint8]:
        """The bytes of a block that a session just wrote. Raises when they are not what it says."""
        if session.arena is None or extent.arena != session.arena.number:
            raise QueueError(f"{session.name} put a block that is not in its own arena")
        if len({spec.name for spec in columns}) != len(columns) or not columns:
            raise ColumnError("a block has at least one column, and each once")
        for spec in columns:
            check(spec, extent.num_bytes - HEADER_BYTES)
            kind = row_type(spec)
            known = self._types.get(spec.name, kind)
            if spec.num_values and known != kind:
                raise ColumnError(
                    f"rows of column {spec.name} are {known[0]}{[*known[1]]} in this queue, these are "
                    f"{spec.dtype}{[*kind[1]]}: convert them, or name the column otherwise"
                )
        return session.arena.block(extent)

    def keep(self, extent: Extent, columns: Iterable[ColumnSpec]) -> None:
        """A block is in use; rows of its columns must be of the same types from now on, to be read together."""
        self._num_blocks[extent.arena] += 1
        for spec in columns:
            if spec.num_values:
                self._types[spec.name] = row_type(spec)

    def forget_types(self) -> None:
        """The queue is empty: columns may be of other types."""
        self._types.clear()

    def hold(self, lease: Lease, sources: Iterable[Source]) -> None:
        """A consumer reads these now."""
        for extent in {piece.extent for source in sources for piece in source.pieces}:
            lease.extents.append(extent)
            self._held[extent] += 1

    def let_go(self, lease: Lease) -> None:
        """A consumer has read all that it was leased."""
        for extent in lease.extents:
            self._held[extent] -= 1
            if self._held[extent] == 0:
                del self._held[extent]
                if extent in self._deferred:
                    self._deferred.discard(extent)
                    self._give_back(extent)
        lease.extents.clear()

    def free(self, extents: Iterable[Extent]) -> None:
        """No task needs these any more."""
        for extent in extents:
            if extent in self._held:
                self._deferred.add(extent)
            else:
                self._give_back(extent)

    def _give_back(self, extent: Extent) -> None:
        session = self._owners[extent.arena]
        self._num_blocks[extent.arena] -= 1
        if session.is_open:
            self._journal.when_written(partial(session.free, extent))
        else:
            self.close_when_unused(session)

    def close_when_unused(self, session: Session) -> None:
        """Close the arena of a session that is gone, unless some of its blocks are in use."""
        arena = session.arena
        if session.is_open or arena is None or self._num_blocks[arena.number]:
            return
        self._journal.when_written(arena.close)
        del self._owners[arena.number], self._num_blocks[arena.number]
        session.arena = None

    def close(self) -> None:
        """Give everything back, whoever uses it. May be called twice."""
        for session in self._owners.values():
            if session.arena is not None:
                session.arena.close()
        self._owners.clear()


def check_groups(count: int, group_size: int, columns: Sequence[ColumnSpec]) -> None:
    """Raise `ColumnError` unless so many groups have these columns; one that is shared has a row for each group."""
    rows = {spec.num_rows * group_size if spec.is_shared else spec.num_rows for spec in columns}
    if min(count, group_size) < 1 or rows != {count * group_size}:
        raise ColumnError(f"{count} groups of {group_size} rows were put with columns of {sorted(rows)} rows")
    if group_size > MAX_GROUP_ROWS or count * group_size >= MAX_ROWS:
        raise ColumnError(f"{count} groups of {group_size} rows are too many: put them in parts")
