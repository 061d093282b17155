"""SIGKILL of producers, the stage, the trainer and the queue's server, at every phase and at any moment.

However often: no row that was acknowledged is lost, none is trained twice or in part, and the
last weights are, bit for bit, those of the same system that nobody killed.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from asyncflow.data.audit import audit_log
from tests.kill import role
from tests.kill.system import System, check, final_bytes, make_plan
from tests.kill.world import Setting

pytestmark = pytest.mark.slow

KILLS_A_RUN = 20
STEPS = 60


def run(setting: Setting, folder: Path, seed: int, num_kills: int) -> System:
    """A system that is killed so often at most, and whose log is sound."""
    folder.mkdir()
    system = System(setting=setting, folder=folder)
    system.run(make_plan(seed, num_kills))
    check(setting, folder)
    audited = audit_log(folder / "ledger")
    assert [*map(str, audited.violations), *audited.twice, *audited.lost, *audited.pending] == []
    assert audited.trained == setting.steps * setting.groups_per_step
    return system


@cache
def undisturbed(setting: Setting, folder: Path) -> bytes:
    """What comes of the system when nobody is killed."""
    assert run(setting, folder, 0, 0).num_kills == 0
    return final_bytes(folder)


def kill(tmp_path: Path, *, wanted: int, first_seed: int = 0) -> Counter[str]:
    """Run systems until so many processes were killed, with a bound of 0 and 1 in turn; who was, and where."""
    kills: Counter[str] = Counter()
    seed = first_seed
    while kills.total() < wanted:
        setting = Setting(seed=1, steps=STEPS, max_staleness=(seed + 1) % 2)
        expected = undisturbed(setting, tmp_path / f"undisturbed {setting.max_staleness}")
        folder = tmp_path / f"seed {seed}"
        kills += run(setting, folder, seed, min(KILLS_A_RUN, wanted - kills.total())).kills
        assert final_bytes(folder) == expected, f"seed {seed}: other weights after {dict(kills)}"
        seed += 1
        assert seed < first_seed + 10 + wanted // 5, "the systems end before they are killed"
    return kills


def test_twenty_kills_lose_nothing_and_change_no_bit(tmp_path: Path) -> None:
    assert kill(tmp_path, wanted=20).total() >= 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_two_hundred_kills_lose_nothing_and_change_no_bit(tmp_path: Path) -> None:
    kills = kill(tmp_path, wanted=240, first_seed=100)
    struck = {where.partition(": ")[2].removeprefix("producer 1 ").removeprefix("producer 2 ") for where in kills}
    for name, phases in role.PHASES.items():
        prefix = "" if name == "producer" else f"{name} "
        missed = [phase for phase in phases if prefix + phase not in struck]
        assert len(missed) <= len(phases) // 3, f"nobody died where a {name} was {missed}: {kills}"
