"""Two small books of the ledger: the rank of a ticket, and how many ended in which way."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable

from asyncflow.core.types import Ticket
from asyncflow.data.ledger_types import LedgerCounts, LedgerSnapshot


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


class Endings:
    """How many tickets were trained, and how many dropped for which reason."""

    def __init__(self, snapshot: LedgerSnapshot) -> None:
        self.trained = snapshot.trained
        self.num_dropped = sum(snapshot.dropped.values())
        self._dropped = Counter(dict(snapshot.dropped))

    def drop(self, count: int, reason: str) -> None:
        """So many more were dropped."""
        self.num_dropped += count
        self._dropped[reason] += count

    def counts(self, *, admitted: int, pending: int) -> LedgerCounts:
        """These and the others."""
        return LedgerCounts(admitted=admitted, trained=self.trained, dropped=dict(self._dropped), pending=pending)

    def snapshot(self, *, admitted: int, pending: tuple[Ticket, ...], ranks: Ranks) -> LedgerSnapshot:
        """What a checkpoint keeps of these and the others."""
        return LedgerSnapshot(
            admitted=admitted,
            trained=self.trained,
            dropped=dict(self._dropped),
            pending=pending,
            dropped_since=ranks.dropped_after(pending[0] if pending else admitted),
        )
