"""Which rows in a run's log nobody can need any more, known without reading the log twice.

**Invariant.** A payload goes only when every ticket in it was dropped, or was trained by a step that
no kept checkpoint comes before and acknowledged by every task that the queue had: a resume loads
nothing else. Only closed segments are looked at, each once; what the open one says is heard of when
it is closed, so until then a row may stay that could go, never the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from asyncflow.data import records
from asyncflow.data.log_reader import LoggedRecord, compact_segment, list_segments, read_metas


class Thinner:
    """What the closed segments of the log in a folder say, as far as they were read."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._num_read = 0
        self._payloads: dict[Path, dict[int, range | tuple[int, ...]]] = {}
        self._tasks: frozenset[str] = frozenset()
        self._undone: dict[int, set[str]] = {}
        self._trained: dict[int, int] = {}
        self._dropped: set[int] = set()

    def thin_out(self, oldest_kept: int) -> int:
        """Drop what no checkpoint from step `oldest_kept` on can need; bytes of the disk that this freed."""
        if not self._home.is_dir():
            return 0
        closed = list_segments(self._home)[:-1]
        for path in closed[self._num_read :]:
            self._payloads[path] = {}
            for logged in read_metas(path):
                self._note(path, logged)
        self._num_read = len(closed)
        freed = sum(self._compact(path, oldest_kept) for path in list(self._payloads))
        self._forget()
        return freed

    def _note(self, path: Path, logged: LoggedRecord) -> None:
        record = records.decode(logged.meta)
        match record:
            case records.Opened(tasks=tasks, trains=trains):
                self._open(frozenset(tasks) - {trains})
            case records.Produced(first=first, count=count):
                tickets = range(first, first + count)
                self._keep(path, logged, tickets)
                self._undone.update((ticket, set(self._tasks)) for ticket in tickets)
            case records.Written(rows=rows):
                self._keep(path, logged, tuple(np.unique(records.read_tickets(rows.tickets)).tolist()))
            case records.Done(task=task, tickets=data):
                for ticket in records.read_tickets(data).tolist():
                    self._undone.get(ticket, set()).discard(task)
            case records.Trained(step=step, tickets=data):
                self._trained.update(dict.fromkeys(records.read_tickets(data).tolist(), step))
            case records.Dropped(tickets=data):
                self._dropped.update(records.read_tickets(data).tolist())

    def _open(self, tasks: frozenset[str]) -> None:
        """Another process took the log over: tasks that are gone need nothing, new ones what is not trained yet."""
        for ticket, undone in self._undone.items():
            undone &= tasks
            if ticket not in self._trained:
                undone |= tasks - self._tasks
        self._tasks = tasks

    def _keep(self, path: Path, logged: LoggedRecord, tickets: range | tuple[int, ...]) -> None:
        if logged.place.length and not logged.place.is_compacted:
            self._payloads[path][logged.lsn] = tickets

    def _compact(self, path: Path, oldest_kept: int) -> int:
        payloads = self._payloads[path]
        gone = {lsn for lsn, tickets in payloads.items() if self._are_done(tickets, oldest_kept)}
        if not gone:
            return 0
        freed = compact_segment(path, lambda logged: logged.lsn not in gone)
        for lsn in gone:
            del payloads[lsn]
        if not payloads:
            del self._payloads[path]
        return freed

    def _are_done(self, tickets: Iterable[int], oldest_kept: int) -> bool:
        return all(
            ticket in self._dropped
            or (self._trained.get(ticket, oldest_kept + 1) <= oldest_kept and not self._undone.get(ticket))
            for ticket in tickets
        )

    def _forget(self) -> None:
        """What became of tickets before all whose rows are kept is of no interest: their rows are gone, or to come."""
        kept = (min(tickets) for payloads in self._payloads.values() for tickets in payloads.values() if tickets)
        oldest = min(kept, default=None)
        for known in (self._undone, self._trained):
            for ticket in [ticket for ticket in known if oldest is not None and ticket < oldest]:
                del known[ticket]
        if oldest is not None:
            self._dropped = {ticket for ticket in self._dropped if ticket >= oldest}
