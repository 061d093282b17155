"""The one thread that computes, seen from the event loop.

Invariant: when an awaited call is over, however it ended, the thread is not working on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

ResultT = TypeVar("ResultT")


class ComputeThread:
    """Runs calls one after the other, in the order in which they came."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """The call's result. When cancelled, lets the call end first, then raises `CancelledError`.

        A thread can't be stopped, so a cancelled caller that went on at once would race with
        it for the gradients and weights.
        """
        future = asyncio.get_running_loop().run_in_executor(self._executor, call)
        cancelled: asyncio.CancelledError | None = None
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError as error:  # raised below, when the thread is done
                cancelled = error
        if cancelled is None:
            return future.result()
        if (failure := future.exception()) is not None:
            raise cancelled from failure
        raise cancelled

    def close(self) -> None:
        """Wait for the call that runs, and end the thread. May be called twice."""
        self._executor.shutdown(wait=True)
