"""The papers' formulas, token by token in float64, written without looking at the package.

Each function takes one sampled token: its log-prob now and when it was sampled, and its advantage.
"""

from collections.abc import Callable, Sequence
from math import exp, log, sqrt

TokenLoss = Callable[[float, float, float], float]


def ppo(low: float, high: float) -> TokenLoss:
    """PPO equation 7, DAPO equation 10."""

    def loss(now: float, behaviour: float, advantage: float) -> float:
        ratio = exp(now) / exp(behaviour)
        clipped = max(1 - low, min(1 + high, ratio))
        return -min(ratio * advantage, clipped * advantage)

    return loss


def decoupled(cap: float) -> TokenLoss:
    """AReaL equation 5 at the proximal policy, where the clipped ratio is 1; tokens over the cap are left out."""

    def loss(now: float, behaviour: float, advantage: float) -> float:
        weight = exp(now - behaviour)
        return 0.0 if weight > cap else -weight * advantage

    return loss


def truncated(cap: float) -> TokenLoss:
    """IMPALA section 4.2."""
    return lambda now, behaviour, advantage: -min(cap, exp(now - behaviour)) * advantage * now


def reinforce() -> TokenLoss:
    return lambda now, behaviour, advantage: -advantage * now


def kl_to_reference(now: float, reference: float) -> float:
    """DeepSeekMath equation 4."""
    quotient = exp(reference) / exp(now)
    return quotient - log(quotient) - 1


def step_loss(mode: str, max_tokens: int, samples: Sequence[Sequence[float]]) -> float:
    """The loss of a step from the losses of each sample's sampled tokens."""
    match mode:
        case "token_mean":
            return sum(map(sum, samples)) / sum(map(len, samples))
        case "sequence_mean":
            return sum(sum(sample) / len(sample) for sample in samples) / len(samples)
        case "constant":
            return sum(map(sum, samples)) / (len(samples) * max_tokens)
    raise ValueError(mode)


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """DeepSeekMath section 4.1.2."""
    mean = sum(rewards) / len(rewards)
    deviation = sqrt(sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))
    return [(reward - mean) / (deviation + 1e-6) for reward in rewards]
