"""The words of the ledger: where a ticket is, who consumes it, and what is counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from asyncflow.core.types import Ticket


class State(IntEnum):
    """Where a ticket is."""

    ADMITTED = 0
    RETURNED = 1
    """Its rollout was lost: it waits to be issued again."""
    PRODUCED = 2
    TRAINED = 3
    DROPPED = 4


class Offer(IntEnum):
    """Where a ticket is for one task."""

    INCOMPLETE = 0
    READY = 1
    LEASED = 2
    DONE = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueTask:
    """A consumer of the queue: it is offered a group the moment all columns in `needs` exist.

    The one task with `trains` ends a ticket with its acknowledgement, and is offered groups
    by the gate's order; the others take them as they come. In a queue where no task trains,
    a ticket ends when every task has acknowledged it.
    """

    name: str
    needs: tuple[str, ...]
    trains: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerCounts:
    """Tickets by what became of them."""

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    pending: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerSnapshot:
    """What a checkpoint keeps: enough to issue unfinished tickets again and nothing twice.

    `dropped_since` are the dropped tickets younger than the oldest pending one: ranks need them.
    """

    admitted: int
    trained: int
    dropped: Mapping[str, int]
    pending: tuple[Ticket, ...]
    dropped_since: tuple[Ticket, ...] = ()
