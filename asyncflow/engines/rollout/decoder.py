"""Continuous batching: one call of `step` admits requests, computes their prompts, samples one token per row.

The decoder keeps one promise: the log-probability of every token is that of the policy
version named with it. So when the weights change in mid-completion, the keys and values of
the running rows, which the old weights computed, are computed again.

The last bits of a log-probability depend on the shapes of what is computed: on how many rows
there are and how long the longest is. A decoder that works `alone` runs one completion from
its first token to its last, in a cache of its own, so that every shape and every number
follows from the request and the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from asyncflow.core.types import BoolArray, FloatArray, IntArray
from asyncflow.engines.rollout.batch import Batch, Row
from asyncflow.engines.rollout.cache import SlotCache
from asyncflow.engines.rollout.messages import Chunk, Failed, Finished, Generate
from asyncflow.engines.rollout.model import decode, prefill
from asyncflow.engines.rollout.sampling import sample
from asyncflow.engines.rollout.scheduler import Limits, Request, Scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What one step did."""

    finished: tuple[Finished, ...]
    failed: tuple[Failed, ...]
    chunks: tuple[Chunk, ...]
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Prefix:
    """Tokens whose keys and values a row needs."""

    row: int
    token_ids: IntArray


class Decoder:
    """Samples completions from a model. Not thread-safe: one loop drives it.

    `on_progress` is called in the middle of long steps. `alone` runs one request at a time,
    whatever the limits say, and gives equal requests equal bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        limits: Limits,
        on_progress: Callable[[], None] = lambda: None,
        *,
        alone: bool = False,
    ) -> None:
        self._on_progress = on_progress
        self._model = model
        self._is_alone = alone
        self._limits = limits = replace(limits, max_running=1) if alone else limits
        self._scheduler = Scheduler(limits)
        self._batch = Batch(limits.max_running)
        self._cache = SlotCache()
        self._waiting: dict[int, Row] = {}
        self._is_cache_stale = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._scheduler.num_running + self._scheduler.num_waiting == 0

    @property
    def num_running(self) -> int:
        """Rows in use."""
        return len(self._batch)

    def submit(self, message: Generate) -> None:
        """Queue a request."""
        row = Row.of(message)
        self._waiting[message.request] = row
        request = Request(
            id=message.request,
            prompt_key=message.token_ids,
            prompt_tokens=len(row.prompt),
            max_tokens=row.params.max_tokens,
            priority=row.params.priority,
        )
        self._scheduler.submit(request)

    def abort(self, request: int) -> None:
        """Forget a request, wherever it is; unknown ones have just finished."""
        if self._scheduler.withdraw(request):
            del self._waiting[request]
        elif (row := self._scheduler.row_of(request)) is not None:
            self._release([row])

    def change_version(self, step: int) -> None:
        """The model's weights have just become those of `step`."""
        self._batch.change_version(step)
        self._is_cache_stale = True

    @torch.inference_mode()
    def step(self) -> Progress:
        """Admit what fits, then sample one token for every running row."""
        self._refresh()
        self._admit()
        tokens, lengths = (torch.from_numpy(column.copy()).to(self._model.device) for column in self._batch.inputs())
        logits = decode(self._model, self._cache, tokens, lengths, self._batch.longest)
        if self._is_alone:
            logits = logits.cpu()  # on a GPU, torch has no cumulative sum that gives equal bits
        sampled, logprobs = sample(logits, self._batch.sampling())
        done = self._batch.append(sampled.cpu().numpy(), logprobs.cpu().numpy())
        return self._collect(done, logprobs.cpu().numpy())

    def _refresh(self) -> None:
        """Compute the running rows' keys and values again after the weights have changed."""
        if self._is_cache_stale:
            self._prefill([Prefix(row, self._batch.sequence(row)) for row in range(len(self._batch))])
            self._is_cache_stale = False

    def _admit(self) -> None:
        """Start waiting requests; a prompt that a running row has begins as a copy of that row."""
        requests = self._scheduler.admit()
        if not requests:
            return
        if self._is_alone:
            self._cache = SlotCache()  # what ran before leaves neither its numbers nor its capacity behind
        known = {row.prompt_key: index for index, row in enumerate(self._batch.rows)}
        first = len(self._batch)
        for request in requests:
            self._batch.add(self._waiting.pop(request.id))
        self._cache.reserve(len(self._batch), self._batch.longest + 1)
        missing: list[Prefix] = []
        for row, added in enumerate(self._batch.rows[first:], first):
            sibling, prefix = known.get(added.prompt_key), added.prompt[:-1]
            if sibling is None:
                missing.append(Prefix(row, prefix))
            else:
                self._cache.copy_rows([sibling], [row], len(prefix))
        self._prefill(missing)

    def _prefill(self, prefixes: Sequence[Prefix]) -> None:
        """Compute and store the keys and values of these rows, each distinct prefix once."""
        siblings: dict[bytes, list[Prefix]] = {}
        for prefix in prefixes:
            siblings.setdefault(prefix.token_ids.tobytes(), []).append(prefix)
        siblings.pop(b"", None)
        by_length = sorted(siblings.values(), key=lambda same: len(same[0].token_ids))
        for chunk in _split(by_length, self._limits.prefill_tokens):
            self._prefill_chunk(chunk)
            self._on_progress()

    def _prefill_chunk(self, chunk: Sequence[Sequence[Prefix]]) -> None:
        longest = max(len(same[0].token_ids) for same in chunk)
        padded = np.zeros((len(chunk), longest), np.int64)
        for index, same in enumerate(chunk):
            padded[index, : len(same[0].token_ids)] = same[0].token_ids
        computed = prefill(self._model, torch.from_numpy(padded).to(self._model.device))
        rows = [prefix.row for same in chunk for prefix in same]
        sources = [index for index, same in enumerate(chunk) for _ in same]
        self._cache.fill(computed, sources, rows)

    def _collect(self, done: BoolArray, logprobs: FloatArray) -> Progress:
        broken = ~np.isfinite(logprobs)
        failed = tuple(
            Failed(request=self._batch.rows[row].request, kind="non_finite", reason=f"log-probability {logprobs[row]}")
            for row in np.flatnonzero(broken).tolist()
        )
        if failed:
            self._cache.clear(np.flatnonzero(broken).tolist())
        chunks = tuple(self._batch.chunks())
        finished = tuple(self._batch.finished(row) for row in np.flatnonzero(done & ~broken).tolist())
        ended = np.flatnonzero(done | broken).tolist()
        if ended:
            self._release(ended)
        return Progress(finished=finished, failed=failed, chunks=chunks, num_tokens=len(done))

    @torch.inference_mode()
    def _release(self, rows: list[int]) -> None:
        moves = self._scheduler.release(rows)
        if moves:
            length = int(self._batch.lengths[[move.source for move in moves]].max())
            self._cache.copy_rows([move.source for move in moves], [move.target for move in moves], length)
        self._batch.move(moves, self._scheduler.num_running)


def _split(by_length: Sequence[Sequence[Prefix]], most_tokens: int) -> list[list[Sequence[Prefix]]]:
    """Cut a list sorted by length into chunks of at most this many tokens, padding included; one fits always."""
    chunks: list[list[Sequence[Prefix]]] = []
    for same in by_length:
        if not chunks or (len(chunks[-1]) + 1) * len(same[0].token_ids) > most_tokens:
            chunks.append([])
        chunks[-1].append(same)
    return chunks
