"""Real processes and real signals: whatever is killed, the run ends with its cause and can be resumed."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import RealDisk, World
from asyncflow.data.audit import audit_log
from asyncflow.observe.records import read_metrics, read_rollouts
from asyncflow.observe.run_state import RUN_FILE, read_state
from asyncflow.recipes import runner
from asyncflow.workflow.checkpoint import newest_checkpoint, read_ledger
from asyncflow.workflow.checkpoint_folder import checkpoint_step, list_checkpoints
from tests.recipes.copying import quiet, write_recipe

pytestmark = pytest.mark.slow

GROUPS = 4
LIMIT_S = 60.0
"""Longer than anything here takes on a busy machine; reached only when something hangs."""

# Ctrl-C is ignored by what a script starts in the background, and children inherit that: undo it.
PROGRAM = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from asyncflow.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@contextmanager
def running(runs: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`asyncflow` with these arguments, in a session of its own."""
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200"}
    command = [sys.executable, "-c", PROGRAM, *arguments, "--runs-dir", str(runs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def endless_run(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run that has published two checkpoints and would go on for hours; its process and folder."""
    file = write_recipe(tmp_path)
    runs = tmp_path / "runs"
    with running(runs, "run", str(file), "steps=100000", "evaluate.every=0", "--name", "one") as process:
        wait_for(lambda: newest_step(runs / "one") >= 2, process)
        yield process, runs / "one"


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max((checkpoint_step(folder) or 0 for folder in list_checkpoints(run / "checkpoints")), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Look again and again: a file of another process tells nobody when it appears."""
    end_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end_s, "nothing came of it in time"
        assert process is None or process.poll() is None, "it ended too early"
        time.sleep(0.02)


def rollout_process(parent: int) -> int:
    """The one child of a run."""
    [child] = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)


def ends_within_the_limit(pidfd: int) -> bool:
    """Whether a process, which need not be our child, has ended."""

    async def ended() -> bool:
        event = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, event.set)
        try:
            async with asyncio.timeout(LIMIT_S):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            asyncio.get_running_loop().remove_reader(pidfd)
        return True

    return asyncio.run(ended())


def finish(run: Path) -> None:
    """Resume it to two steps more than its checkpoint, and check the accounts of both parts."""
    checkpoint = newest_checkpoint(run)
    before = read_ledger(checkpoint, World())
    num_rollouts = len(read_rollouts(run))
    put_before = {ticket for ticket, group in audit_log(run / "ledger").groups.items() if group.num_rows}
    steps = before.trained // GROUPS + 2
    assert runner.resume(run, [f"steps={steps}"], quiet()).steps == steps
    state = read_state(run, RealDisk())
    assert (state.state, state.reason, state.num_starts) == ("finished", "", 2)
    after = read_ledger(newest_checkpoint(run), World())
    assert after.trained == steps * GROUPS
    assert after.admitted == after.trained + sum(after.dropped.values()) + len(after.pending)
    assert after.trained - before.trained == 2 * GROUPS
    again = {rollout.ticket for rollout in read_rollouts(run)[num_rollouts:]}
    assert not again & put_before  # what was rolled out and acknowledged is not rolled out again
    assert again | put_before >= set(range(after.admitted)) - set(after.pending)
    audited = audit_log(run / "ledger")
    assert [*map(str, audited.violations), *audited.twice, *audited.lost] == []
    assert audited.trained == after.trained
    assert len([metric for metric in read_metrics(run) if metric.kind == "warmup"]) == 4


def test_a_killed_rollout_process_ends_the_run_with_its_cause(tmp_path: Path) -> None:
    with endless_run(tmp_path) as (process, run):
        os.kill(rollout_process(process.pid), signal.SIGKILL)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1, err
    state = read_state(run, RealDisk())
    assert state.state == "failed"
    assert state.reason.startswith("EngineLostError: rollout process ")
    assert "was killed by SIGKILL" in state.reason
    assert "was killed by SIGKILL" in err
    assert "Traceback" not in err
    finish(run)


def test_a_killed_run_leaves_no_process_and_can_be_resumed_then_and_not_before(tmp_path: Path) -> None:
    with endless_run(tmp_path) as (process, run):
        with pytest.raises(RunFolderError, match=rf"is being run by another process \({process.pid}\)"):
            runner.resume(run, [], quiet())
        orphan = os.pidfd_open(rollout_process(process.pid))
        try:
            process.kill()
            process.wait(LIMIT_S)
            assert ends_within_the_limit(orphan)
        finally:
            os.close(orphan)
    assert read_state(run, RealDisk()).state == "running"  # nobody was left to say otherwise
    finish(run)


def test_a_disk_that_takes_no_more_of_the_log_ends_the_run_and_it_can_be_resumed(tmp_path: Path) -> None:
    with endless_run(tmp_path) as (process, run):
        [log] = (run / "ledger").glob("*.log")
        largest = max(path.stat().st_size for path in run.rglob("*") if path.is_file())
        limit = max(largest, log.stat().st_size) + 20_000  # no file of a checkpoint comes to it
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 1, err
    assert "ledger can't be written: [Errno 27] File too large. Nothing after record" in err
    assert "resume the run when the disk is sound" in err
    assert "Traceback" not in err
    assert read_state(run, RealDisk()).state == "failed"
    finish(run)


def interrupt(process: subprocess.Popen[str], run: Path, number: signal.Signals) -> None:
    """Send a signal; the run must end all its processes, say so and how to go on."""
    orphan = os.pidfd_open(rollout_process(process.pid))
    try:
        process.send_signal(number)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, err
        assert ends_within_the_limit(orphan)
    finally:
        os.close(orphan)
    state = read_state(run, RealDisk())
    assert (state.state, state.reason) == ("interrupted", "")
    assert state.ended_at is not None
    assert "interrupted after step" in err
    assert f"Continue: asyncflow resume {run}" in err
    assert "Traceback" not in err


def test_ctrl_c_ends_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    with endless_run(tmp_path) as (process, run):
        interrupt(process, run, signal.SIGINT)
    finish(run)


def test_sigterm_does_what_ctrl_c_does(tmp_path: Path) -> None:
    with endless_run(tmp_path) as (process, run):
        interrupt(process, run, signal.SIGTERM)


def test_a_run_interrupted_before_its_first_checkpoint_is_resumed_from_the_beginning(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    words = ["warmup.steps=100000", "--name", "one"]
    with running(runs, "run", str(write_recipe(tmp_path)), *words) as process:
        wait_for(lambda: "warmup" in read_kinds(runs / "one"), process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 130, err
    assert read_state(runs / "one", RealDisk()).state == "interrupted"
    assert f"before the first checkpoint. Start it from the beginning: asyncflow resume {runs / 'one'}" in err
    runner.resume(runs / "one", ["warmup.steps=1", "steps=1"], quiet())
    assert newest_step(runs / "one") == 1


def read_kinds(run: Path) -> set[str]:
    return {metric.kind for metric in read_metrics(run)} if (run / RUN_FILE).is_file() else set()
