"""Sets of tickets: consecutive ones as a `range`, any others as an array.

Groups that are put and taken in order are consecutive, and state about them is a slice of an
array, which costs a fraction of picking its elements one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

TicketArray: TypeAlias = NDArray[np.int64]
Tickets: TypeAlias = TicketArray | range


def as_array(tickets: Tickets) -> TicketArray:
    """One number for each."""
    return np.arange(tickets.start, tickets.stop) if isinstance(tickets, range) else tickets


def places(tickets: Tickets, base: int) -> slice | TicketArray:
    """Where the tickets stand in an array that begins with ticket `base`."""
    if isinstance(tickets, range):
        return slice(tickets.start - base, tickets.stop - base)
    return tickets - base


def reach_before(tickets: Tickets, base: int) -> bool:
    """Whether some of the tickets are older than `base`."""
    return tickets.start < base if isinstance(tickets, range) else bool((tickets < base).any())


def some(tickets: Tickets) -> str:
    """A few of them, for a message.

    >>> some(range(5, 20))
    '5, 6, 7, 8, …'
    """
    shown = ", ".join(map(str, as_array(tickets[:4]).tolist()))
    return f"{shown}, …" if len(tickets) > 4 else shown


def first_place(start: int, stop: int, is_wanted: Callable[[slice], NDArray[np.bool_]]) -> int:
    """The first place for which a condition on places holds, or `stop`; looks at few where it is near."""
    step = 64
    while start < stop:
        found = is_wanted(slice(start, min(start + step, stop)))
        if found.any():
            return start + int(np.argmax(found))
        start, step = start + step, 2 * step
    return stop


def join(parts: Sequence[Tickets]) -> Tickets:
    """All of them; ranges that follow one another stay a range.

    >>> join([range(2, 4), range(4, 9)]), join([range(2), np.array([7])])
    (range(2, 9), array([0, 1, 7]))
    """
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return range(0)
    joined = parts[0]
    for part in parts[1:]:
        if not (isinstance(joined, range) and isinstance(part, range) and joined.stop == part.start):
            return np.concatenate([as_array(part) for part in parts])
        joined = range(joined.start, part.stop)
    return joined
