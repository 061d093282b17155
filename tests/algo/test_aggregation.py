from typing import Literal, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.algo.aggregation import Aggregation
from asyncflow.core.columns import LOSS_MASK
from tests.algo.batches import make_batch
from tests.algo.reference import step_loss

Mode = Literal["token_mean", "sequence_mean", "constant"]
MAX_TOKENS = 7

masks = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=MAX_TOKENS).map(lambda rest: [False, *rest, True]),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("mode", get_args(Mode))
@given(masks=masks, cut=st.integers(1, 5))
def test_sums_over_any_split_divided_once_are_the_papers_loss(mode: Mode, masks: list[list[bool]], cut: int) -> None:
    aggregation = Aggregation(mode=mode, max_tokens=MAX_TOKENS)
    losses = [[1.0 + 10 * i + j for j in range(sum(mask))] for i, mask in enumerate(masks)]
    numerator = denominator = 0.0
    for part, part_losses in [(masks[:cut], losses[:cut]), (masks[cut:], losses[cut:])]:
        if part:
            batch = make_batch(part)
            weights = aggregation.weights(batch)
            numerator += float(weights[batch[LOSS_MASK].astype(bool)] @ np.concatenate(part_losses))
            denominator += aggregation.denominator(batch)
    assert numerator / denominator == pytest.approx(step_loss(mode, MAX_TOKENS, losses), rel=1e-6)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_weights_are_zero_outside_the_mask(mode: Mode) -> None:
    batch = make_batch([[False, True, False, True], [False, False, True]])
    weights = Aggregation(mode=mode, max_tokens=9).weights(batch)
    assert weights.dtype == np.float32
    assert ((weights > 0) == batch[LOSS_MASK]).all()


def test_a_sample_without_sampled_tokens_has_weight_zero() -> None:
    weights = Aggregation(mode="sequence_mean", max_tokens=9).weights(make_batch([[False, False], [False, True]]))
    assert weights.tolist() == [0, 0, 0, 1]
