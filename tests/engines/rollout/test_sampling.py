"""Sampling: the exact distribution, honest log-probs, randomness that belongs to the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from asyncflow.engines.rollout.sampling import RowSampling, invert, keep_top, sample, uniforms

NUM_DRAWS = 40_000
LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def rows(
    num_rows: int, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
) -> RowSampling:
    """Row i has seed i, or all have `seed` and index i."""
    numbers = np.arange(num_rows)
    return RowSampling(
        temperature=np.full(num_rows, temperature, np.float32),
        top_k=np.full(num_rows, top_k, np.int32),
        top_p=np.full(num_rows, top_p, np.float32),
        seeds=(numbers if seed is None else np.full(num_rows, seed)).astype(np.uint64),
        indices=(np.zeros(num_rows) if seed is None else numbers).astype(np.int32),
    )


def chi_square(tokens: torch.Tensor, expected: NDArray[np.float64]) -> float:
    """Pearson's statistic over the tokens that can be sampled; the others must not be."""
    counts = np.bincount(tokens.numpy(), minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    wanted = expected[possible] * len(tokens)
    return float(((counts[possible] - wanted) ** 2 / wanted).sum())


def reference(temperature: float, top_k: int, top_p: float) -> NDArray[np.float64]:
    """The distribution by the definition: temperature, then top-k, then the fewest that hold top-p."""
    logits = LOGITS.double().numpy() / temperature
    order = np.argsort(-logits)
    kept = order[:top_k] if top_k else order
    probabilities = np.exp(logits[kept]) / np.exp(logits[kept]).sum()
    num_kept = int(np.searchsorted(np.cumsum(probabilities), top_p) + 1) if top_p < 1 else len(kept)
    result = np.zeros(len(logits))
    result[kept[:num_kept]] = probabilities[:num_kept] / probabilities[:num_kept].sum()
    return result


@pytest.mark.parametrize("by_seed", [True, False], ids=["seeds", "indices"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8), (1.5, 4, 0.7), (1.0, 1, 1.0)],
)
def test_tokens_follow_the_distribution(temperature: float, top_k: int, top_p: float, *, by_seed: bool) -> None:
    draws = rows(NUM_DRAWS, temperature=temperature, top_k=top_k, top_p=top_p, seed=None if by_seed else 3)
    tokens, logprobs = sample(LOGITS.expand(NUM_DRAWS, -1), draws)
    expected = reference(temperature, top_k, top_p)
    assert chi_square(tokens, expected) < 25, "beyond the 0.9998 quantile for 5 degrees of freedom"
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)


def test_greedy_takes_the_likeliest_and_reports_the_untempered_logprob() -> None:
    tokens, logprobs = sample(LOGITS.expand(50, -1), rows(50, temperature=0.0, top_k=2))
    assert set(tokens.tolist()) == {0}
    torch.testing.assert_close(logprobs, LOGITS.log_softmax(-1)[:1].expand(50))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    draws = torch.randn(64, 11, generator=torch.Generator().manual_seed(1))
    alone = rows(64)
    mixed = rows(64)
    mixed.temperature[::3], mixed.top_k[1::3], mixed.top_p[1::3] = 0.0, 2, 0.5
    expected, _ = sample(draws, alone)
    tokens, _ = sample(draws, mixed)
    assert tokens[2::3].tolist() == expected[2::3].tolist()
    assert tokens[0::3].tolist() == draws[0::3].argmax(-1).tolist()


def test_half_precision_logits_are_sampled_in_full() -> None:
    tokens, logprobs = sample(LOGITS.bfloat16().expand(100, -1), rows(100))
    torch.testing.assert_close(logprobs, LOGITS.bfloat16().float().log_softmax(-1)[tokens])


def test_impossible_tokens_are_never_sampled_at_the_edges() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    tokens, logprobs = sample(logits.expand(NUM_DRAWS, -1), rows(NUM_DRAWS))
    assert set(tokens.tolist()) == {1, 3}
    assert logprobs.isfinite().all()
    edges = torch.tensor([0.0, 0.5, 1.0])  # 1 - 2**-53 is 1 in single precision
    assert invert(logits.expand(3, -1).log_softmax(-1), edges).tolist() == [1, 3, 3]


def test_uniforms_are_uniform_and_independent() -> None:
    numbers = uniforms(np.arange(NUM_DRAWS, dtype=np.uint64), np.zeros(NUM_DRAWS, np.int32))
    following = uniforms(np.arange(NUM_DRAWS, dtype=np.uint64), np.ones(NUM_DRAWS, np.int32))
    assert 0 <= numbers.min() <= numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - NUM_DRAWS / 50) ** 2 / (NUM_DRAWS / 50)).sum() < 100
    assert abs(np.corrcoef(numbers, following)[0, 1]) < 0.02
    assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.02


def test_uniforms_are_the_same_everywhere() -> None:
    """Pinned: a replay draws what the run drew."""
    numbers = uniforms(np.array([0, 1, 2**63], np.uint64), np.array([0, 5, 7], np.int32))
    np.testing.assert_array_equal(numbers, [0.6524484863740322, 0.7743991716672016, 0.1842354537308829])


def test_keep_top_keeps_at_least_one_token() -> None:
    kept = keep_top(LOGITS.expand(2, -1), torch.tensor([0, 0]), torch.tensor([1e-6, 0.0]))
    assert kept.isfinite().sum(-1).tolist() == [1, 1]
