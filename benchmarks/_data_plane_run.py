"""One arm of `data_plane.py`: a server, a producer and a consumer, each a process.

    PYTHON benchmarks/_data_plane_run.py ARM JOBS OPTIONS

Prints one line of JSON, a list with an object for each job. Needs numpy and what the arm needs.

Producer and consumer connect, make their rows from the seed and move some to warm up; then both
begin at once, and the clock runs from the first put to the check of the last row. Times of the
two are compared on the monotonic clock, which processes share.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol, TypeAlias, cast

import numpy as np
from _data_plane_work import Batch, Checker, Job, Rows, cut, make_rows, num_bytes

Result: TypeAlias = dict[str, float]
Options: TypeAlias = Mapping[str, str]
TIME_LIMIT_S = 300.0


class Producer(Protocol):
    """Puts rows."""

    def put(self, rows: Rows) -> None:
        """Hand them over; may return before they have arrived."""

    def flush(self) -> None:
        """Wait until all have arrived."""


class Consumer(Protocol):
    """Gets rows."""

    def get(self, num_rows: int) -> Batch:
        """Wait for so many rows. What it returns is only valid until the next call."""

    def clear(self) -> None:
        """Let go of what the last get returned: between the rounds of D, outside of the clock."""


class Arm(Protocol):
    """A system under test: a module `_data_plane_ARM` has these functions."""

    def serve(self, options: Options) -> AbstractContextManager[object]:
        """Start it; yields what processes connect with."""

    def open_producer(self, address: object, job: Job) -> AbstractContextManager[Producer]:
        """Connect."""

    def open_consumer(self, address: object, job: Job) -> AbstractContextManager[Consumer]:
        """Connect."""


def load(arm: str) -> Arm:
    """The arm's module."""
    return cast("Arm", importlib.import_module(f"_data_plane_{arm}"))


# -- the two processes -------------------------------------------------------------------------


def produce(arm: str, address: object, jobs: list[Job], pipe: Connection) -> None:
    """All jobs, one after the other."""
    for job in jobs:
        with load(arm).open_producer(address, job) as producer:
            batches = cut(make_rows(job), job.put_rows if job.workload != "W" else job.get_rows)
            work = {"W": produce_parked, "D": produce_dense}.get(job.workload, produce_stream)
            work(producer, batches, job, pipe)


def consume(arm: str, address: object, jobs: list[Job], pipe: Connection) -> None:
    """All jobs, one after the other."""
    for job in jobs:
        checker = Checker(job)
        with load(arm).open_consumer(address, job) as consumer:
            work = {"W": consume_parked, "D": consume_dense}.get(job.workload, consume_stream)
            work(consumer, checker, job, pipe)


