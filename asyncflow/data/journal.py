"""The control plane's hand on the log: what happened is appended, what follows from it waits until it may."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import QueueError
from asyncflow.data.log import Log
from asyncflow.data.log_reader import MAX_META_BYTES, MAX_PAYLOAD_BYTES
from asyncflow.data.records import AnyRecord, encode, ticket_bytes
from asyncflow.data.tickets import Tickets

SPARE_BYTES = 1 << 20
"""Of a record's meta, for all but tickets and rows: column names and the like."""
TICKETS_IN_RECORD = 1 << 20
MAX_TEXT = 1 << 20


class Journal:
    """Appends records and remembers the last one: everything after it waits for it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._lsn = 0

    def note(self, record: Callable[[], AnyRecord], payload: NDArray[np.uint8] | None = None) -> None:
        """Append what happened; nothing is made of it where no log is kept."""
        if self.log.is_kept:
            self._lsn = self.log.append(encode(record()), () if payload is None else (payload,))

    def note_tickets(self, tickets: Tickets, record: Callable[[bytes], AnyRecord]) -> None:
        """Append what happened to tickets, in as many records as they need; nothing where there are none."""
        for start in range(0, len(tickets), TICKETS_IN_RECORD) if self.log.is_kept else ():
            part = ticket_bytes(tickets[start : start + TICKETS_IN_RECORD])
            self._lsn = self.log.append(encode(record(part)))

    def check(self, *, num_bytes: int, payload_bytes: int = 0) -> None:
        """Raise `QueueError` where a record about rows, of so many bytes, is too large for the log."""
        if self.log.is_kept and (num_bytes > MAX_META_BYTES - SPARE_BYTES or payload_bytes > MAX_PAYLOAD_BYTES):
            raise QueueError(
                f"{payload_bytes:,} bytes of rows with {num_bytes:,} bytes of tickets and indices are too many for "
                f"one record of the log ({MAX_PAYLOAD_BYTES:,} and {MAX_META_BYTES - SPARE_BYTES:,}): do it in parts"
            )

    def check_text(self, *texts: str) -> None:
        """Raise `QueueError` where a text that is to be noted is too long."""
        longest = max(map(len, texts))
        if longest > MAX_TEXT:
            raise QueueError(f"a text of {longest:,} letters is too long for the log, which takes {MAX_TEXT:,}")

    def when_safe(self, action: Callable[[], None]) -> None:
        """Call the action once all that was noted may be acted upon."""
        self.log.when_safe(self._lsn, action)

    def when_written(self, action: Callable[[], None]) -> None:
        """Call the action once no memory of what was noted is read any more."""
        self.log.when_written(self._lsn, action)
