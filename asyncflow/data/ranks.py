"""Two small books of the ledger: the rank of a ticket, and the bit of a column."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from asyncflow.core.errors import LedgerError
from asyncflow.core.types import Ticket

MAX_COLUMNS = 63


class Ranks:
    """How many tickets before each were admitted and not dropped; forgets those that are long over.

    >>> ranks = Ranks([Ticket(4)], num_before=2)  # two of those before ticket 4 were dropped too
    >>> ranks.rank(4), ranks.rank(5)
    (2, 2)
    """

    def __init__(self, dropped: Iterable[Ticket], *, num_before: int) -> None:
        self._dropped: list[int] = sorted(dropped)
        self._num_before = num_before

    def rank(self, ticket: int) -> int:
        """Of a ticket that was not forgotten."""
        return ticket - self._num_before - bisect_left(self._dropped, ticket)

    def drop(self, ticket: int) -> None:
        """Ranks after this ticket fall by one."""
        insort(self._dropped, ticket)

    def forget(self, before: int) -> None:
        """Nobody will ask for the rank of a ticket below this one."""
        if self._dropped and self._dropped[0] < before:
            passed = bisect_left(self._dropped, before)
            self._num_before += passed
            del self._dropped[:passed]

    def dropped_after(self, ticket: int) -> tuple[Ticket, ...]:
        """The dropped tickets younger than this one."""
        return tuple(Ticket(dropped) for dropped in self._dropped if dropped > ticket)


class ColumnBits:
    """A bit for each column, given as they are first named."""

    def __init__(self) -> None:
        self._bits: dict[str, int] = {}

    def mask(self, columns: Iterable[str]) -> int:
        """The bits of columns together. Raises `LedgerError` for one too many."""
        mask = 0
        for name in columns:
            bit = self._bits.get(name)
            if bit is None:
                if len(self._bits) == MAX_COLUMNS:
                    raise LedgerError(f"a queue has at most {MAX_COLUMNS} columns; {name} would be one more")
                bit = self._bits[name] = 1 << len(self._bits)
            mask |= bit
        return mask
