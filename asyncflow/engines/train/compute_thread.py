"""The one thread that computes, seen from the event loop.

Invariant: when an awaited call is over, however it ended, the thread is not working on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from asyncflow.core.threads import outlast

ResultT = TypeVar("ResultT")


class ComputeThread:
    """Runs calls one after the other, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """The call's result. When cancelled, lets the call end first, then raises `CancelledError`."""
        return await outlast(asyncio.get_running_loop().run_in_executor(self._executor, call))

    def close(self) -> None:
        """Wait for the call that runs, and end the thread. May be called twice."""
        self._executor.shutdown(wait=True)
