"""The control plane's hand on the log: what happened is appended, what follows from it waits until it may."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from asyncflow.data.log import Log
from asyncflow.data.records import AnyRecord, encode


class Journal:
    """Appends records and remembers the last one: everything after it waits for it."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._lsn = 0

    def note(self, record: Callable[[], AnyRecord], payload: NDArray[np.uint8] | None = None) -> None:
        """Append what happened; nothing is made of it where no log is kept."""
        if self.log.is_kept:
            self._lsn = self.log.append(encode(record()), () if payload is None else (payload,))

    def when_safe(self, action: Callable[[], None]) -> None:
        """Call the action once all that was noted may be acted upon."""
        self.log.when_safe(self._lsn, action)

    def when_written(self, action: Callable[[], None]) -> None:
        """Call the action once no memory of what was noted is read any more."""
        self.log.when_written(self._lsn, action)
