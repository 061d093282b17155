"""Losses over packed micro-batches: `core.ports.Loss` on torch tensors.

A loss multiplies token losses by the aggregation's weights and sums; it never divides by
anything (see `asyncflow.algo.aggregation`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from asyncflow.algo.aggregation import Aggregation
from asyncflow.algo.corrections import Correction
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, REF_LOGPROBS
from asyncflow.core.ports import LossInputs, LossOutput
from asyncflow.core.types import FloatArray, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """The loss of reinforcement learning: a corrected policy gradient, and a KL penalty where asked for.

    Needs the columns `logprobs` and `advantage`; with `kl_coef` above 0 also `ref_logprobs`.
    """

    correction: Correction
    aggregation: Aggregation
    kl_coef: float = 0.0

    def __call__(self, inputs: LossInputs[Tensor]) -> LossOutput[Tensor]:
        """The weighted sum of token losses, and sums over sampled tokens.

        Of `entropy`; `ratio` and `ratio_squared` of the current to the behaviour policy (mean ratio
        squared over mean squared ratio is the effective fraction of the sample);
        `clip_fraction`; `behaviour_kl` and `behaviour_kl_k3`, two estimates of the KL from
        behaviour to current policy; `logprob_gap`, the absolute difference of their log-probs;
        `ref_kl`, where there is a reference.
        """
        behaviour_T = inputs.columns[LOGPROBS]
        token = self.correction(inputs.logprobs, behaviour_T, inputs.columns[ADVANTAGE])
        loss_T = token.loss
        measures_T = _compare(inputs.logprobs.detach(), behaviour_T)
        measures_T |= {"entropy": inputs.entropy.detach(), "clip_fraction": token.clipped}
        if self.kl_coef > 0:
            ref_kl_T = k3(inputs.logprobs, inputs.columns[REF_LOGPROBS])
            loss_T = loss_T + self.kl_coef * ref_kl_T
            measures_T["ref_kl"] = ref_kl_T.detach()
        return LossOutput(
            loss=_weighted_sum(loss_T, inputs),
            sums={name: measure_T[inputs.loss_mask].sum() for name, measure_T in measures_T.items()},
        )

    def weights(self, batch: MicroBatch) -> FloatArray:
        """The aggregation's weights, `[T]`."""
        return self.aggregation.weights(batch)

    def denominator(self, batch: MicroBatch) -> float:
        """What this batch adds to the denominator of the step."""
        return self.aggregation.denominator(batch)


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenLoss:
    """The loss of the supervised warm-up: cross-entropy of the tokens in the loss mask. Needs no other column."""

    aggregation: Aggregation

    def __call__(self, inputs: LossInputs[Tensor]) -> LossOutput[Tensor]:
        """The weighted sum of `-log pi`, and the sum of `entropy`."""
        loss = _weighted_sum(-inputs.logprobs, inputs)
        return LossOutput(loss=loss, sums={"entropy": inputs.entropy.detach()[inputs.loss_mask].sum()})

    def weights(self, batch: MicroBatch) -> FloatArray:
        """The aggregation's weights, `[T]`."""
        return self.aggregation.weights(batch)

    def denominator(self, batch: MicroBatch) -> float:
        """What this batch adds to the denominator of the step."""
        return self.aggregation.denominator(batch)


def k3(logprobs_T: Tensor, ref_logprobs_T: Tensor) -> Tensor:
    """`pi_ref / pi - log(pi_ref / pi) - 1`, an unbiased estimate of KL(pi || pi_ref) that is never negative.

    DeepSeekMath (arXiv 2402.03300), equation 4; Schulman, "Approximating KL Divergence" (2020).
    """
    log_ratio_T = ref_logprobs_T - logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


def _compare(current_T: Tensor, behaviour_T: Tensor) -> dict[str, Tensor]:
    """How far the current policy is from the one that sampled, token by token."""
    log_ratio_T = current_T - behaviour_T
    ratio_T = torch.exp(log_ratio_T)
    return {
        "ratio": ratio_T,
        "ratio_squared": ratio_T.square(),
        "behaviour_kl": -log_ratio_T,
        "behaviour_kl_k3": torch.expm1(log_ratio_T) - log_ratio_T,
        "logprob_gap": log_ratio_T.abs(),
    }


def _weighted_sum(loss_T: Tensor, inputs: LossInputs[Tensor]) -> Tensor:
    """Indexed, not multiplied by the mask: what stands at other tokens must not reach the sum."""
    mask_T = inputs.loss_mask
    return (inputs.weights[mask_T] * loss_T[mask_T]).sum()
