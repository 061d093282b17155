"""The ports: what an engine, a loss or an agent must offer to plug into asyncflow.

Anything with these methods fits; nothing is inherited. The contract suites in
`tests/contracts` run on every adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from asyncflow.core.types import (
    Completion,
    FloatArray,
    IntArray,
    MicroBatch,
    PolicyVersion,
    SamplingParams,
    StepReport,
    TokenChunk,
    WeightsRef,
)

OnTokens = Callable[[TokenChunk], None]

TensorT = TypeVar("TensorT")
"""The tensor type of the training engine: `torch.Tensor` in real ones, numpy's in scripted ones."""


class RolloutEngine(Protocol):
    """Samples completions from the policy."""

    async def generate(
        self, token_ids: IntArray, params: SamplingParams, *, session: str, on_tokens: OnTokens | None = None
    ) -> Completion:
        """Sample one completion of `token_ids`. Cancel the call to abort it.

        `session` names the conversation, so that its turns may share a cache. Raises
        `EngineLostError` when the engine died.
        """
        ...

    async def load_weights(self, weights: WeightsRef) -> PolicyVersion:
        """Serve these weights from now on, also for completions that have begun.

        Returns once that version is live. Raises `WeightSyncError` when the engine serves
        anything else than what it was sent.
        """
        ...

    async def aclose(self) -> None:
        """Release everything. May be called twice."""
        ...


class Renderer(Protocol):
    """Turns what an agent says to the policy into tokens, and what the policy says into text."""

    def prompt_ids(self, text: str) -> IntArray:
        """The tokens with which a conversation begins, up to where the policy writes."""
        ...

    def next_ids(self, text: str) -> IntArray:
        """The tokens of a later message, from the policy's end token to where it writes again."""
        ...

    def completion_ids(self, text: str) -> IntArray:
        """The tokens the policy would have to sample to say this, its end token included."""
        ...

    def text(self, token_ids: IntArray) -> str:
        """What the policy said, without special tokens."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end the policy's turn."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs(Generic[TensorT]):
    """What a loss sees of a packed micro-batch, token by token.

    `logprobs [T]` and `entropy [T]` are the trainer's and carry gradients; entry t belongs to
    token t and is 0 where `loss_mask` is false. `columns` holds the batch's columns as
    tensors, those that are per sample repeated for each token, so all are `[T]`.
    `weights [T]` are the aggregation's: a loss must multiply by them and sum.
    """

    logprobs: TensorT
    entropy: TensorT
    loss_mask: TensorT
    weights: TensorT
    columns: Mapping[str, TensorT]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput(Generic[TensorT]):
    """`loss` is a weighted sum over tokens, never a mean; `sums` are sums over sampled tokens."""

    loss: TensorT
    sums: Mapping[str, TensorT]


class Loss(Protocol[TensorT]):
    """A loss on packed tokens, with the weights that decide how tokens are aggregated.

    Nothing here divides by a batch size: the un-normalised sums of all micro-batches are
    divided once by the sum of their denominators, so streaming is exact.
    """

    def __call__(self, inputs: LossInputs[TensorT]) -> LossOutput[TensorT]:
        """The weighted sum of the token losses."""
        ...

    def weights(self, batch: MicroBatch) -> FloatArray:
        """The weight of each token, `[T]`; depends on nothing but the token's own sample."""
        ...

    def denominator(self, batch: MicroBatch) -> float:
        """What this batch adds to the denominator of the step."""
        ...


class Scorer(Protocol):
    """A policy that is asked for log-probabilities only. Every `TrainEngine` is one."""

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-probability of every token given those before it in its sample, `[T]`; 0 for the first."""
        ...

    async def aclose(self) -> None:
        """Release everything. May be called twice."""
        ...


class TrainEngine(Protocol[TensorT]):
    """Owns the weights that are trained."""

    @property
    def version(self) -> PolicyVersion:
        """The weights that the next gradient is taken at."""
        ...

    async def accumulate(self, batch: MicroBatch, loss: Loss[TensorT]) -> None:
        """Add the un-normalised gradient of `loss` on `batch`. Raises `NonFiniteError`."""
        ...

    async def apply(self, denominator: float) -> StepReport:
        """Divide the gradient by `denominator`, take one optimizer step; the version grows by 1."""
        ...

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        """Log-probability of every token given those before it in its sample, `[T]`; 0 for the first."""
        ...

    async def export_weights(self) -> WeightsRef:
        """Make the current weights readable for rollout engines.

        May run while gradients are accumulated. The reference stays valid until the export
        after the next one.
        """
        ...

    async def save(self, folder: Path) -> None:
        """Write weights, optimizer state and version into `folder`, which exists."""
        ...

    async def load(self, folder: Path) -> None:
        """Go back to what `save` wrote."""
        ...

    async def aclose(self) -> None:
        """Release everything. May be called twice."""
        ...
