"""Threads for calls that may never return: bounded, abandoned when nobody waits, no burden at the end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from asyncflow.core.threads import DaemonThreads
from asyncflow.core.world import FOREIGN_THREADS, World

STUCK = """
import asyncio, threading
from asyncflow.core.world import World

async def main():
    try:
        async with asyncio.timeout(0.01):
            await World().run_foreign(threading.Event().wait)
    except TimeoutError:
        print("given up")

asyncio.run(main())
"""


async def test_a_call_gives_its_result_or_what_it_raised() -> None:
    threads = DaemonThreads(name="test", max_threads=2)
    assert await threads.run(lambda: 3) == 3
    with pytest.raises(KeyError, match="x"):
        await threads.run(lambda: dict[str, int]()["x"])
    assert await threads.run(lambda: 4) == 4


async def test_calls_run_at_once_in_as_many_threads_as_allowed_and_no_more() -> None:
    """Three wait for each other; of nine more, none needs a fourth thread."""
    threads = DaemonThreads(name="bounded", max_threads=3)
    barrier = threading.Barrier(3)
    async with asyncio.TaskGroup() as group:
        for i in range(3):
            group.create_task(threads.run(lambda: barrier.wait(30)), name=f"call {i}")
    names: set[int] = set()
    async with asyncio.TaskGroup() as group:
        for i in range(9):
            group.create_task(threads.run(lambda: names.add(threading.get_ident())), name=f"call {i}")
    assert 1 <= len(names) <= 3
    assert sum(thread.name == "bounded" for thread in threading.enumerate()) == 3


async def test_one_call_after_another_needs_one_thread() -> None:
    threads = DaemonThreads(name="alone", max_threads=3)
    for _ in range(20):
        await threads.run(lambda: None)
    assert sum(thread.name == "alone" for thread in threading.enumerate()) == 1


async def test_a_call_that_nobody_waits_for_any_more_is_not_begun() -> None:
    threads = DaemonThreads(name="test", max_threads=1)
    release, begun = threading.Event(), list[str]()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(threads.run(lambda: release.wait(30)), name="first")
        second = group.create_task(threads.run(lambda: begun.append("second")), name="second")
        third = group.create_task(threads.run(lambda: begun.append("third")), name="third")
        await asyncio.sleep(0)
        first.cancel()  # abandoned: the thread goes on with it
        second.cancel()
        await asyncio.sleep(0)
        release.set()
        await third
    assert begun == ["third"]


async def test_stuck_foreign_calls_hold_up_no_work_of_ours() -> None:
    world, release = World(), threading.Event()
    async with asyncio.TaskGroup() as group:
        for i in range(FOREIGN_THREADS + 4):
            group.create_task(world.run_foreign(lambda: release.wait(30)), name=f"reward {i}")
        await asyncio.sleep(0)  # until they have begun
        async with asyncio.timeout(10):  # far less than what the stuck calls last
            assert await world.run_blocking(lambda: 5) == 5
        release.set()


async def test_when_work_of_ours_is_cancelled_it_ends_before_its_caller_goes_on() -> None:
    release, done = threading.Event(), list[str]()

    def work() -> None:
        release.wait(30)
        done.append("work")

    async with asyncio.TaskGroup() as group:
        caller = group.create_task(World().run_blocking(work), name="caller")
        for _ in range(2):  # also when somebody is impatient
            await asyncio.sleep(0.01)
            caller.cancel()
        await asyncio.sleep(0.01)
        assert not caller.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert done == ["work"]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
async def test_what_would_end_the_program_is_an_ordinary_error_outside_its_thread(error: BaseException) -> None:
    """Ctrl-C reaches the main thread only, so none of these is meant for whoever awaits the call."""

    def call() -> None:
        raise error

    with pytest.raises(RuntimeError, match=type(error).__name__) as caught:
        await DaemonThreads(name="test", max_threads=1).run(call)
    assert caught.value.__cause__ is error


def test_a_call_that_never_returns_does_not_keep_the_process_from_ending() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "given up\n", "")
