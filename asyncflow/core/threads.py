"""Calls in threads, awaited: work of ours, which ends before its caller goes on, and calls that may never return.

The latter, such as a user's reward, have `DaemonThreads`: one that is stuck can't keep the
process from ending, as a thread of the loop's own executor would. Their number is bounded; a
call waits for a free one. Who waits for a call may be cancelled at any time: a call that has
not begun is then never made, one that has is abandoned, and its thread is free again when it
returns.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def outlast(work: asyncio.Future[ResultT]) -> ResultT:
    """The result of work that a thread does. When cancelled, lets it end first, then raises `CancelledError`.

    A thread can't be stopped, so a cancelled caller that went on at once would race with it
    for what it works on: gradients, weights, the files of a checkpoint.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:  # raised below, when the thread is done
            cancelled = error
    if cancelled is None:
        return work.result()
    if (failure := work.exception()) is not None:
        raise cancelled from failure
    raise cancelled


@dataclass(slots=True)
class _Job:
    """A call without a result, and what to do when it has ended."""

    call: Callable[[], None]
    tell: Callable[[], None]
    error: BaseException | None = None
    is_wanted: bool = True


@dataclass(slots=True, kw_only=True)
class DaemonThreads:
    """At most `max_threads` threads, each started when a call finds none free."""

    name: str
    max_threads: int
    _jobs: queue.SimpleQueue[_Job] = field(default_factory=queue.SimpleQueue)
    _num_open: int = 0
    _num_threads: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)  # the counts: the loop against the threads

    async def run(self, call: Callable[[], ResultT]) -> ResultT:
        """The result of a call made in one of the threads, or what it raised.

        What is no `Exception`, such as `SystemExit`, becomes a `RuntimeError`: it would have
        ended the call's thread, and must not end the program instead.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        results: list[ResultT] = []

        def tell() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, ended)

        job = _Job(call=lambda: results.append(call()), tell=tell)
        self._submit(job)
        try:
            await ended
        except asyncio.CancelledError:
            job.is_wanted = False
            raise
        if job.error is not None and not isinstance(job.error, Exception):
            raise RuntimeError(f"the call ended its thread by {job.error!r}") from job.error
        if job.error is not None:
            raise job.error
        return results[0]

    def _submit(self, job: _Job) -> None:
        with self._lock:
            self._num_open += 1
            is_short = self._num_threads < min(self._num_open, self.max_threads)
            self._num_threads += is_short
        self._jobs.put(job)
        if is_short:
            threading.Thread(target=self._work, name=self.name, daemon=True).start()

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            if job.is_wanted:
                try:
                    job.call()
                except BaseException as error:  # noqa: BLE001 - raised again where the call is awaited
                    job.error = error
            with self._lock:
                self._num_open -= 1
            job.tell()
            del job  # a thread that waits for the next must not keep what this one held


def _settle(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)
