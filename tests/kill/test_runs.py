"""SIGKILL of real runs, and of their rollout processes, at named phases: resumed, they end with the same bits.

Runs are of a tiny recipe, with `deterministic=true`; each of their processes takes seconds to start, so
`make test` has a few of these and `make soak` the rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

from asyncflow.data.audit import audit_log
from asyncflow.observe.records import read_metrics
from asyncflow.workflow.checkpoint_folder import list_checkpoints
from tests.kill.doomed import PHASES
from tests.recipes.copying import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 8
GROUPS = 4
PROGRAM = str(Path(__file__).with_name("doomed.py"))
LIMIT_S = 100.0
WORDS = (
    *("max_staleness=1", "evaluate.every=0", "evaluate.final_num_prompts=1", "warmup.steps=1"),
    *("checkpoint.every=3", "checkpoint.keep=2"),
)


def asyncflow(home: Path, deadly: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A run that comes to its end, or to the deadly phase."""
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "200", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, PROGRAM, deadly, *arguments, "--runs-dir", str(home / "runs")]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=LIMIT_S, check=False)


def begin(home: Path, deadly: str = "", *words: str) -> subprocess.CompletedProcess[str]:
    """Start the tiny recipe."""
    home.mkdir(exist_ok=True)
    file = write_recipe(home)
    return asyncflow(home, deadly, "run", str(file), f"steps={STEPS}", *WORDS, *words, "--name", "one")


def go_on(home: Path, deadly: str = "", *words: str) -> subprocess.CompletedProcess[str]:
    """Resume it."""
    return asyncflow(home, deadly, "resume", "one", *words)


def check_death(ended: subprocess.CompletedProcess[str], deadly: str) -> None:
    """Killed at once, or ended with a word on the death of its rollout process."""
    if deadly.endswith("rollout"):
        assert ended.returncode == 1, (deadly, ended.stdout, ended.stderr)
        assert "rollout process" in ended.stderr
        assert "was killed by SIGKILL" in ended.stderr
    else:
        assert ended.returncode == -signal.SIGKILL, (deadly, ended.stdout, ended.stderr)


def check_end(home: Path, ended: subprocess.CompletedProcess[str]) -> bytes:
    """A run that is whole: by its exit status and by its log. Its last weights."""
    assert ended.returncode == 0, ended.stderr
    run = home / "runs" / "one"
    audited = audit_log(run / "ledger")
    assert [*map(str, audited.violations), *audited.twice, *audited.lost, *audited.pending] == []
    assert audited.trained == STEPS * GROUPS
    assert audited.last_step == STEPS
    told = [str(metric.values["message"]) for metric in read_metrics(run) if metric.kind == "health"]
    assert not [text for text in told if "differ in bits" in text]
    return (list_checkpoints(run / "checkpoints")[-1] / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The last weights of the deterministic run that nobody kills."""
    home = tmp_path_factory.mktemp("undisturbed")
    return check_end(home, begin(home, "", "deterministic=true"))


def kill_and_resume(home: Path, deaths: Sequence[str], *words: str) -> bytes:
    """A deterministic run that dies so often; its last weights."""
    for number, deadly in enumerate(deaths):
        ended = go_on(home, deadly) if number else begin(home, deadly, "deterministic=true", *words)
        check_death(ended, deadly)
    return check_end(home, go_on(home))


def test_killed_between_a_step_and_its_publication_and_again_in_the_replay(tmp_path: Path, undisturbed: bytes) -> None:
    assert kill_and_resume(tmp_path, ["acknowledged 5 self", "replayed 4 self"]) == undisturbed


def test_killed_after_a_checkpoint_whose_weights_were_never_live(tmp_path: Path, undisturbed: bytes) -> None:
    assert kill_and_resume(tmp_path, ["published 3 self"], "queue.log=group_commit") == undisturbed


# -- the rest ------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("deterministic", ["false", "true"])
def test_a_smaller_bound_rolls_out_again_what_is_too_old(tmp_path: Path, deterministic: str) -> None:
    check_death(begin(tmp_path, "saved 3 self", "max_staleness=3", f"deterministic={deterministic}"), "self")
    check_end(tmp_path, go_on(tmp_path, "", "max_staleness=0"))
    steps = [metric.values for metric in read_metrics(tmp_path / "runs" / "one") if metric.kind == "step"]
    assert all(step["staleness_max"] == 0 for step in steps if int(step["step"]) > 3)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "death", ["drafted 6 self", "published 6 self", "saved 6 self", "thinned 3 self", "live 6 self"]
)
def test_killed_in_a_checkpoint_and_when_its_weights_are_live(tmp_path: Path, undisturbed: bytes, death: str) -> None:
    assert kill_and_resume(tmp_path, [death]) == undisturbed


def random_deaths(seed: int, num_deaths: int) -> list[str]:
    """Phases in the order of a run's versions, of which a few strike the rollout process."""
    rng = np.random.default_rng(seed)
    versions = sorted(int(version) for version in rng.integers(1, STEPS, size=num_deaths))
    deaths = []
    for version in versions:
        phases = [phase for phase in PHASES if phase != "replayed"]
        if version % 3:
            phases = [phase for phase in phases if phase not in ("drafted", "published", "saved", "thinned")]
        else:
            phases.remove("thinned")  # of the oldest checkpoint that is kept
        deaths.append(f"{rng.choice(phases)} {version} {rng.choice(['self', 'self', 'self', 'rollout'])}")
    return list(dict.fromkeys(deaths))


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_phases(tmp_path: Path, undisturbed: bytes, seed: int) -> None:
    home = tmp_path
    for number, deadly in enumerate(random_deaths(seed, 4)):
        words = ("deterministic=true", f"queue.log={'sync' if seed % 2 else 'group_commit'}")
        ended = go_on(home, deadly) if number else begin(home, deadly, *words)
        if ended.returncode:  # what is past by the last death comes never again
            check_death(ended, deadly)
    assert check_end(home, go_on(home)) == undisturbed


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments(tmp_path: Path, undisturbed: bytes, seed: int) -> None:
    rng = np.random.default_rng([seed, 3])
    log = tmp_path / "runs" / "one" / "ledger"
    write_recipe(tmp_path)
    ended = False
    for number in range(5):
        words = ["resume", "one"]
        if number == 0:
            file = str(tmp_path / "copying.py")
            words = ["run", file, f"steps={STEPS}", *WORDS, "deterministic=true", "--name", "one"]
        environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, PROGRAM, "", *words, "--runs-dir", str(tmp_path / "runs")]
        before = sum(1 for _ in log.glob("*.log")) if log.is_dir() else 0
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as run:
            end_s = time.monotonic() + LIMIT_S
            while run.poll() is None and (not log.is_dir() or sum(1 for _ in log.glob("*.log")) == before):
                assert time.monotonic() < end_s
                time.sleep(0.01)
            time.sleep(float(rng.uniform(0.0, 0.5)))
            run.kill()
        ended = run.returncode == 0
        if ended:
            break
    assert check_end(tmp_path, go_on(tmp_path)) == undisturbed
