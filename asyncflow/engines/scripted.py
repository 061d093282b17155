"""Scripted engines: the ports without a model, for tests and simulation.

They keep the contracts of the real ones (per-token versions, weights that change in
mid-completion, cancellation) and take the time they are told to. Numpy only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from asyncflow.core.errors import EngineLostError, RolloutError
from asyncflow.core.metrics import NullObserver, Observer
from asyncflow.core.ports import Loss, LossInputs, LossOutput, OnTokens
from asyncflow.core.types import (
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    MicroBatch,
    PolicyVersion,
    SamplingParams,
    StepReport,
    TokenChunk,
    VersionSpan,
    WeightsRef,
)
from asyncflow.core.world import World

END_TOKEN = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How long things take, in seconds, and how often they fail. Every draw derives from a seed.

    `completion_s` and `num_tokens` are drawn for each completion, `accumulate_s` and `logprobs_s`
    for each micro-batch (given its tokens), `apply_s` for each step, `load_s` for each weight load.
    """

    completion_s: Callable[[np.random.Generator], float] = lambda rng: 1.0
    num_tokens: Callable[[np.random.Generator], int] = lambda rng: int(rng.integers(1, 9))
    accumulate_s: Callable[[np.random.Generator, int], float] = lambda rng, tokens: 0.01 * tokens
    logprobs_s: Callable[[np.random.Generator, int], float] = lambda rng, tokens: 0.003 * tokens
    apply_s: Callable[[np.random.Generator], float] = lambda rng: 0.1
    load_s: Callable[[np.random.Generator], float] = lambda rng: 0.1
    failure_rate: float = 0.0
    crash_rate: float = 0.0


@dataclass(slots=True, kw_only=True)
class ScriptedRollout:
    """A rollout engine with `slots` places; a completion takes its time in as many chunks as it has tokens."""

    world: World
    script: Script
    slots: int = 1024
    observer: Observer = field(default_factory=NullObserver)
    live: PolicyVersion = field(default_factory=lambda: PolicyVersion(step=0))
    _places: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._places = asyncio.Semaphore(self.slots)

    async def generate(
        self, token_ids: IntArray, params: SamplingParams, *, session: str, on_tokens: OnTokens | None = None
    ) -> Completion:
        """Draw a completion; each token carries the version that was live when it was due."""
        rng = self.world.rng("completion", params.seed)
        num_tokens = min(self.script.num_tokens(rng), params.max_tokens)
        token_s = self.script.completion_s(rng) / num_tokens
        fails, crashes = rng.random() < self.script.failure_rate, rng.random() < self.script.crash_rate
        sampled = rng.integers(1, 100, num_tokens).astype(np.int32)
        sampled[-1] = END_TOKEN
        async with self._places:
            start_s = self.world.now_s()
            versions = [await self._token(token, token_s, on_tokens) for token in sampled]
            self.observer.span("rollout", "completion", start_s, self.world.now_s())
        if crashes:
            raise EngineLostError(f"scripted crash in session {session}")
        if fails:
            raise RolloutError(f"scripted failure in session {session}")
        return Completion(
            token_ids=sampled,
            logprobs=np.full(num_tokens, -1.0, np.float32),
            versions=run_lengths(versions),
            finish_reason=FinishReason.STOP,
        )

    async def _token(self, token: int, token_s: float, on_tokens: OnTokens | None) -> int:
        await asyncio.sleep(token_s)
        step = self.live.step
        if on_tokens is not None:
            on_tokens(TokenChunk(token_ids=np.array([token], np.int32), logprobs=np.full(1, -1, np.float32), step=step))
        return step

    async def load_weights(self, weights: WeightsRef) -> PolicyVersion:
        """Take the drawn time; completions go on meanwhile under the old weights."""
        rng = self.world.rng("load", weights.version.step)
        await asyncio.sleep(self.script.load_s(rng))
        self.live = weights.version
        return weights.version

    async def aclose(self) -> None:
        """Nothing to release."""


