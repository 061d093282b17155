import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.algo.advantages import dr_grpo, grpo
from tests.algo.reference import group_advantages

rewards = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=16)


@given(rewards)
def test_grpo_is_the_papers_formula(values: list[float]) -> None:
    result = grpo(np.array(values, np.float32))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, group_advantages(values), rtol=1e-4, atol=1e-5)


@given(rewards)
def test_dr_grpo_only_centres(values: list[float]) -> None:
    exact = np.array(values) - np.mean(values)
    np.testing.assert_allclose(dr_grpo(np.array(values, np.float32)), exact, rtol=1e-5, atol=1e-5)


def test_equal_rewards_teach_nothing() -> None:
    equal = np.full(8, 0.1, np.float32)
    assert np.abs(grpo(equal)).max() < 1e-6
    assert np.abs(dr_grpo(equal)).max() < 1e-6


def test_a_group_of_one_has_advantage_zero() -> None:
    assert grpo(np.array([5], np.float32)).tolist() == [0]
