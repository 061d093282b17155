"""The bound is asserted on every batch, token by token, and the totals of a step add up."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.columns import LOSS_MASK, TOKEN_IDS
from asyncflow.core.errors import InvariantError, StalenessError
from asyncflow.core.types import NOT_SAMPLED, MicroBatch, Ragged, Rows
from asyncflow.workflow.staleness import check_staleness
from asyncflow.workflow.totals import StepTotals
from tests.workflow.batches import group_columns, versions_batch


@given(versions=st.lists(st.integers(-1, 12), min_size=1, max_size=6), step=st.integers(0, 12), bound=st.integers(0, 3))
def test_a_batch_passes_exactly_when_every_sampled_token_is_within_the_bound(
    versions: list[int], step: int, bound: int
) -> None:
    old = [step - version for version in versions if version != NOT_SAMPLED]
    batch = versions_batch(versions)
    if all(0 <= staleness <= bound for staleness in old):
        assert check_staleness(batch, step, bound).tolist() == old
    else:
        with pytest.raises(StalenessError):
            check_staleness(batch, step, bound)


def test_the_message_says_what_came_and_where() -> None:
    batch = versions_batch([NOT_SAMPLED, 13, 11], tickets=(112, 114))
    with pytest.raises(InvariantError) as caught:
        check_staleness(batch, 14, 2)
    assert str(caught.value) == (
        "batch holds tokens 1 to 3 versions old, the bound is 2 (trainer at version 14, groups 112 to 114)"
    )


def test_the_totals_of_a_step_add_up_over_its_batches() -> None:
    columns = group_columns([1.0, 0.0], [4, 2])
    totals = StepTotals(step=1, bound=1)
    for ticket in (5, 6):
        rows = Rows.of_groups(np.array([ticket]), 2)
        totals.add(MicroBatch(rows=rows, columns=columns), denominator=4.0)
    assert (totals.denominator, totals.num_batches, totals.num_samples) == (8.0, 2, 4)
    assert (totals.num_tokens, totals.num_sampled) == (12, 8)
    assert (totals.staleness_mean, totals.staleness_max) == (1.0, 1)
    assert (totals.reward_mean, totals.length_mean) == (0.5, 2.0)


def test_a_batch_beyond_the_bound_is_not_counted_as_trained() -> None:
    columns = group_columns([1.0, 0.0], [4, 2])
    rows = Rows.of_groups(np.array([5]), 2)
    with pytest.raises(StalenessError):
        StepTotals(step=2, bound=1).add(MicroBatch(rows=rows, columns=columns), denominator=4.0)


def test_demonstrations_have_neither_staleness_nor_reward() -> None:
    columns = {TOKEN_IDS: Ragged.stack([np.array([1, 2])]), LOSS_MASK: Ragged.stack([np.array([False, True])])}
    totals = StepTotals(step=0, bound=0)
    totals.add(MicroBatch(rows=Rows.of_groups(np.array([0]), 1), columns=columns), denominator=1.0)
    assert (totals.staleness_mean, totals.staleness_max, totals.reward_mean, totals.length_mean) == (0.0, 0, 0.0, 1.0)
