"""Log-probability and entropy of each token from its logits, without keeping a copy of the vocabulary's size.

The automatic backward pass would keep the log-softmax, its exponential and their product
next to the logits. Here only the logits are kept; the rest is made again, a few rows at a
time, in float32.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22
"""Logits worked on at once: 16 MiB in float32."""


def token_logprobs(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`log pi(target)` and the entropy of `pi = softmax(logits / temperature)`, both `[N]` in float32."""
    return cast(tuple[Tensor, Tensor], cast(Any, _TokenLogprobs).apply(logits_NV, targets_N, temperature))


class _TokenLogprobs(torch.autograd.Function):
    """With p the softmax: d log p_t / d logits = onehot(t) - p; d entropy / d logits = -p (log p + entropy)."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        logits_NV: Tensor,
        targets_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
        entropy_N = torch.empty_like(logprobs_N)
        for rows in _chunks(logits_NV):
            log_p = _log_softmax(logits_NV[rows], temperature)
            logprobs_N[rows] = log_p.gather(1, targets_N[rows, None]).squeeze(1)
            entropy_N[rows] = torch.special.entr(log_p.exp_()).sum(1)
        ctx.save_for_backward(logits_NV, targets_N, entropy_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        grad_logprobs_N: Tensor | None,
        grad_entropy_N: Tensor | None,
    ) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, entropy_N = ctx.saved_tensors
        grad_logits_NV = torch.zeros_like(logits_NV)
        for rows in _chunks(logits_NV):
            log_p = _log_softmax(logits_NV[rows], ctx.temperature)
            p = log_p.exp()
            grad = torch.zeros_like(p)
            if grad_logprobs_N is not None:
                grad -= p * grad_logprobs_N[rows, None]
                grad.scatter_add_(1, targets_N[rows, None], grad_logprobs_N[rows, None])
            if grad_entropy_N is not None:  # entr(p) = -p log p, and 0 where p is 0
                grad += (torch.special.entr(p) - p * entropy_N[rows, None]) * grad_entropy_N[rows, None]
            grad_logits_NV[rows] = grad.div_(ctx.temperature).to(logits_NV.dtype)
        return grad_logits_NV, None, None


def _chunks(logits_NV: Tensor) -> list[slice]:
    num_rows, width = logits_NV.shape
    height = max(1, CHUNK_ELEMENTS // width)
    return [slice(start, start + height) for start in range(0, num_rows, height)]


def _log_softmax(logits_NV: Tensor, temperature: float) -> Tensor:
    scaled_NV = logits_NV.float() if temperature == 1 else logits_NV.float() / temperature
    return torch.log_softmax(scaled_NV, dim=1)
