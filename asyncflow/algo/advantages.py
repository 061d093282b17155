"""How much better a trajectory was than its siblings. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.types import FloatArray

EPSILON = 1e-6
"""Keeps a group with equal rewards, whose deviation is 0, at advantage 0."""


def grpo(rewards_G: FloatArray) -> FloatArray:
    """`(r - mean(r)) / (std(r) + epsilon)` over a group, `[G]`.

    Shao et al., "DeepSeekMath" (arXiv 2402.03300), section 4.1.2, outcome supervision. The
    paper does not say which deviation; this is the sample's (divisor G - 1), as in TRL and verl.

    >>> grpo(np.array([1, 0, 0, 1], np.float32)).round(3).tolist()
    [0.8659999966621399, -0.8659999966621399, -0.8659999966621399, 0.8659999966621399]
    """
    centred_G = _centre(rewards_G)
    divisor = max(len(rewards_G) - 1, 1)
    deviation = np.sqrt(np.square(centred_G).sum() / divisor)
    advantages_G: FloatArray = (centred_G / (deviation + EPSILON)).astype(np.float32)
    return advantages_G


def dr_grpo(rewards_G: FloatArray) -> FloatArray:
    """`r - mean(r)` over a group, `[G]`.

    Liu et al., "Understanding R1-Zero-Like Training" (arXiv 2503.20783), section 3.2: dividing
    by the deviation would weigh questions that are nearly always, or never, solved too heavily.

    >>> dr_grpo(np.array([1, 0, 0, 1], np.float32)).tolist()
    [0.5, -0.5, -0.5, 0.5]
    """
    return _centre(rewards_G).astype(np.float32)


def _centre(rewards_G: FloatArray) -> NDArray[np.float64]:
    exact_G = rewards_G.astype(np.float64)
    centred_G: NDArray[np.float64] = exact_G - exact_G.mean()
    return centred_G
