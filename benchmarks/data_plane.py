"""The transfer queue against what else could carry rows between processes.

    python -m venv peers && peers/bin/pip install torch==2.13.0 TransferQueue==0.1.11 ray
    python benchmarks/data_plane.py [--json FILE] [--quick] [--peers peers/bin/python] [--folder FOLDER]

Each arm runs in processes of its own (`_data_plane_run.py`): a server, a producer and a consumer,
with arms taking turns in every round. All begin with the same rows, lists of numpy arrays made from a seed,
packing them is part of a put, and the consumer checks every row's sum. The clock runs from the first put to
the last check, after a warm-up. Peers are at their best settings (the modules `_data_plane_ARM`
say which), without a peer's package its figures are missing, not guessed.

Workloads, one producer and one consumer at once unless said otherwise:

- **M**: 4,096 rows: prompt and response of 64 to 1,024 int64 ids, a float32 log-probability for each id of the
  response, one reward; put 32, get 32.
- **T**: 50,000 rows of 16 ids, put 32, get 32.
- **S**: as M, but put one row at a time, as rollouts finish; get 32.
  *In one partition* is T as a user of TransferQueue would first write it; it is at its best with a partition for
  each 1,024 rows, which is what its other rows are. The goal of T is against one partition.
- **D**: TransferQueue's own throughput benchmark at its setting `Small`, one dense batch of 0.28 GiB put, and
  then got: twice its size over the time of both. The rows are checked after the clock, as
  they aren't there at all; with that reading inside of the clock is another row.
- **W**: a consumer waits, and a producer puts the batch for which it waits: from before the put to the
  return of the get. TransferQueue's consumer is its streaming loader.

Processor time is that of an arm's whole process tree. Latencies of `multiprocessing.Queue` are those of its
calls; its own thread sends what was put.

Then, for asyncflow alone: what a put and a get cost by how many rows wait in the queue; and M with the durable
log synced before an answer, against M without in the same round and against the disk, which is written in the
same folder with the same number of bytes, the better of buffered and direct writes.

`--quick` does less of each, all workloads of a peer on one server, with one storage unit for D as well.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from _data_plane_limits import copied_rows_per_s, disk_mb_per_s
from _data_plane_run import Result
from _data_plane_work import Job, make_rows, num_bytes
from report import Goal, Row, print_table, row, write_json

OURS, PIPE, RAY, PEER = "asyncflow", "mp", "ray", "transferqueue"
ARMS: Mapping[str, tuple[str, str]] = {
    OURS: ("asyncflow", "asyncflow"),
    PEER: ("TransferQueue", "transfer_queue"),
    RAY: ("Ray", "ray"),
    PIPE: ("multiprocessing.Queue", "multiprocessing"),
}
"""The name that is printed, and the package that an interpreter must have."""
TIME_LIMIT_S = 900
STREAM_UNITS = {
    "rows_per_s": "rows/s",
    "mb_per_s": "MB/s",
    "cpu_us_per_row": "µs of processor a row",
    "put_p50_ms": "put p50, ms",
    "put_p99_ms": "put p99, ms",
    "get_p50_ms": "get p50, ms",
    "get_p99_ms": "get p99, ms",
}
ONE_PARTITION = Job(workload="T", rows=50_000, in_one_partition=True)
UNITS: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("M", "T", ONE_PARTITION.label, "S"), STREAM_UNITS),
    "D": {
        "gb_per_s": "GiB/s",
        "gb_per_s_read": "GiB/s, with reading",
        "put_gb_per_s": "put, GiB/s",
        "get_gb_per_s": "get, GiB/s",
    },
    "W": {"wake_p50_ms": "p50, ms", "wake_p99_ms": "p99, ms"},
}
LEVELS = (1_000, 10_000, 100_000, 1_000_000)

Found = dict[tuple[str, str], list[Result]]
"""For each arm and workload, what each round measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much work. `jobs` has those of the fast arms, then of Ray, then of TransferQueue."""

    rounds: int
    jobs: tuple[tuple[Job, ...], tuple[Job, ...], tuple[Job, ...]]
    flat_blocks: int
    log_rounds: int
    log_s: float
    copy_passes: int

    def jobs_of(self, arm: str) -> tuple[Job, ...]:
        """Those of an arm: as many rows as take a time worth measuring."""
        return self.jobs[{RAY: 1, PEER: 2}.get(arm, 0)]


def make_jobs(*, mixed: Job, tiny: Job, single: Job, dense_rounds: int, waits: int) -> tuple[Job, ...]:
    """The five workloads."""
    dense = Job(workload="D", rows=1024, passes=dense_rounds)
    return mixed, tiny, replace(single, put_rows=1), dense, Job(workload="W", rows=32 * waits)


def job(workload: str, rows: int, passes: int = 1) -> Job:
    """A stream."""
    return Job(workload=workload, rows=rows, passes=passes)


FULL = Scale(
    rounds=3,
    jobs=(
        make_jobs(
            mixed=job("M", 4096, 15), tiny=job("T", 50_000, 5), single=job("S", 4096, 4), dense_rounds=4, waits=300
        ),
        make_jobs(mixed=job("M", 4096), tiny=job("T", 50_000), single=job("S", 2048), dense_rounds=4, waits=300),
        (
            *make_jobs(mixed=job("M", 4096), tiny=job("T", 50_000), single=job("S", 2048), dense_rounds=4, waits=12),
            ONE_PARTITION,
        ),
    ),
    flat_blocks=40,
    log_rounds=2,
    log_s=12.0,
    copy_passes=10,
)
QUICK = Scale(
    rounds=1,
    jobs=(
        make_jobs(mixed=job("M", 4096, 3), tiny=job("T", 50_000), single=job("S", 4096), dense_rounds=2, waits=200),
        make_jobs(mixed=job("M", 1024), tiny=job("T", 3200), single=job("S", 320), dense_rounds=2, waits=50),
        (
            *make_jobs(mixed=job("M", 1024), tiny=job("T", 1600), single=job("S", 96), dense_rounds=2, waits=3),
            replace(ONE_PARTITION, rows=1600),
        ),
    ),
    flat_blocks=8,
    log_rounds=1,
    log_s=1.0,
    copy_passes=3,
)


# -- running arms ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Bench:
    """The interpreters, by arm; only of those that can be run."""

    pythons: Mapping[str, str]

    def run(self, arm: str, jobs: Iterable[Job], options: Mapping[str, str]) -> list[Result]:
        """One process tree."""
        runner = Path(__file__).with_name("_data_plane_run.py")
        work = json.dumps([asdict(job) for job in jobs])
        command = [self.pythons[arm], str(runner), arm, work, json.dumps(dict(options))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"the arm {arm} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        results: list[Result] = json.loads(done.stdout.rstrip().rpartition("\n")[2])
        return results

    def run_jobs(self, arm: str, jobs: tuple[Job, ...], *, at_once: bool) -> list[Result]:
        """All jobs, on one server if it takes seconds to start and time is short."""
        if arm in (RAY, PEER) and at_once:
            return self.run(arm, jobs, options_of(arm, jobs[0]))
        return [result for job in jobs for result in self.run(arm, [job], options_of(arm, job))]


def options_of(arm: str, job: Job) -> dict[str, str]:
    """What the arm's server should know. A loader that polls is woken at any point of its second."""
    options = {"workload": job.workload, "wait_s": "0.5" if arm == PEER else "0.002"}
    return options | ({"units": "4"} if arm == PEER and job.workload == "D" else {})


