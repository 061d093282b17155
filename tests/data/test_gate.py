"""The staleness gate: the bound of the proof, tried against every order a run could take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.data.gate import Gate


@pytest.mark.parametrize(
    ("max_staleness", "look_ahead", "bound"), [(0, 1, 0), (1, 1, 1), (2, 5, 3), (0, 2, 1), (0, 6, 2), (3, 9, 5)]
)
def test_bound_follows_the_formula(max_staleness: int, look_ahead: int, bound: int) -> None:
    gate = Gate(groups_per_step=4, max_staleness=max_staleness, steps=9, look_ahead=look_ahead)
    assert gate.bound == bound


def test_synchronous_training_admits_one_step_at_a_time() -> None:
    gate = Gate(groups_per_step=4, max_staleness=0, steps=9)
    assert [gate.may_admit(rank=rank, live_step=2) for rank in (11, 12, 13)] == [True, False, False]


def test_no_group_starts_that_the_run_can_never_train() -> None:
    gate = Gate(groups_per_step=4, max_staleness=5, steps=3)
    assert not gate.may_admit(rank=12, live_step=1)


@given(
    groups_per_step=st.integers(1, 5),
    max_staleness=st.integers(0, 3),
    look_ahead=st.integers(1, 12),
    seed=st.integers(0, 10_000),
)
def test_no_order_of_events_breaks_the_bound(
    groups_per_step: int, max_staleness: int, look_ahead: int, seed: int
) -> None:
    """An adversary admits, drops, finishes and takes at random, by no rule but the gate's."""
    gate = Gate(groups_per_step=groups_per_step, max_staleness=max_staleness, steps=12, look_ahead=look_ahead)
    rng = np.random.default_rng(seed)
    line: list[list[int]] = []  # [version at admission, 1 if taken], undropped groups in order
    taken = step = 0
    for _ in range(600):
        may_admit = gate.may_admit(rank=len(line), live_step=step)
        choices = [rank for rank, (_, is_taken) in enumerate(line) if not is_taken]
        event = rng.random()
        if may_admit and event < 0.5:
            line.append([step, 0])
        elif choices and event < 0.6:
            del line[rng.choice(choices)]
        elif choices:
            rank = int(rng.choice(choices))
            if rank < gate.rank_limit(oldest_rank=choices[0], step=step):
                assert step - line[rank][0] <= gate.bound
                line[rank][1] = 1
                taken += 1
                step = taken // groups_per_step
    assert step > 0
