"""The data plane of the transfer queue, in one process: columns of ragged rows, by ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import LedgerError
from asyncflow.core.types import MicroBatch, Ragged, RowId, Ticket


def count_rows(columns: Mapping[str, Ragged]) -> int:
    """Rows of a group. Raises `LedgerError` unless all its columns have the same number."""
    counts = {name: len(column.lengths) for name, column in columns.items()}
    if len(set(counts.values())) != 1:
        raise LedgerError(f"columns of one group differ in their number of rows: {counts}")
    return next(iter(counts.values()))


class LocalStore:
    """Holds rows until they are freed. Readers get them joined into packed columns."""

    def __init__(self) -> None:
        self._columns: dict[Ticket, dict[str, list[NDArray[np.generic]]]] = {}

    def put(self, ticket: Ticket, columns: Mapping[str, Ragged]) -> None:
        """Keep the rows of a group."""
        self._columns[ticket] = {name: column.rows() for name, column in columns.items()}

    def write(self, rows: Sequence[RowId], column: str, values: Ragged) -> None:
        """Add a column to some rows, in the order of `rows`. Rows freed meanwhile are passed over."""
        if len(rows) != len(values.lengths):
            raise LedgerError(f"column {column} has {len(values.lengths)} rows, the batch {len(rows)}")
        for row, array in zip(rows, values.rows(), strict=True):
            group = self._columns.get(row.ticket)
            if group is not None:
                count = len(next(iter(group.values())))
                group.setdefault(column, [np.empty(0)] * count)[row.index] = array

    def rows_of(self, ticket: Ticket) -> list[RowId]:
        """The rows of a group."""
        return [RowId(ticket, index) for index in range(len(next(iter(self._columns[ticket].values()))))]

    def lengths(self, rows: Sequence[RowId], column: str) -> NDArray[np.int32]:
        """Values of a column in each of the rows, `[S]`."""
        return np.array([len(self._columns[row.ticket][column][row.index]) for row in rows], np.int32)

    def get(self, rows: Sequence[RowId], columns: Sequence[str]) -> MicroBatch:
        """These columns of these rows, packed."""
        packed = {name: Ragged.stack([self._columns[row.ticket][name][row.index] for row in rows]) for name in columns}
        return MicroBatch(rows=tuple(rows), columns=packed)

    def free(self, ticket: Ticket) -> None:
        """Forget the rows of a group."""
        self._columns.pop(ticket, None)

    def __len__(self) -> int:
        """Groups held."""
        return len(self._columns)
