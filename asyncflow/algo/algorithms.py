"""An algorithm: what is learnt from a group, put together from a configuration.

The type is free of torch, so that the workflow can hold one; making one imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

from asyncflow.algo.advantages import dr_grpo, grpo
from asyncflow.algo.aggregation import Aggregation
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, REF_LOGPROBS, TOKEN_IDS, VERSIONS
from asyncflow.core.config import AlgorithmConfig
from asyncflow.core.ports import Loss, TensorT
from asyncflow.core.types import FloatArray

if TYPE_CHECKING:
    from torch import Tensor

    from asyncflow.algo.corrections import Correction

Advantages = Callable[[FloatArray], FloatArray]
"""Rewards of a group to advantages: `[G]` to `[G]`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm(Generic[TensorT]):
    """The columns a training batch must have, the loss on them, and the advantages."""

    columns: tuple[str, ...]
    loss: Loss[TensorT]
    advantages: Advantages


def make_algorithm(config: AlgorithmConfig, *, max_tokens: int) -> Algorithm[Tensor]:
    """The algorithm of a configuration; `max_tokens` is the longest completion."""
    from asyncflow.algo.losses import PolicyLoss  # imports torch, which only a real run has

    return Algorithm(
        columns=columns_of(config),
        loss=PolicyLoss(
            correction=_make_correction(config),
            aggregation=Aggregation(mode=config.aggregation, max_tokens=max_tokens),
            kl_coef=config.kl_coef,
        ),
        advantages={"grpo": grpo, "dr_grpo": dr_grpo}[config.advantage],
    )


def columns_of(config: AlgorithmConfig) -> tuple[str, ...]:
    """The columns that a training batch must have."""
    columns = (TOKEN_IDS, LOSS_MASK, LOGPROBS, VERSIONS, ADVANTAGE)
    return (*columns, REF_LOGPROBS) if config.kl_coef > 0 else columns


def make_warmup_loss() -> Loss[Tensor]:
    """The loss of the supervised warm-up: the mean over all tokens to imitate."""
    from asyncflow.algo.losses import NextTokenLoss  # imports torch, which only a real run has

    return NextTokenLoss(aggregation=Aggregation(mode="token_mean", max_tokens=0))


def _make_correction(config: AlgorithmConfig) -> Correction:
    from asyncflow.algo import corrections  # imports torch, which only a real run has

    low, high, cap = config.clip_low, config.clip_high, config.max_weight
    match config.correction:
        case "ppo":
            return corrections.Clipped(clip_low=low, clip_high=high)
        case "decoupled":
            return corrections.Decoupled(clip_low=low, clip_high=high, max_weight=cap)
        case "truncated":
            return corrections.Truncated(max_weight=cap)
        case "none":
            return corrections.uncorrected