def find_pythons(peers: str | None, wanted: Iterable[str]) -> dict[str, str]:
    """For each arm an interpreter that has its package: this one, or that of the peers."""
    pythons: dict[str, str] = {}
    for arm in wanted:
        candidates = [sys.executable] if arm == OURS else [python for python in (sys.executable, peers) if python]
        for python in candidates:
            check = f"import importlib.util as u, sys; sys.exit(u.find_spec({ARMS[arm][1]!r}) is None)"
            if subprocess.run([python, "-c", check], check=False).returncode == 0:
                pythons[arm] = python
                break
    return pythons


def version_of(arm: str, python: str) -> str:
    """What is printed for an arm that runs."""
    name = ARMS[arm][0]
    if arm in (OURS, PIPE):
        return name
    code = f"from importlib.metadata import version; print(version({name.lower()!r}))"
    return f"{name} {subprocess.run([python, '-c', code], capture_output=True, text=True, check=True).stdout.strip()}"


def measure(bench: Bench, scale: Scale) -> Found:
    """All arms take turns, in an order that turns round."""
    found: Found = defaultdict(list)
    arms = [arm for arm in ARMS if arm in bench.pythons]
    for turn in range(scale.rounds):
        order = arms if turn % 2 == 0 else arms[::-1]
        if scale.rounds == 1:
            turns = [(arm, scale.jobs_of(arm)) for arm in order]
        else:  # workload by workload, so that those compared lie close together
            turns = [
                (arm, (scale.jobs_of(arm)[i],))
                for i in range(len(UNITS))
                for arm in order
                if i < len(scale.jobs_of(arm))
            ]
        for arm, jobs in turns:
            for job, result in zip(jobs, bench.run_jobs(arm, jobs, at_once=scale.rounds == 1), strict=True):
                found[arm, job.label].append(result)
    return found


