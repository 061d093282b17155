"""Losses against the papers' formulas, and their gradients against finite differences."""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from asyncflow.algo.aggregation import Aggregation
from asyncflow.algo.corrections import Clipped, Correction, Decoupled, Truncated, uncorrected
from asyncflow.algo.losses import NextTokenLoss, PolicyLoss
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, REF_LOGPROBS
from asyncflow.core.ports import Loss, LossInputs
from asyncflow.core.types import MicroBatch
from tests.algo import reference
from tests.algo.batches import make_batch

MASKS = [[False, True, True], [False, False, True, True, True], [False, True], [False, True, False, True]]
Mode = Literal["token_mean", "sequence_mean", "constant"]
CORRECTIONS: Mapping[str, tuple[Correction, reference.TokenLoss]] = {
    "ppo": (Clipped(clip_low=0.2, clip_high=0.3), reference.ppo(0.2, 0.3)),
    "decoupled": (Decoupled(clip_low=0.2, clip_high=0.3, max_weight=1.5), reference.decoupled(1.5)),
    "truncated": (Truncated(max_weight=1.5), reference.truncated(1.5)),
    "none": (uncorrected, reference.reinforce()),
}


def make_inputs(batch: MicroBatch, loss: Loss[Tensor], logprobs_T: Tensor) -> LossInputs[Tensor]:
    """As an engine makes them, in float64."""
    mask_T = torch.tensor(batch[LOSS_MASK])
    columns = {
        name: torch.tensor(np.repeat(column.values, batch.lengths) if name == ADVANTAGE else column.values)
        for name, column in batch.columns.items()
    }
    return LossInputs(
        logprobs=logprobs_T,
        entropy=-logprobs_T,
        loss_mask=mask_T,
        weights=torch.tensor(loss.weights(batch)).double(),
        columns={name: column.double() if column.is_floating_point() else column for name, column in columns.items()},
    )


def random_logprobs(batch: MicroBatch, seed: int) -> Tensor:
    rng = np.random.default_rng(seed)
    near = batch[LOGPROBS].astype(float) + rng.normal(scale=0.5, size=batch.num_tokens)
    return torch.tensor(np.where(batch[LOSS_MASK], near, 0.0))


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", CORRECTIONS)
@given(seed=st.integers(0, 10_000))
def test_policy_losses_are_the_papers(name: str, kl_coef: float, mode: Mode, seed: int) -> None:
    correction, token_loss = CORRECTIONS[name]
    loss = PolicyLoss(
        correction=correction,
        aggregation=Aggregation(mode=mode, max_tokens=9),
        kl_coef=kl_coef,
    )
    batch = make_batch(MASKS, seed)
    now_T = random_logprobs(batch, seed + 1)
    output = loss(make_inputs(batch, loss, now_T))
    expected, token = [], 0
    for mask, advantage in zip(MASKS, batch[ADVANTAGE].tolist(), strict=True):
        losses = []
        for is_sampled in mask:
            now, behaviour, ref = (float(x[token]) for x in (now_T, batch[LOGPROBS], batch[REF_LOGPROBS]))
            if is_sampled:
                losses.append(token_loss(now, behaviour, advantage) + kl_coef * reference.kl_to_reference(now, ref))
            token += 1
        expected.append(losses)
    assert output.loss.item() / loss.denominator(batch) == pytest.approx(
        reference.step_loss(mode, 9, expected), rel=1e-5, abs=1e-7
    )


@pytest.mark.parametrize("name", ["ppo", "none"])
def test_gradients_are_the_losss_own(name: str) -> None:
    loss = PolicyLoss(
        correction=CORRECTIONS[name][0], aggregation=Aggregation(mode="sequence_mean", max_tokens=9), kl_coef=0.2
    )
    batch = make_batch(MASKS, 5)
    now_T = random_logprobs(batch, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(make_inputs(batch, loss, x)).loss, (now_T,))


@pytest.mark.parametrize("name", ["decoupled", "truncated"])
def test_importance_weights_are_constants_of_the_gradient(name: str) -> None:
    """d/dx (-w A log pi) is -w A, with w held still; for both losses, as decoupled PPO's inner ratio is 1."""
    correction, _ = CORRECTIONS[name]
    now_T = torch.tensor([-1.0, -1.0, -0.2], dtype=torch.float64, requires_grad=True)
    behaviour_T = torch.tensor([-1.0, -1.3, -2.0], dtype=torch.float64)
    token = correction(now_T, behaviour_T, torch.full((3,), 2.0, dtype=torch.float64))
    torch.autograd.backward(token.loss.sum())
    over_the_cap = 0.0 if name == "decoupled" else -2 * 1.5
    assert now_T.grad is not None
    torch.testing.assert_close(now_T.grad, torch.tensor([-2.0, -2 * np.exp(0.3), over_the_cap], dtype=torch.float64))


def test_ppo_cuts_the_gradient_only_on_the_side_that_goes_too_far() -> None:
    now_T = torch.tensor([1.0, 1.0, -1.0, -1.0], requires_grad=True)
    token = Clipped(clip_low=0.2, clip_high=0.3)(now_T, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]))
    torch.autograd.backward(token.loss.sum())
    assert now_T.grad is not None
    assert (now_T.grad == 0).tolist() == [True, False, False, True] == token.clipped.tolist()


def test_reported_sums_are_over_sampled_tokens_only() -> None:
    batch = make_batch(MASKS, 1)
    loss = PolicyLoss(
        correction=Clipped(clip_low=0.2, clip_high=0.2),
        aggregation=Aggregation(mode="token_mean", max_tokens=9),
        kl_coef=1.0,
    )
    now_T = random_logprobs(batch, 2)
    junk_T = torch.where(torch.tensor(batch[LOSS_MASK]), now_T, torch.nan)  # must not reach any sum
    output = loss(make_inputs(batch, loss, junk_T))
    assert torch.isfinite(output.loss)
    sums = output.sums
    sampled = batch[LOSS_MASK].astype(bool)
    log_ratio = (now_T.numpy() - batch[LOGPROBS])[sampled]
    ratio = np.exp(log_ratio)
    advantage = np.repeat(batch[ADVANTAGE], batch.lengths)[sampled]
    log_ref = (batch[REF_LOGPROBS] - now_T.numpy())[sampled]
    expected = {
        "entropy": -now_T.numpy()[sampled].sum(),
        "ratio": ratio.sum(),
        "ratio_squared": (ratio**2).sum(),
        "clip_fraction": (((ratio > 1.2) & (advantage > 0)) | ((ratio < 0.8) & (advantage < 0))).sum(),
        "behaviour_kl": -log_ratio.sum(),
        "behaviour_kl_k3": (ratio - 1 - log_ratio).sum(),
        "logprob_gap": np.abs(log_ratio).sum(),
        "ref_kl": (np.exp(log_ref) - log_ref - 1).sum(),
    }
    assert {name: value.item() for name, value in sums.items()} == pytest.approx(expected, rel=1e-5)


def test_next_token_loss_is_cross_entropy() -> None:
    batch = make_batch(MASKS, 1)
    loss = NextTokenLoss(aggregation=Aggregation(mode="token_mean", max_tokens=0))
    now_T = random_logprobs(batch, 2)
    output = loss(make_inputs(batch, loss, now_T))
    assert output.loss.item() / loss.denominator(batch) == pytest.approx(
        -now_T.numpy()[batch[LOSS_MASK].astype(bool)].mean()
    )