def produce_stream(producer: Producer, batches: list[Rows], job: Job, pipe: Connection) -> None:
    """M, T and S."""
    for batch in itertools.islice(itertools.cycle(batches), job.warm_rows // job.put_rows):
        producer.put(batch)
    producer.flush()
    meet(pipe)
    put_ns, begin_ns = [], time.monotonic_ns()
    before_ns = begin_ns
    for _ in range(job.passes):
        for batch in batches:
            producer.put(batch)
            now_ns = time.monotonic_ns()
            put_ns.append(now_ns - before_ns)
            before_ns = now_ns
    producer.flush()
    pipe.send({"begin_ns": begin_ns, **quantiles("put", put_ns)})
    pipe.recv()


def consume_stream(consumer: Consumer, checker: Checker, job: Job, pipe: Connection) -> None:
    """M, T and S."""
    left = job.warm_rows
    while left:
        left -= checker.check(consumer.get(min(left, job.get_rows)))
    checker.reset()
    meet(pipe)
    get_ns, left = [], job.total_rows
    while left:
        before_ns = time.monotonic_ns()
        batch = consumer.get(min(left, job.get_rows))
        get_ns.append(time.monotonic_ns() - before_ns)
        left -= checker.check(batch)
    end_ns = time.monotonic_ns()
    checker.finish()
    pipe.send({"end_ns": end_ns, **quantiles("get", get_ns)})
    pipe.recv()


def produce_dense(producer: Producer, batches: list[Rows], job: Job, pipe: Connection) -> None:
    """D: TransferQueue's own benchmark puts one batch, and gets it when it is there."""
    rows: Rows = {name: np.concatenate([batch[name] for batch in batches]) for name in job.columns}
    for _ in range(job.passes):
        meet(pipe)
        before_ns = time.monotonic_ns()
        producer.put(rows)
        producer.flush()
        pipe.send({"put_ns": time.monotonic_ns() - before_ns})
        pipe.recv()


def consume_dense(consumer: Consumer, checker: Checker, job: Job, pipe: Connection) -> None:
    """D. The check comes after the clock, as they have none; `read_ns` has it."""
    for _ in range(job.passes):
        meet(pipe)
        pipe.recv()  # it was put
        before_ns = time.monotonic_ns()
        batch = consumer.get(job.rows)
        got_ns = time.monotonic_ns()
        checker.check(batch)
        checked_ns = time.monotonic_ns()
        del batch
        consumer.clear()
        pipe.send({"get_ns": got_ns - before_ns, "read_ns": checked_ns - before_ns})
    checker.finish()


def produce_parked(producer: Producer, batches: list[Rows], job: Job, pipe: Connection) -> None:
    """W: wait until the consumer waits, then put the batch that it waits for."""
    chance = random.Random(job.seed)  # noqa: S311 - not for secrets
    for _ in range(job.passes):
        for batch in batches:
            wait_s = meet(pipe)
            time.sleep(wait_s * chance.uniform(1, 3))  # over all of the second after which a loader asks again
            before_ns = time.monotonic_ns()
            producer.put(batch)
            producer.flush()
            pipe.send({"before_ns": before_ns})


def consume_parked(consumer: Consumer, checker: Checker, job: Job, pipe: Connection) -> None:
    """W."""
    for _ in range(job.total_rows // job.get_rows):
        meet(pipe)
        batch = consumer.get(job.get_rows)
        pipe.send({"after_ns": time.monotonic_ns()})
        checker.check(batch)
    checker.finish()


def meet(pipe: Connection) -> float:
    """Say that this side is ready, and go on when both are."""
    pipe.send({"ready": 1})
    return float(pipe.recv())


def quantiles(name: str, times_ns: list[int]) -> Result:
    """In milliseconds."""
    low, high = np.percentile(np.array(times_ns) / 1e6, (50, 99))
    return {f"{name}_p50_ms": float(low), f"{name}_p99_ms": float(high)}


# -- the process that starts both --------------------------------------------------------------


class Pair:
    """Producer and consumer, seen from the process that started them."""

    def __init__(self, pipes: tuple[Connection, Connection]) -> None:
        self._pipes = pipes

    def read(self, side: int) -> Result:
        """What the producer (0) or consumer (1) says next."""
        if not self._pipes[side].poll(TIME_LIMIT_S):
            raise TimeoutError(f"the {('producer', 'consumer')[side]} said nothing for {TIME_LIMIT_S:g} s")
        return cast("Result", self._pipes[side].recv())

    def tell(self, side: int, value: float = 0.0) -> None:
        """Let it go on."""
        self._pipes[side].send(value)

    def start_both(self) -> None:
        """When both are ready; the consumer first, so that nobody's first put waits for it."""
        self.read(1)
        self.read(0)
        self.tell(1)
        self.tell(0)

    def stream(self, job: Job) -> Result:
        """Measure M, T or S."""
        self.read(1)
        self.read(0)
        cpu_s = tree_cpu_s(os.getpid())
        self.tell(1)
        self.tell(0)
        consumed, produced = self.read(1), self.read(0)
        cpu_s = tree_cpu_s(os.getpid()) - cpu_s
        self.tell(1)
        self.tell(0)
        seconds = (consumed.pop("end_ns") - produced.pop("begin_ns")) / 1e9
        total_bytes = num_bytes(make_rows(job)) * job.passes
        rates = {"rows_per_s": job.total_rows / seconds, "mb_per_s": total_bytes / seconds / 1e6}
        return {**rates, "seconds": seconds, "cpu_us_per_row": cpu_s / job.total_rows * 1e6, **produced, **consumed}

    def dense(self, job: Job) -> Result:
        """Measure D, without its first round, which warms up."""
        rounds: list[Result] = []
        for _ in range(job.passes):
            self.start_both()
            produced = self.read(0)
            self.tell(1)
            rounds.append(produced | self.read(1))
            self.tell(0)
        gigabytes = num_bytes(make_rows(job)) / 2**30
        means = {key: float(np.median([one[key] for one in rounds[1:]])) / 1e9 for key in rounds[0]}
        return {
            "gb_per_s": 2 * gigabytes / (means["put_ns"] + means["get_ns"]),
            "gb_per_s_read": 2 * gigabytes / (means["put_ns"] + means["read_ns"]),
            "put_gb_per_s": gigabytes / means["put_ns"],
            "get_gb_per_s": gigabytes / means["get_ns"],
        }

    def parked(self, job: Job, wait_s: float) -> Result:
        """Measure W."""
        latencies: list[float] = []
        for _ in range(job.total_rows // job.get_rows):
            self.read(1)
            self.read(0)
            self.tell(1)
            self.tell(0, wait_s)
            after, before = self.read(1), self.read(0)
            latencies.append((after["after_ns"] - before["before_ns"]) / 1e6)
        low, high = np.percentile(latencies, (50, 99))
        return {"wake_p50_ms": float(low), "wake_p99_ms": float(high), "samples": len(latencies)}


def tree_cpu_s(root: int) -> float:
    """User and system time of a process and all below it, those that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    tree, size = {root}, 0
    while len(tree) > size:
        size = len(tree)
        tree |= {process for process, parent in parents.items() if parent in tree}
    return sum(ticks[process] for process in tree) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def start(arm: str, address: object, jobs: list[Job]) -> Iterator[Pair]:
    """Both processes, which have ended at the end."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    works: tuple[Callable[[str, object, list[Job], Connection], None], ...] = (produce, consume)
    for work in works:
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(arm, address, jobs, theirs), name=work.__name__)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Pair((pipes[0], pipes[1]))
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
            process.join()


def run(arm: str, jobs: list[Job], options: Options) -> list[Result]:
    """All jobs on one server."""
    results: list[Result] = []
    with load(arm).serve(options) as address, start(arm, address, jobs) as pair:
        for job in jobs:
            if job.workload == "W":
                results.append(pair.parked(job, float(options.get("wait_s", "0.002"))))
            else:
                results.append(pair.dense(job) if job.workload == "D" else pair.stream(job))
    return results


if __name__ == "__main__":
    found = run(sys.argv[1], [Job(**job) for job in json.loads(sys.argv[2])], json.loads(sys.argv[3]))
    print("\n" + json.dumps(found), flush=True)
