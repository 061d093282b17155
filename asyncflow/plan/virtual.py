"""Virtual time: an event loop whose clock jumps to the next timer instead of waiting.

The program under it is the real one; only the loop differs. With a seed, tasks that could
run at the same moment run in a drawn order, so each seed explores another schedule. When
every task waits and no timer is set, the loop raises `DeadlockError` and names the tasks,
where the real loop would hang.

Under this loop nothing may use threads, sockets or the wall clock; `World(is_real=False)`
sees to that.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Coroutine, Mapping
from typing import TYPE_CHECKING, TypeVar

from asyncflow.core.errors import DeadlockError

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

ResultT = TypeVar("ResultT")

LIMIT_S = 1e9
"""Virtual seconds after which a simulation is taken to be endless."""


class _JumpingSelector(selectors.BaseSelector):
    """Has no files to watch. A wait of t seconds moves the clock by t and returns at once."""

    def __init__(self) -> None:
        self.time_s = 0.0
        self.is_stuck = False

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            self.is_stuck = True
        elif timeout > 0:
            self.time_s += timeout
        return []

    def register(self, fileobj: FileDescriptorLike, events: int, data: object = None) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, events, data)

    def unregister(self, fileobj: FileDescriptorLike) -> selectors.SelectorKey:
        return selectors.SelectorKey(fileobj, 0, 0, None)

    def get_map(self) -> Mapping[FileDescriptorLike, selectors.SelectorKey]:
        return {}


class VirtualLoop(asyncio.SelectorEventLoop):
    """The loop: `time()` is virtual, ready callbacks run in an order drawn from the seed."""

    _ready: deque[asyncio.Handle]  # of asyncio.BaseEventLoop; stable since Python 3.4

    def __init__(self, seed: int | None = None) -> None:
        self._jumping = _JumpingSelector()
        self._shuffle = random.Random(seed) if seed is not None else None  # noqa: S311 - schedules, no secrets
        super().__init__(self._jumping)

    def time(self) -> float:
        """Virtual seconds since the loop began."""
        return self._jumping.time_s

    def _run_once(self) -> None:
        if self._shuffle is not None and len(self._ready) > 1:
            ready = list(self._ready)
            self._shuffle.shuffle(ready)
            self._ready.clear()
            self._ready.extend(ready)
        super()._run_once()  # type: ignore[misc]  # exists in every CPython, absent from the stubs
        if self._jumping.time_s > LIMIT_S:
            raise DeadlockError(f"the simulation passed {LIMIT_S:g} virtual seconds: something retries for ever")
        if self._jumping.is_stuck and not self._ready:
            raise DeadlockError(f"every task waits and no timer is set:\n{_describe(self)}")


def run_virtually(main: Coroutine[None, None, ResultT], *, seed: int | None = None) -> ResultT:
    """Run a coroutine to its end in virtual time. Raises `DeadlockError` instead of hanging.

    Raises `RuntimeError` when the coroutine leaves tasks behind, also when it failed or was
    cancelled: structured code never does.
    """
    loop = VirtualLoop(seed)
    asyncio.set_event_loop(loop)
    task = loop.create_task(main, name="main")
    try:
        return loop.run_until_complete(task)
    finally:
        left = sorted(other.get_name() for other in asyncio.all_tasks(loop)) if task.done() else []
        _cancel_all(loop)
        asyncio.set_event_loop(None)
        loop.close()
        if left:
            raise RuntimeError(f"tasks left running: {left}")


def _cancel_all(loop: VirtualLoop) -> None:
    for _ in range(100):  # a task may start others while it is cancelled
        tasks = asyncio.all_tasks(loop)
        if not tasks:
            break
        for task in sorted(tasks, key=asyncio.Task.get_name):
            task.cancel()
        loop._jumping.is_stuck = False
        try:
            loop.run_until_complete(_settled(tasks))
        except DeadlockError:
            continue


async def _settled(tasks: set[asyncio.Task[object]]) -> None:
    await asyncio.wait(tasks)


def _describe(loop: VirtualLoop) -> str:
    lines = []
    for task in sorted(asyncio.all_tasks(loop), key=asyncio.Task.get_name):
        frames = task.get_stack(limit=1)
        place = f"{frames[-1].f_code.co_qualname}, line {frames[-1].f_lineno}" if frames else "its end"
        lines.append(f"  {task.get_name()} waits in {place}")
    return "\n".join(lines)
