"""Sampling one token per row, with randomness that depends on nothing but the row's own seed.

The uniform number of token `i` of a request with seed `s` is a hash of `(s, i)` (splitmix64:
Steele et al., "Fast splittable pseudorandom number generators", 2014), and the token is where
it falls in the cumulative distribution. So equal seeds give equal completions whatever the
batch neighbours are, as long as the logits are equal too.

Log-probabilities returned are those of the distribution really sampled from: after
temperature, top-k and top-p, renormalised. A greedy row (temperature 0) always takes the most
likely token; its log-probability is that of the untempered, unfiltered distribution.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from asyncflow.core.types import FloatArray, IntArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """How each row is sampled: arrays `[B]`; `indices` counts the tokens sampled before."""

    temperature: FloatArray
    top_k: IntArray
    top_p: FloatArray
    seeds: NDArray[np.uint64]
    indices: IntArray


def mix(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser: every bit of the result depends on every bit of the input."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def uniforms(seeds: NDArray[np.uint64], indices: IntArray) -> NDArray[np.float64]:
    """One number in [0, 1) for each pair of seed and index, `[B]`."""
    counters = mix(seeds + GOLDEN) + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN
    return (mix(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample(logits: Tensor, rows: RowSampling) -> tuple[Tensor, Tensor]:
    """Token ids int64 `[B]` and their log-probs float32 `[B]`, from `logits [B, V]`."""
    logits = logits.float()
    greedy = rows.temperature == 0
    scaled = logits
    if (rows.temperature != 1).any():
        temperature = np.where(greedy, np.float32(1), rows.temperature)
        scaled = logits / torch.from_numpy(temperature).to(logits.device)[:, None]
    filtered = np.flatnonzero(((rows.top_k > 0) | (rows.top_p < 1)) & ~greedy)
    if filtered.size:
        scaled = _filter_rows(scaled, filtered, rows)
    logprobs = scaled.log_softmax(-1)
    tokens = invert(logprobs, torch.from_numpy(uniforms(rows.seeds, rows.indices)).to(logits.device, torch.float32))
    if greedy.any():
        tokens = torch.where(torch.from_numpy(greedy).to(logits.device), logits.argmax(-1), tokens)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def invert(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the row's `uniform [B]` in [0, 1], for `logprobs [B, V]`."""
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1]
    # Rounding must not lift the target to the total: past the end lie tokens of probability 0.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp_(max=logprobs.shape[1] - 1)


def _filter_rows(logits: Tensor, filtered: NDArray[np.intp], rows: RowSampling) -> Tensor:
    """Logits `[B, V]` with the tokens outside top-k and top-p at -inf in the rows `filtered`."""
    index = torch.from_numpy(filtered).to(logits.device)
    top_k = torch.from_numpy(rows.top_k[filtered]).to(logits.device)
    top_p = torch.from_numpy(rows.top_p[filtered]).to(logits.device)
    logits = logits.clone()
    logits[index] = keep_top(logits[index], top_k, top_p)
    return logits


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Keep the `top_k [B]` most likely tokens, of these the fewest that hold `top_p [B]`; the rest is -inf.

    `top_k` 0 keeps all. The most likely token always stays.
    """
    vocabulary = logits.shape[-1]
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    limit = torch.where(top_k > 0, top_k, vocabulary)[:, None]
    ranked = ranked.masked_fill(torch.arange(vocabulary, device=logits.device) >= limit, -torch.inf)
    probabilities = ranked.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = (before >= top_p[:, None]) & (top_p < 1)[:, None]
    drop[:, 0] = False
    return torch.empty_like(logits).scatter_(-1, order, ranked.masked_fill(drop, -torch.inf))
