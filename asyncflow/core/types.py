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

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True, order=True)
class RowId:
    """A row of the transfer queue: sibling `index` of the group with this ticket."""

    ticket: Ticket
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ragged:
    """A column of `S` rows with different lengths: `values [T]`, `lengths [S]` that add up to T."""

    values: NDArray[np.generic]
    lengths: IntArray

    @classmethod
    def stack(cls, rows: list[NDArray[np.generic]]) -> Ragged:
        """Join one array per row into a column.

        >>> Ragged.stack([np.array([1, 2]), np.array([3])]).values.tolist()
        [1, 2, 3]
        """
        return cls(values=np.concatenate(rows), lengths=np.array([len(row) for row in rows], np.int32))

    def rows(self) -> list[NDArray[np.generic]]:
        """Views of the rows, one array per row."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Samples packed for one forward pass: every column holds the same `S` rows in the same order.

    Columns are per token (lengths = tokens of the sample) or per sample (lengths all 1).
    """

    rows: tuple[RowId, ...]
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
    means of what the loss function reported (entropy, ratio, …).
    """

    version: PolicyVersion
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_samples: int
    metrics: Mapping[str, float]
