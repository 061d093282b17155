"""Policy-gradient losses of single tokens that were sampled by an older policy.

Shapes: `T` tokens of a packed micro-batch. `logprobs_T` are the trainer's and carry
gradients; `behaviour_T` are those of the policy that sampled, `advantages_T` one advantage for
each token. The ratio is `exp(logprobs - behaviour)`. None of these masks or averages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLosses:
    """`loss [T]` is to be minimised; `clipped [T]` tells which tokens the correction cut down."""

    loss: Tensor
    clipped: Tensor


class Correction(Protocol):
    """Turns log-probs and advantages into token losses."""

    def __call__(self, logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor) -> TokenLosses:
        """The token losses."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """PPO: `-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`.

    Schulman et al., "Proximal Policy Optimization" (arXiv 1707.06347), equation 7, with the two
    bounds of Yu et al., "DAPO" (arXiv 2503.14476), equation 10.
    """

    clip_low: float
    clip_high: float

    def __call__(self, logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor) -> TokenLosses:
        """The token losses; a token is clipped where its gradient is cut to 0."""
        ratio_T = torch.exp(logprobs_T - behaviour_T)
        free_T = ratio_T * advantages_T
        bound_T = ratio_T.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages_T
        return TokenLosses(loss=-torch.minimum(free_T, bound_T), clipped=bound_T < free_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoupled:
    """Decoupled PPO: `weight x` the PPO loss against a proximal policy, `weight = pi_prox / pi_behaviour`.

    Fu et al., "AReaL" (arXiv 2505.24298), equation 5: clipping keeps the new policy near the
    proximal one, which is recent, and not near the behaviour policy, which may be old and bad.
    The proximal policy is the trainer's at the beginning of the optimizer step. As a batch
    gets one gradient step, that is the current policy, detached. Then the ratio to it is 1,
    its clip never binds, and only the weight corrects.

    Tokens with a weight above `max_weight` are left out of the numerator, as AReaL's published
    code does (`behav_imp_weight_cap`); that they stay in the denominator is this project's
    choice, so that the denominator does not depend on the policy.
    """

    clip_low: float
    clip_high: float
    max_weight: float

    def __call__(self, logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor) -> TokenLosses:
        """The token losses; a token is clipped where it is left out or its ratio is bounded."""
        proximal_T = logprobs_T.detach()
        weight_T = torch.exp(proximal_T - behaviour_T)
        left_out_T = weight_T > self.max_weight
        ppo = Clipped(clip_low=self.clip_low, clip_high=self.clip_high)(logprobs_T, proximal_T, advantages_T)
        kept_weight_T = weight_T.masked_fill(left_out_T, 0)  # filled before multiplying: infinity x 0 is NaN
        return TokenLosses(loss=kept_weight_T * ppo.loss, clipped=left_out_T | ppo.clipped)


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncated:
    """Truncated importance sampling: `-min(ratio, max_weight) A log pi`, the weight detached.

    The weight of V-trace's policy gradient: Espeholt et al., "IMPALA" (arXiv 1802.01561),
    section 4.2, with rho-bar = `max_weight`; for language models Yao et al., "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training" (2025).
    """

    max_weight: float

    def __call__(self, logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor) -> TokenLosses:
        """The token losses; a token is clipped where its weight was cut down to `max_weight`."""
        ratio_T = torch.exp(logprobs_T.detach() - behaviour_T)
        loss_T = -ratio_T.clamp(max=self.max_weight) * advantages_T * logprobs_T
        return TokenLosses(loss=loss_T, clipped=ratio_T > self.max_weight)


def uncorrected(logprobs_T: Tensor, behaviour_T: Tensor, advantages_T: Tensor) -> TokenLosses:
    """REINFORCE as if the tokens had just been sampled: `-A log pi` (Williams, 1992)."""
    return TokenLosses(loss=-advantages_T * logprobs_T, clipped=torch.zeros_like(behaviour_T, dtype=torch.bool))