@dataclass(slots=True, kw_only=True)
class ScriptedTrainer:
    """A training engine whose whole state is its version and what it was given."""

    world: World
    script: Script
    observer: Observer = field(default_factory=NullObserver)
    step: int = 0
    lineage: str = "scripted"
    trained_rows: list[tuple[int, int, int]] = field(default_factory=list)
    _num_tokens: int = 0
    _num_samples: int = 0

    @property
    def version(self) -> PolicyVersion:
        """Steps applied."""
        return PolicyVersion(step=self.step, lineage=self.lineage)

    async def accumulate(self, batch: MicroBatch, loss: Loss[FloatArray]) -> None:
        """Take the drawn time and remember the rows."""
        rng = self.world.rng("accumulate", self.step, self._num_tokens)
        await self._busy("accumulate", self.script.accumulate_s(rng, batch.num_tokens))
        self._num_tokens += batch.num_tokens
        self._num_samples += len(batch.rows)
        pairs = zip(batch.rows.tickets.tolist(), batch.rows.indices.tolist(), strict=True)
        self.trained_rows += [(ticket, index, self.step) for ticket, index in pairs]

    async def apply(self, denominator: float) -> StepReport:
        """Take the drawn time; the version grows by 1."""
        rng = self.world.rng("apply", self.step)
        await self._busy("apply", self.script.apply_s(rng))
        self.step += 1
        report = StepReport(
            version=self.version,
            loss=0.0,
            grad_norm=0.0,
            learning_rate=0.0,
            num_tokens=self._num_tokens,
            num_samples=self._num_samples,
            metrics={},
        )
        self._num_tokens = self._num_samples = 0
        return report

    async def _busy(self, name: str, seconds: float) -> None:
        start_s = self.world.now_s()
        await asyncio.sleep(seconds)
        self.observer.span("train", name, start_s, self.world.now_s())

    async def logprobs(self, batch: MicroBatch) -> FloatArray:
        """A constant, after the drawn time."""
        rng = self.world.rng("logprobs", int(batch.rows.tickets[0]), int(batch.rows.indices[0]))
        await asyncio.sleep(self.script.logprobs_s(rng, batch.num_tokens))
        return np.full(batch.num_tokens, -1.0, np.float32)

    async def export_weights(self) -> WeightsRef:
        """A version without weights."""
        return WeightsRef(version=self.version, address="none:")

    async def save(self, folder: Path) -> None:
        """Write the version."""
        self.world.disk.write(folder / "scripted.json", json.dumps({"step": self.step}).encode())

    async def load(self, folder: Path) -> None:
        """Read the version."""
        self.step = int(json.loads(self.world.disk.read(folder / "scripted.json"))["step"])

    async def aclose(self) -> None:
        """Nothing to release."""


class CountTokens:
    """A loss for scripted trainers: every sampled token weighs 1, the denominator counts them."""

    def __call__(self, inputs: LossInputs[FloatArray]) -> LossOutput[FloatArray]:
        """Zero."""
        return LossOutput(loss=np.zeros(1, np.float32), sums={})

    def weights(self, batch: MicroBatch) -> FloatArray:
        """The loss mask."""
        return batch["loss_mask"].astype(np.float32)

    def denominator(self, batch: MicroBatch) -> float:
        """Sampled tokens."""
        return float(np.count_nonzero(batch["loss_mask"]))


class ScriptedRenderer:
    """One token for each character."""

    stop_token_ids: tuple[int, ...] = (END_TOKEN,)

    def prompt_ids(self, text: str) -> IntArray:
        """Code points."""
        return np.array([ord(character) for character in text], np.int32)

    def next_ids(self, text: str) -> IntArray:
        """Code points."""
        return self.prompt_ids(text)

    def completion_ids(self, text: str) -> IntArray:
        """Code points and the end."""
        return np.append(self.prompt_ids(text), np.int32(END_TOKEN))

    def text(self, token_ids: IntArray) -> str:
        """Token numbers, spaced."""
        return " ".join(str(token) for token in token_ids if token != END_TOKEN)


def run_lengths(versions: list[int]) -> tuple[VersionSpan, ...]:
    """Run-length code of one version for each token.

    >>> run_lengths([4, 4, 5])
    (VersionSpan(step=4, num_tokens=2), VersionSpan(step=5, num_tokens=1))
    """
    starts = [i for i, step in enumerate(versions) if i == 0 or step != versions[i - 1]]
    ends = [*starts[1:], len(versions)]
    return tuple(
        VersionSpan(step=versions[start], num_tokens=end - start) for start, end in zip(starts, ends, strict=True)
    )
