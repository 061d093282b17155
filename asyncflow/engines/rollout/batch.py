"""The running completions: what was asked, what was sampled, which weights sampled it.

Row r belongs to the request in row r of the scheduler and of the KV cache. All that
changes with every token lives in arrays `[capacity]` or `[capacity, width]`, so that a decode
step costs the same few numpy calls however many rows run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.types import FinishReason, FloatArray, IntArray, SamplingParams, VersionSpan
from asyncflow.engines.rollout.messages import Chunk, Finished, Generate, ints
from asyncflow.engines.rollout.sampling import RowSampling
from asyncflow.engines.rollout.scheduler import Move

NO_TOKEN = -1

ScalarT = TypeVar("ScalarT", bound=np.generic)


@dataclass(slots=True)
class Row:
    """What does not change with every token. `closed` are the spans of earlier weights."""

    request: int
    prompt_key: bytes
    prompt: IntArray
    params: SamplingParams
    is_streamed: bool
    closed: list[VersionSpan] = field(default_factory=list)

    @classmethod
    def of(cls, message: Generate) -> Row:
        """The row of a request."""
        return cls(message.request, message.token_ids, ints(message.token_ids), message.params, message.is_streamed)

    @property
    def num_closed(self) -> int:
        """Tokens sampled under earlier weights."""
        return sum(span.num_tokens for span in self.closed)


class Batch:
    """Rows 0 .. `len` - 1 run. `step` is the policy version that samples the next token."""

    def __init__(self, capacity: int) -> None:
        self.rows: list[Row] = []
        self.step = 0
        self.lengths = np.zeros(capacity, np.int64)
        self._last = np.zeros(capacity, np.int64)
        self._counts = np.zeros(capacity, np.int32)
        self._max_tokens = np.zeros(capacity, np.int32)
        self._temperature = np.ones(capacity, np.float32)
        self._top_k = np.zeros(capacity, np.int32)
        self._top_p = np.ones(capacity, np.float32)
        self._seeds = np.zeros(capacity, np.uint64)
        self._stops: NDArray[np.int64] = np.full((capacity, 1), NO_TOKEN, np.int64)
        self._tokens: NDArray[np.int32] = np.zeros((capacity, 16), np.int32)
        self._logprobs: FloatArray = np.zeros((capacity, 16), np.float32)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def longest(self) -> int:
        """Cached tokens of the longest row."""
        return int(self.lengths[: len(self)].max())

    def add(self, row: Row) -> None:
        """Run a request in the next row. Its last prompt token is the first that is decoded."""
        index, params = len(self.rows), row.params
        self.rows.append(row)
        self.lengths[index] = len(row.prompt) - 1
        self._last[index] = row.prompt[-1]
        self._counts[index] = 0
        self._max_tokens[index] = params.max_tokens
        self._temperature[index] = params.temperature
        self._top_k[index] = params.top_k
        self._top_p[index] = params.top_p
        self._seeds[index] = params.seed & 0xFFFF_FFFF_FFFF_FFFF
        self._stops = _widen(self._stops, len(params.stop_token_ids), NO_TOKEN)
        self._stops[index] = NO_TOKEN
        self._stops[index, : len(params.stop_token_ids)] = params.stop_token_ids

    def inputs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tokens to decode `[B]`, and how many columns of the cache come before them `[B]`."""
        return self._last[: len(self)], self.lengths[: len(self)]

    def sampling(self) -> RowSampling:
        """How to sample the next token of every row."""
        num_rows = len(self)
        return RowSampling(
            temperature=self._temperature[:num_rows],
            top_k=self._top_k[:num_rows],
            top_p=self._top_p[:num_rows],
            seeds=self._seeds[:num_rows],
            indices=self._counts[:num_rows],
        )

    def append(self, tokens: NDArray[np.int64], logprobs: FloatArray) -> NDArray[np.bool_]:
        """Record one sampled token per row, `[B]`; gives which rows are done, `[B]`."""
        num_rows = len(self)
        counts = self._counts[:num_rows]
        width = int(counts.max()) + 1
        self._tokens, self._logprobs = _widen(self._tokens, width, 0), _widen(self._logprobs, width, 0)
        index = np.arange(num_rows)
        self._tokens[index, counts] = tokens
        self._logprobs[index, counts] = logprobs
        self._last[:num_rows] = tokens
        counts += 1
        self.lengths[:num_rows] += 1
        return (counts >= self._max_tokens[:num_rows]) | self._is_stopped(num_rows)

    def sequence(self, row: int) -> IntArray:
        """The tokens of a row whose keys and values the cache must hold: all but the last."""
        sampled = self._tokens[row, : self._counts[row]]
        return np.concatenate([self.rows[row].prompt, sampled])[:-1]

    def change_version(self, step: int) -> None:
        """From now on tokens are sampled under the weights of `step`."""
        for index, row in enumerate(self.rows):
            self._close_span(row, int(self._counts[index]))
        self.step = step

    def finished(self, index: int) -> Finished:
        """The completion in a row that is done."""
        row, count = self.rows[index], int(self._counts[index])
        self._close_span(row, count)
        stopped = int(self._last[index]) in row.params.stop_token_ids
        return Finished(
            request=row.request,
            token_ids=self._tokens[index, :count].tobytes(),
            logprobs=self._logprobs[index, :count].tobytes(),
            versions=tuple(row.closed),
            finish_reason=FinishReason.STOP if stopped else FinishReason.LENGTH,
        )

    def chunks(self) -> list[Chunk]:
        """The token just sampled, of every row that is streamed."""
        return [self._chunk(index) for index, row in enumerate(self.rows) if row.is_streamed]

    def move(self, moves: Sequence[Move], num_kept: int) -> None:
        """Carry out the scheduler's moves; rows from `num_kept` on are gone."""
        if moves:
            targets, sources = [move.target for move in moves], [move.source for move in moves]
            for column in self._columns():
                column[targets] = column[sources]
            for move in moves:
                self.rows[move.target] = self.rows[move.source]
        del self.rows[num_kept:]

    def _chunk(self, index: int) -> Chunk:
        last = slice(self._counts[index] - 1, self._counts[index])
        return Chunk(
            request=self.rows[index].request,
            token_ids=self._tokens[index, last].tobytes(),
            logprobs=self._logprobs[index, last].tobytes(),
            step=self.step,
        )

    def _close_span(self, row: Row, count: int) -> None:
        if count > row.num_closed:
            row.closed.append(VersionSpan(step=self.step, num_tokens=count - row.num_closed))

    def _is_stopped(self, num_rows: int) -> NDArray[np.bool_]:
        stopped: NDArray[np.bool_] = (self._stops[:num_rows] == self._last[:num_rows, None]).any(axis=1)
        return stopped

    def _columns(self) -> tuple[NDArray[np.generic], ...]:
        small = (self.lengths, self._last, self._counts, self._max_tokens, self._temperature, self._top_k, self._top_p)
        return (*small, self._seeds, self._stops, self._tokens, self._logprobs)


def _widen(array: NDArray[ScalarT], width: int, fill: int) -> NDArray[ScalarT]:
    """The array with at least this many columns; growing doubles."""
    if width <= array.shape[1]:
        return array
    wide = np.full((len(array), max(width, 2 * array.shape[1])), fill, array.dtype)
    wide[:, : array.shape[1]] = array
    return wide
