"""Who uses a queue, what they hold, and what they wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from asyncflow.core.types import Ticket
from asyncflow.data.arena import Arena
from asyncflow.data.directory import Extent, Source
from asyncflow.data.tickets import Tickets, join


@dataclass(frozen=True, slots=True)
class Taken:
    """Groups handed to a consumer, and where their columns lie. None: the stream has ended.

    `group_size` is the number of rows of each; 0 where they differ.
    """

    tickets: Tickets
    group_size: int
    sources: tuple[Source, ...]


class Answer(Protocol):
    """Called once with the groups that were taken."""

    def __call__(self, taken: Taken, /) -> None:
        """What was taken."""
        ...


@dataclass(slots=True)
class Lease:
    """What a consumer has taken and not yet acknowledged."""

    number: int
    task: str
    parts: list[Tickets] = field(default_factory=list)
    extents: list[Extent] = field(default_factory=list)
    num_parked: int = 0
    """Takes under it that wait."""

    @property
    def tickets(self) -> Tickets:
        """All of it."""
        return join(self.parts)


@dataclass(slots=True, eq=False)
class ParkedTake:
    """A take that could not be served when it came."""

    session: Session
    lease: Lease
    max_groups: int
    at_least: int
    limit: Callable[[Tickets], int] | None
    answer: Answer


@dataclass(slots=True, eq=False)
class Session:
    """One user of the queue. `free` is told which of its blocks may be overwritten."""

    name: str
    free: Callable[[Extent], None]
    arena: Arena | None = None
    reserved: set[int] = field(default_factory=set)
    leases: dict[int, Lease] = field(default_factory=dict)
    expired: dict[int, Lease] = field(default_factory=dict)
    is_open: bool = True


@dataclass(slots=True, eq=False)
class ParkedReserve:
    """A producer that waits for the gate."""

    session: Session
    answer: Callable[[Ticket], None]