# -- rows --------------------------------------------------------------------------------------


def arm_rows(found: Found, names: Mapping[str, str]) -> Iterator[Row]:
    """Every figure of every arm."""
    for workload, units in UNITS.items():
        for arm, (name, _) in ARMS.items():
            results = found.get((arm, workload), [])
            if workload == ONE_PARTITION.label and arm != PEER:
                continue
            if arm not in names:
                yield Row(name=f"{workload}, {name}", value=math.nan, unit="", spread="not installed")
                continue
            for key, unit in units.items() if results else ():
                goal = GOALS.get((arm, workload, key))
                yield row(f"{workload}, {names[arm]}", [result[key] for result in results], unit, goal)


def ratio_rows(found: Found, names: Mapping[str, str]) -> Iterator[Row]:
    """What is compared within a round."""
    for workload, other, key, goal in RATIOS:
        ours, theirs = found.get((OURS, workload), []), found.get((other, workload), [])
        if ours and theirs:
            ratios = [one[key] / two[key] for one, two in zip(ours, theirs, strict=True)]
            note = ", with reading" if key.endswith("_read") else ""
            yield row(f"{workload}, asyncflow to {names[other]}{note}", ratios, "ratio", goal)
    ours, theirs = found.get((OURS, "T"), []), found.get((PEER, ONE_PARTITION.label), [])
    if ours and theirs:
        ratios = [one["rows_per_s"] / two["rows_per_s"] for one, two in zip(ours, theirs, strict=True)]
        name = f"{ONE_PARTITION.label}, asyncflow to {names[PEER]}"
        yield row(name, ratios, "ratio", Goal(">=", 100.0))


GOALS = {(OURS, "S", "rows_per_s"): Goal(">=", 10_000.0), (OURS, "W", "wake_p50_ms"): Goal("<", 1.0)}
RATIOS = (
    ("M", PEER, "rows_per_s", Goal(">=", 50.0)),
    ("M", RAY, "rows_per_s", None),
    ("M", PIPE, "rows_per_s", Goal(">", 1.0)),
    ("T", PEER, "rows_per_s", None),
    ("T", RAY, "rows_per_s", None),
    ("T", PIPE, "rows_per_s", None),
    ("S", PEER, "rows_per_s", Goal(">=", 65.0)),
    ("S", RAY, "rows_per_s", None),
    ("S", PIPE, "rows_per_s", None),
    ("D", PEER, "gb_per_s", Goal(">=", 3.0)),
    ("D", PEER, "gb_per_s_read", None),
    ("D", RAY, "gb_per_s", None),
)


# -- asyncflow alone ---------------------------------------------------------------------------


