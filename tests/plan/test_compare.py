"""Bounds side by side: what the laws say must come out."""

from __future__ import annotations

import pytest

from asyncflow.core.config import RunConfig
from asyncflow.plan.compare import Times, compare


def config(steps: int = 30) -> RunConfig:
    return RunConfig(steps=steps, groups_per_step=4, group_size=2, seed=3)


def test_without_spread_overlap_hides_the_shorter_role() -> None:
    runs = compare(config(), Times(rollout_s=3.0, sigma=0.0, train_s=4.0, load_s=0.0), (0, 1))
    assert 1 / runs[0].steps_per_s == pytest.approx(7.0, rel=0.02)
    assert 1 / runs[1].steps_per_s == pytest.approx(4.0, rel=0.06)
    assert (runs[0].staleness_max, runs[1].staleness_max) == (0, 1)


def test_a_heavy_tail_makes_larger_bounds_gain_more() -> None:
    runs = compare(config(), Times(rollout_s=3.0, sigma=1.0, train_s=3.0, load_s=0.1), (0, 1, 2, 4))
    rates = [run.steps_per_s for run in runs.values()]
    assert rates == sorted(rates)
    assert rates[-1] > 2 * rates[0]
