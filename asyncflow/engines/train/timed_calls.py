"""Calls that compute: in the compute thread, on the cores that are ours now, their time reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import torch

from asyncflow.core.metrics import Observer
from asyncflow.engines.train.compute_thread import ComputeThread

ResultT = TypeVar("ResultT")


class TimedCalls:
    """Runs calls in `thread` and reports them as spans of `role`.

    `num_threads` is asked before each on how many CPU threads it may compute; 0 leaves the
    number as it is.
    """

    def __init__(self, thread: ComputeThread, role: str, observer: Observer, num_threads: Callable[[], int]) -> None:
        self._thread = thread
        self._role = role
        self._observer = observer
        self._num_threads = num_threads

    async def run(self, name: str, call: Callable[[], ResultT]) -> ResultT:
        """The call's result. When cancelled, lets the call end first."""
        clock = asyncio.get_running_loop().time
        num_threads = self._num_threads()
        start_s = clock()

        def compute() -> ResultT:
            # OpenMP keeps a number for each thread that asks, MKL one for the process, which another
            # compute thread may have set since: so it is set again, though it may be ours already.
            # A thread that asks for the first time is given what any thread set last: ask before.
            torch.get_num_threads()
            if num_threads:
                torch.set_num_threads(num_threads)
            return call()

        try:
            return await self._thread.run(compute)
        finally:
            self._observer.span(self._role, name, start_s, clock())