def copy_rows(found: Found, scale: Scale) -> Iterator[Row]:
    """How far M is from copying."""
    limit = copied_rows_per_s(Job(workload="M", rows=4096, passes=scale.copy_passes))
    yield row("M, limit: concatenating 32 rows into shared memory, one process", [limit], "rows/s")
    ours = found.get((OURS, "M"), [])
    if ours:
        yield row("M, asyncflow to that limit", [one["rows_per_s"] / limit for one in ours], "ratio")


def flat_rows(scale: Scale) -> Iterator[Row]:
    """Cost by the number of rows that wait."""
    from _data_plane_flat import measure as measure_flat  # it starts asyncflow's queue

    costs = measure_flat(LEVELS, scale.flat_blocks)
    for name in ("put", "get"):
        for level, cost in costs.items():
            yield row(f"{name} of 32 rows while {level:,} wait", [cost[name]], "µs")
        ratio = costs[LEVELS[-1]][name] / costs[LEVELS[0]][name]
        yield row(f"{name}: {LEVELS[-1]:,} waiting to {LEVELS[0]:,}", [ratio], "ratio", Goal("<=", 1.3))


def log_rows(bench: Bench, scale: Scale, folder: Path) -> Iterator[Row]:
    """M with the log, without it, and the disk, in turns."""
    one_pass = Job(workload="M", rows=4096)
    row_mb = num_bytes(make_rows(one_pass)) / one_pass.rows / 1e6
    rates: dict[str, list[float]] = defaultdict(list)

    def logged(passes: int) -> Result:
        with tempfile.TemporaryDirectory(dir=folder) as log:
            return bench.run(
                OURS, [replace(one_pass, passes=passes)], {"workload": "M", "log": str(Path(log) / "log")}
            )[0]

    rate = logged(8)["rows_per_s"]
    for _ in range(scale.log_rounds):
        passes = max(1, math.ceil(scale.log_s * rate / one_pass.rows))
        free = bench.run(OURS, [replace(one_pass, passes=passes)], {"workload": "M"})[0]
        result = logged(passes)
        rate = result["rows_per_s"]
        with tempfile.TemporaryDirectory(dir=folder) as place:
            disk = disk_mb_per_s(Path(place), int(passes * one_pass.rows * row_mb * 1e6))
        limit = min(free["rows_per_s"], max(disk.values()) / row_mb)
        figures = {"free": free["rows_per_s"], "logged": rate, "seconds": result["seconds"]}
        for name, value in (figures | disk | {"limit": limit, "ratio": rate / limit}).items():
            rates[name].append(value)
    yield row("log: M without it", rates["free"], "rows/s")
    yield row("log: M with it, synced", rates["logged"], "rows/s")
    yield row("log: time measured", rates["seconds"], "s")
    yield row("log: disk, buffered and synced at the end", rates["buffered"], "MB/s")
    yield row("log: disk, direct", rates["direct"], "MB/s")
    yield row("log: less of M without it and the disk", rates["limit"], "rows/s")
    yield row("log: M with it to that", rates["ratio"], "ratio", Goal(">=", 0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    parser.add_argument("--quick", action="store_true", help="the same rows on less work, in under a minute")
    parser.add_argument("--peers", metavar="PYTHON", help="an interpreter that has TransferQueue and Ray")
    parser.add_argument(
        "--folder", type=Path, default=Path("bench-results"), help="where the log and the disk are tried"
    )
    parser.add_argument("--arms", default=",".join(ARMS), help="only some of %(default)s")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    bench = Bench(find_pythons(options.peers, options.arms.split(",")))
    names = {arm: version_of(arm, python) for arm, python in bench.pythons.items()}
    found = measure(bench, scale)
    rows = [*arm_rows(found, names), *ratio_rows(found, names), *copy_rows(found, scale)]
    if OURS in bench.pythons:
        options.folder.mkdir(parents=True, exist_ok=True)
        rows += [*flat_rows(scale), *log_rows(bench, scale, options.folder)]
    print_table(rows)
    if options.json:
        write_json(options.json, rows, seeds=[0])


if __name__ == "__main__":
    main()
