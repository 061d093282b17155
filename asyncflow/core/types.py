"""The nouns: what flows from prompts to gradients.

Letters for shapes: `G` siblings in a group, `n` tokens in a completion, `L` tokens in a
sample, `T` tokens in a packed micro-batch, `S` samples in it, `V` vocabulary.
Log-probabilities are natural logs.

A sample is one trainable token sequence. With prompt `12+` and completion `3=` (end `.`)::

    token_ids   1   2   +   3   =   .
    loss_mask   0   0   0   1   1   1     sampled by the policy
    logprobs    0   0   0  -.1 -.2  0     of the sampled tokens, when they were sampled
    versions   -1  -1  -1   4   4   5     optimizer steps applied to the weights that sampled it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

Ticket = NewType("Ticket", int)
"""Admission number of a group: 0, 1, 2, … in the order in which rollouts were allowed to start."""

NOT_SAMPLED = -1
"""In a sample's `versions`: this token came from the prompt or a tool, no policy sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyVersion:
    """Which weights: `step` optimizer steps applied within a lineage.

    The lineage changes when a resume could not reproduce the weights bit for bit.
    The fingerprint is a hash of the weights; empty where an engine can't compute one.
    """

    step: int
    lineage: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRef:
    """Where an engine finds the weights of a version.

    `address` is `memory:SLOT` in a shared-memory channel, `file:PATH`, or `none:` for
    engines without weights.
    """

    version: PolicyVersion
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task. `id` is unique in its data set; `fields` holds whatever a reward needs."""

    id: str
    text: str
    answer: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt with a completion to imitate, for the supervised warm-up."""

    prompt: Prompt
    completion: str


class FinishReason(StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one completion.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 leave the distribution as it is.
    Equal seeds give equal completions under equal weights, whatever else the engine runs.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSpan:
    """`num_tokens` consecutive tokens sampled under the weights after `step` optimizer steps."""

    step: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Tokens of an unfinished completion, in the order in which they were sampled."""

    token_ids: IntArray
    logprobs: FloatArray
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine returns: `token_ids [n]` and `logprobs [n]`.

    The log-probs are those of the distribution really sampled from. `versions` is run-length
    coded and its counts add up to n; the weights may change in mid-completion. The stop
    token, where one was sampled, is the last of `token_ids`.
    """

    token_ids: IntArray
    logprobs: FloatArray
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """The record of one rollout: aligned columns of length `[L]`, and what it was worth."""

    token_ids: IntArray
    loss_mask: BoolArray
    logprobs: FloatArray
    versions: IntArray
    reward: float
    prompt_text: str
    completion_text: str
    finish_reason: FinishReason
    num_turns: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G sibling trajectories of one prompt: the unit of admission, advantage and staleness."""

    ticket: Ticket
    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """A handle of rows of the transfer queue: sibling `indices[i]` of the group with ticket `tickets[i]`.

    Tickets are never used again, so a handle names the same rows for ever, whether they are
    still there or not. `generation` is the queue's. Select, reorder and split it like an array.

    >>> rows = Rows.of_groups(np.array([4, 7]), 2)
    >>> rows[np.array([3, 0])].tickets.tolist(), len(rows[1:])
    ([7, 4], 3)
    """

    tickets: NDArray[np.int64]
    indices: IntArray
    generation: int = 0

    @classmethod
    def of_groups(cls, tickets: NDArray[np.int64], group_size: int, generation: int = 0) -> Rows:
        """All rows of groups that have `group_size` each."""
        if group_size == 1:
            return cls(tickets, np.zeros(len(tickets), np.int32), generation)
        indices = np.tile(np.arange(group_size, dtype=np.int32), len(tickets))
        return cls(np.repeat(tickets, group_size), indices, generation)

    @classmethod
    def join(cls, parts: Sequence[Rows]) -> Rows:
        """Handles behind each other; they must be of one queue."""
        generation = parts[0].generation
        if any(part.generation != generation for part in parts):
            raise ValueError("handles of different queues can't be joined")
        tickets = np.concatenate([part.tickets for part in parts])
        return cls(tickets, np.concatenate([part.indices for part in parts]), generation)

    def __getitem__(self, places: slice | NDArray[np.integer] | NDArray[np.bool_]) -> Rows:
        """Some of the rows, in the order of `places`."""
        return Rows(self.tickets[places], self.indices[places], self.generation)

    def __len__(self) -> int:
        """Number of rows, S."""
        return len(self.tickets)

    def __eq__(self, other: object) -> bool:
        """Whether these are the same rows in the same order."""
        return (
            isinstance(other, Rows)
            and self.generation == other.generation
            and np.array_equal(self.tickets, other.tickets)
            and np.array_equal(self.indices, other.indices)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A column of `S` rows with different lengths: `values [T]`, `lengths [S]` that add up to T.

    Values may have further dimensions, `[T, ...]`. A row of length -1 is None. Where the
    column `is_dense`, a row is `values[i]` itself, and all lengths are 1. `dtype` names what
    numpy has no name for: `bfloat16`, whose bits are uint16, and `str`, whose bytes are UTF-8.
    """

    values: NDArray[np.generic]
    lengths: IntArray
    dtype: str = ""
    is_dense: bool = False

    @classmethod
    def stack(cls, rows: Sequence[NDArray[np.generic]]) -> Ragged:
        """Join one array per row into a column.

        >>> Ragged.stack([np.array([1, 2]), np.array([3])]).values.tolist()
        [1, 2, 3]
        """
        return cls(values=np.concatenate(rows), lengths=np.array([len(row) for row in rows], np.int32))

    def rows(self) -> list[NDArray[np.generic]]:
        """Views of the rows, one array per row; those that are None are empty."""
        return np.split(self.values, np.cumsum(np.maximum(self.lengths, 0))[:-1])

    def to_list(self) -> list[NDArray[np.generic] | str | None]:
        """The rows as they were put: arrays, strings or None.

        >>> Ragged(values=np.frombuffer(b"hi", np.uint8), lengths=np.array([2, -1], np.int32), dtype="str").to_list()
        ['hi', None]
        """
        if self.is_dense:
            return [np.asarray(value) for value in self.values]
        pairs = zip(self.rows(), self.lengths, strict=True)
        return [None if length < 0 else _row(row, self.dtype) for row, length in pairs]


def _row(row: NDArray[np.generic], dtype: str) -> NDArray[np.generic] | str:
    return row.tobytes().decode() if dtype == "str" else row


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples packed for one forward pass: every column holds the same `S` rows in the same order.

    Columns are per token (lengths = tokens of the sample) or per sample (lengths all 1).
    """

    rows: Rows
    columns: Mapping[str, Ragged]

    @property
    def lengths(self) -> IntArray:
        """Tokens in each sample, `[S]`."""
        return self.columns["token_ids"].lengths

    @property
    def num_tokens(self) -> int:
        """Tokens in all samples: T."""
        return int(self.lengths.sum())

    def __getitem__(self, column: str) -> NDArray[np.generic]:
        """The packed values of a column, `[T]` or `[S]`."""
        return self.columns[column].values


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """What one optimizer step did.

    `loss` is the loss that was differentiated, `denominator` included; `metrics` holds token
    means of what the loss function reported (entropy, ratio, …). `num_threads`: on how many CPU
    threads each micro-batch and, last, the optimizer computed; empty where that changes no bits.
    """

    version: PolicyVersion
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_samples: int
    metrics: Mapping[str, float]
    num_threads: tuple[int, ...] = ()
