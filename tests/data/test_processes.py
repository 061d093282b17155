"""The transfer queue between processes: who is woken by what, and what is left when one is killed."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.errors import LeaseLostError, QueueError, QueueFullError, QueueLostError, StaleHandleError
from asyncflow.core.types import Ticket
from asyncflow.data.control import ControlPlane
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import Ledger, QueueTask
from asyncflow.data.log import NoLog
from asyncflow.data.messages import AnyReply
from asyncflow.data.queue import TransferQueue
from tests.data.arenas import arenas_open
from tests.data.stores import ThreadServer, thread_server

REPOSITORY = Path(__file__).parents[2]
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert arenas_open() == []


@contextmanager
def worker(queue: TransferQueue, task: str, mode: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.data.queue_worker", queue.address, task, mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        try:
            yield process
        finally:
            process.kill()


def numbers_of(process: subprocess.Popen[str]) -> list[int]:
    """What the worker says it got next."""
    assert process.stdout is not None
    found: list[int] = json.loads(process.stdout.readline())
    return found


class Counting:
    """The replies that a connection receives from now on."""

    def __init__(self, queue: TransferQueue) -> None:
        self.replies: list[AnyReply] = []
        accept = queue._link._accept

        def counted(reply: AnyReply) -> None:
            self.replies.append(reply)
            accept(reply)

        queue._link._accept = counted  # type: ignore[method-assign]


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


# -- parked gets -----------------------------------------------------------------------------


def test_a_parked_get_is_answered_by_the_completing_put_and_by_nothing_else() -> None:
    """One message for the get, one reply to it; the server sets no timer, and others are served meanwhile."""
    with thread_server({"all": ["x", "y"]}) as server, TransferQueue.connect(server.address) as producer:
        timers: list[object] = []
        call_at = server.loop.call_at

        def set_timer(*arguments: object) -> asyncio.TimerHandle:
            timers.append(arguments)
            return call_at(*arguments)  # type: ignore[arg-type]

        server.loop.call_at = set_timer  # type: ignore[assignment, method-assign]
        with TransferQueue.connect(server.address) as consumer:
            counting = Counting(consumer)
            got: list[object] = []
            thread = in_thread(lambda: got.append(consumer.get("all", max_rows=4, at_least=4)))
            while not server.ask(lambda s: len(s.control.leases._takes["all"])):
                time.sleep(0.001)
            rows = producer.put({"x": np.arange(4)})
            for place in range(3):
                producer.write(rows[place : place + 1], {"y": np.array([place])})
            assert counting.replies == []  # three of four: it sleeps
            assert producer.counts().pending == 4  # and delays nobody
            producer.write(rows[3:], {"y": np.array([3])})
            thread.join(10)
            assert [type(reply).__name__ for reply in counting.replies] == ["ArenaIs", "Given"]
            assert len(got) == 1
            assert timers == []


def test_a_get_that_ran_out_of_time_takes_nothing_and_one_that_is_served_at_once_is() -> None:
    with thread_server({"task": ["x"]}) as server, TransferQueue.connect(server.address) as queue:
        with pytest.raises(TimeoutError):
            queue.get("task", timeout_s=0.01)
        queue.put({"x": np.arange(3)})
        batch = queue.get("task", max_rows=9, timeout_s=0)
        assert batch is not None
        assert len(batch) == 3
        assert server.ask(lambda s: [len(c._parked) + len(c._rooms) for c in s._clients]) == [0]


def test_a_get_granted_when_its_time_ran_out_is_not_lost() -> None:
    """The put and the cancellation cross: the rows come with the get, or stay for the next; never neither."""
    with thread_server({"task": ["x"]}) as server:
        with TransferQueue.connect(server.address) as producer, TransferQueue.connect(server.address) as consumer:
            seen: list[int] = []
            thread = in_thread(lambda: [producer.put({"x": np.array([n])}) for n in range(300)])
            while len(seen) < 300:
                try:
                    batch = consumer.get("task", max_rows=1, timeout_s=0.0002)
                except TimeoutError:
                    continue
                assert batch is not None
                seen += batch["x"].values.tolist()
                consumer.acknowledge(batch)
            thread.join(10)
        assert seen == list(range(300))
        assert server.ask(lambda s: s.control.ledger.num_ready("task")) == 0


# -- many at once ----------------------------------------------------------------------------


def test_workers_in_threads_get_disjoint_rows_of_many_producers() -> None:
    with thread_server({"one": ["x", "y"], "other": ["x"]}) as server:
        found: dict[str, list[int]] = {"one": [], "other": []}
        failures: list[BaseException] = []

        def produce(first: int) -> None:
            with TransferQueue.connect(server.address) as queue:
                for start in range(first, first + 600, 6):
                    rows = queue.put({"x": np.arange(start, start + 6)})
                    queue.write(rows[::-1], {"y": np.arange(start, start + 6)[::-1] * 2})
                producing.wait()

        def consume(task: str) -> None:
            with TransferQueue.connect(server.address) as queue:
                while (batch := queue.get(task, max_rows=7)) is not None:
                    values = batch["x"].values.tolist()
                    if task == "one" and batch["y"].values.tolist() != [2 * n for n in values]:
                        failures.append(AssertionError(batch))
                    found[task] += values
                    queue.acknowledge(batch)

        producing = threading.Barrier(4)
        threads = [in_thread(lambda first=n: produce(600 * first)) for n in range(3)]  # type: ignore[misc]
        threads += [in_thread(lambda task=task: consume(task)) for task in ("one", "one", "one", "other", "other")]  # type: ignore[misc]
        with TransferQueue.connect(server.address) as queue:
            producing.wait(60)
            queue.finish()
        for thread in threads:
            thread.join(60)
        assert not failures
        assert sorted(found["one"]) == sorted(found["other"]) == list(range(1800))
        assert server.ask(lambda s: (s.control.num_blocks, s.control.counts().trained)) == (0, 1800)


@slow
def test_worker_processes_get_disjoint_rows() -> None:
    with TransferQueue.start({"task": ["ids"]}) as queue:
        with worker(queue, "task", "drain") as one, worker(queue, "task", "drain") as two:
            for start in range(0, 700, 7):
                queue.put_soon({"ids": np.arange(start, start + 7)})
            queue.finish()
            lines = [process.communicate(timeout=60)[0].splitlines() for process in (one, two)]
        found = [n for part in lines for line in part for n in json.loads(line)]
        assert sorted(found) == list(range(700))
        assert queue.counts().trained == 700


# -- who is killed ---------------------------------------------------------------------------


@slow
def test_rows_of_a_killed_consumer_are_delivered_again_and_its_own_rows_stay() -> None:
    with TransferQueue.start({"task": ["ids"]}) as queue:
        with worker(queue, "task", "hold") as process:
            assert numbers_of(process) == [-1, -2]
            queue.put({"ids": np.arange(3)})
            rest = queue.get("task", max_rows=9)
            assert rest is not None
            assert rest["ids"].values.tolist() == [0, 1, 2]
            process.kill()
            process.wait()
            again = queue.get("task", max_rows=9)
            assert again is not None
            assert again["ids"].values.tolist() == [-1, -2]  # in the dead process's memory
        queue.acknowledge(again)
        queue.acknowledge(rest)
        assert queue.counts().pending == 0
        assert len(arenas_open(queue.server_pid)) == 2  # of this process; of the dead one no longer


@slow
def test_a_killed_server_is_a_clear_error_in_seconds_for_everybody() -> None:
    with TransferQueue.start({"task": ["ids"]}) as queue, TransferQueue.connect(queue.address) as other:
        queue.put({"ids": np.arange(3)})
        failures: list[BaseException] = []

        def wait() -> None:
            try:
                other.get("task", at_least=9, max_rows=9)
            except QueueLostError as error:
                failures.append(error)

        thread = in_thread(wait)
        while Path(f"/proc/{other.server_pid}/stat").read_text().split()[2] != "S":
            time.sleep(0.001)
        os.kill(queue.server_pid, signal.SIGKILL)
        thread.join(10)
        assert "has ended" in str(failures[0])
        for call in (queue.counts, lambda: queue.put({"ids": np.arange(3)}), lambda: queue.get("task")):
            with pytest.raises(QueueLostError, match="has ended"):
                call()
        with pytest.raises(QueueLostError, match=r"[Hh]as (it )?ended"):
            TransferQueue.connect(queue.address)


@slow
def test_a_stopped_server_is_a_clear_error_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asyncflow.data.connection.PATIENCE_S", 0.2)
    with TransferQueue.start({"task": ["ids"]}) as queue:
        os.kill(queue.server_pid, signal.SIGSTOP)
        try:
            for call in (queue.counts, lambda: queue.get("task")):
                with pytest.raises(QueueLostError, match=f"process {queue.server_pid}.*not answered"):
                    call()
        finally:
            os.kill(queue.server_pid, signal.SIGCONT)


TREE = """
import os, signal, sys
import numpy as np
from asyncflow.data.queue import TransferQueue
queue = TransferQueue.start({"task": ["ids"]})
queue.put({"ids": np.arange(1 << 20)})
if os.fork() == 0:
    with TransferQueue.connect(queue.address) as mine:
        mine.put({"ids": np.arange(1 << 20)})
        batch = mine.get("task", max_rows=1)
        print("ready", queue.server_pid, os.getpid(), flush=True)
        signal.pause()
