"""A book of the ledger: which columns there are, and which groups have them for all their rows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError
from asyncflow.data.tickets import TicketArray, Tickets, places, some
from asyncflow.data.window import Window

MAX_COLUMNS = 63
MAX_NAME = 1024


class ColumnBook:
    """A bit for each column, given as they are first named; and how many rows got one later, in the ledger's window."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}
        self._late: set[str] = set()

    def mask(self, columns: Collection[str]) -> int:
        """The bits of columns together. Raises `ColumnError` where they are too many, and gives none of them a bit."""
        try:
            mask = 0
            for name in columns:
                mask |= self._bits[name]
            return mask
        except KeyError:
            self._add(dict.fromkeys(name for name in columns if name not in self._bits))
            return self.mask(columns)

    def check(
        self, window: Window, tickets: TicketArray, num_rows: NDArray[np.integer], columns: Collection[str]
    ) -> None:
        """Raise `ColumnError` unless so many more rows of some groups can have these columns."""
        self.mask(columns)
        here = tickets - window.base
        for column in columns:
            written = window[_late(column)][here] if column in self._late else 0
            is_full = window["full"][here] & np.uint64(self._bits[column])
            if is_full.any() or (written + num_rows > window["rows"][here]).any():
                raise ColumnError(
                    f"some of tickets {some(tickets)} have column {column} already: a column is written once"
                )

    def write(self, window: Window, tickets: TicketArray, num_rows: NDArray[np.integer], column: str) -> TicketArray:
        """So many more rows of some groups have a column; the groups of which all rows have it now. Checks first."""
        self.check(window, tickets, num_rows, (column,))
        if column not in self._late:
            self._late.add(column)
            window.add(_late(column), np.int32, 0)
        written, here = window[_late(column)], tickets - window.base
        written[here] += num_rows
        complete: TicketArray = tickets[written[here] == window["rows"][here]]
        window["full"][complete - window.base] |= np.uint64(self._bits[column])
        return complete

    def forget(self, window: Window, tickets: Tickets) -> None:
        """These groups have no rows any more, and no column."""
        here = places(tickets, window.base)
        for name in ("rows", "full", *map(_late, self._late)):
            window[name][here] = 0

    def _add(self, names: Collection[str]) -> None:
        if len(self._bits) + len(names) > MAX_COLUMNS:
            raise ColumnError(
                f"a queue has at most {MAX_COLUMNS} columns; it has {len(self._bits)}, and these would be "
                f"{len(names)} more: {', '.join(name[:40] for name in list(names)[:4])}"
            )
        for name in names:
            if len(name) > MAX_NAME:
                raise ColumnError(f"the name of a column has at most {MAX_NAME} letters, this has {len(name)}")
        for name in names:
            self._bits[name] = 1 << len(self._bits)


def _late(column: str) -> str:
    return f"rows with {column}"
