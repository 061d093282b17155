"""Notices that a process does not answer any more though it lives: stopped, deadlocked, lost in the kernel.

At fixed intervals it is asked whether it is still there, busy or idle; everything that
comes from it counts as an answer. Silence is counted in questions and not in seconds, so
that a pause of this process, or of both together (a suspended machine, a frozen container),
is one unanswered question however long it took.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

QUESTIONS = 4
"""Unanswered in a row, they end the wait."""


class Pulse:
    """Calls `ask` every quarter of `limit_s`, and `give_up` once after `limit_s` without an answer to it.

    A timer of the event loop, not a task: nothing has to wait for it.
    """

    def __init__(self, limit_s: float, ask: Callable[[], None], give_up: Callable[[], None]) -> None:
        self.limit_s = limit_s
        self._ask = ask
        self._give_up = give_up
        self._num_unanswered = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Ask for the first time after an interval."""
        self._timer = asyncio.get_running_loop().call_later(self.limit_s / QUESTIONS, self._beat)

    def hear(self) -> None:
        """Something came."""
        self._num_unanswered = 0

    def end(self) -> None:
        """Ask no more. May be called twice."""
        if self._timer is not None:
            self._timer.cancel()

    def _beat(self) -> None:
        if self._num_unanswered == QUESTIONS:
            self._give_up()
            return
        self._num_unanswered += 1
        self._ask()
        self.begin()