signal.pause()
"""


def memory_of_arenas() -> list[str]:
    """The processes on this machine that hold an arena."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                found += [entry.name] if arenas_open(int(entry.name)) else []
            except OSError:
                continue
    return found


@slow
def test_a_killed_tree_of_processes_leaves_no_memory_behind() -> None:
    before = memory_of_arenas()
    with subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as owner:
        assert owner.stdout is not None
        line = owner.stdout.readline().split()
        assert line[:1] == ["ready"]
        server, child = map(int, line[1:])
        tree = {str(owner.pid), str(server), str(child)}
        assert tree <= {*memory_of_arenas()}
        os.kill(child, signal.SIGKILL)
        owner.kill()
    fd = os.pidfd_open(server) if Path(f"/proc/{server}").exists() else None
    if fd is not None:  # the server ends by itself: its owner's end is closed
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        assert poll.poll(10_000)
        os.close(fd)
    assert not tree & {*memory_of_arenas()}
    assert {*memory_of_arenas()} <= {*before}


# -- back-pressure ---------------------------------------------------------------------------


def test_a_full_queue_blocks_the_producer_and_resumes_when_rows_are_acknowledged() -> None:
    with thread_server({"task": ["x"]}) as server, TransferQueue.connect(server.address) as consumer:
        producer = TransferQueue.connect(server.address, arena_bytes=1 << 16)
        with producer:
            row = np.zeros((1, 1 << 12))  # 32 KiB: one fits, with its header not two
            producer.put({"x": row})
            with pytest.raises(QueueFullError, match=r"no room for 32,768 bytes in 0 s: 32,704 of 65,536 are free"):
                producer.put({"x": row}, timeout_s=0)
            thread = in_thread(lambda: producer.put({"x": row + 1}))
            while not server.ask(lambda s: sum(len(client._rooms) for client in s._clients)):
                time.sleep(0.001)
            assert thread.is_alive()
            first = consumer.get("task")
            assert first is not None
            assert first["x"].values.max() == 0
            consumer.acknowledge(first)
            thread.join(10)
            second = consumer.get("task")
            assert second is not None
            assert second["x"].values.min() == 1
            consumer.acknowledge(second)
            with pytest.raises(QueueFullError, match="more than the whole arena"):
                producer.put({"x": np.zeros((3, 1 << 12))})
            producer.put({"x": row})


# -- generations and restarts ----------------------------------------------------------------


@slow
def test_7_nothing_is_lost_or_repeated_when_a_logged_server_is_killed_and_started_again(tmp_path: Path) -> None:
    """Killed three times while rows go through; also between a put and its other column."""
    acknowledged: list[int] = []
    handle = None
    for life in range(4):
        with TransferQueue.start({"task": ["x", "y"]}, log=tmp_path / "log") as queue:
            if handle is not None:
                with pytest.raises(StaleHandleError, match="another queue"):
                    queue.fetch(handle, ["x"])
            rows = queue.put({"x": np.arange(10 * life, 10 * life + 10)})
            queue.write(rows[:8], {"y": np.arange(8.0) + 10 * life})
            handle = rows
            done = queue.get("task", max_rows=3)
            held = queue.get("task", max_rows=2)
            assert done is not None
            assert held is not None
            assert done["y"].values.tolist() == done["x"].values.tolist()
            queue.acknowledge(done)
            acknowledged += done.rows.tickets.tolist()
            os.kill(queue.server_pid, signal.SIGKILL)
    with TransferQueue.start({"task": ["x", "y"]}, log=tmp_path / "log") as queue:
        rest = queue.get("task", max_rows=99)
        assert rest is not None
        assert rest["x"].values.tolist() == rest["y"].values.tolist() == rest.rows.tickets.tolist()
        whole = {10 * life + n for life in range(4) for n in range(8)}
        assert sorted(acknowledged + rest.rows.tickets.tolist()) == sorted(whole)
        queue.acknowledge(rest)
        assert (queue.counts().trained, queue.counts().pending) == (32, 8)


def test_a_gate_is_kept_between_processes() -> None:
    """Reserved tickets of a producer that ends are issued again."""
    gate = Gate(groups_per_step=2, max_staleness=0, steps=9)
    tasks = [QueueTask(name="train", needs=("x",), trains=True)]
    server = ThreadServer(lambda: ControlPlane(Ledger(tasks, gate), NoLog()))
    with TransferQueue.connect(server.address) as queue:
        assert queue.reserve(timeout_s=0) is None
        queue.advance(0)
        with TransferQueue.connect(server.address) as doomed:
            assert doomed.reserve() == 0
        assert [queue.reserve(), queue.reserve()] == [0, 1]
        assert queue.reserve(timeout_s=0.01) is None
        with pytest.raises(QueueError, match="reserve a ticket"):
            queue.put({"x": np.arange(3)})
        for ticket in (1, 0):
            queue.put({"x": np.arange(3) + ticket}, ticket=Ticket(ticket))
        batch = queue.get("train", max_rows=6, at_least=6, group_size=3)
        assert batch is not None
        assert batch["x"].values.tolist() == [0, 1, 2, 1, 2, 3]
        queue.acknowledge(batch, step=1)
        queue.advance(1)
        assert queue.reserve() == 2
        with pytest.raises(LeaseLostError):
            queue.acknowledge(batch, step=1)
    server.close()
