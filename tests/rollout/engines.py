"""Rollout engines for tests of what talks to one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from asyncflow.core.ports import OnTokens
from asyncflow.core.types import (
    Completion,
    FinishReason,
    IntArray,
    PolicyVersion,
    SamplingParams,
    VersionSpan,
    WeightsRef,
)
from asyncflow.core.world import MemoryDisk, World
from asyncflow.engines.scripted import ScriptedRenderer
from asyncflow.rollout.chat import Agent
from asyncflow.rollout.groups import RolloutParts


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What an engine was asked."""

    token_ids: IntArray
    params: SamplingParams
    session: str


def say(
    *token_ids: int, versions: Sequence[tuple[int, int]] = (), reason: FinishReason = FinishReason.STOP
) -> Completion:
    """A completion; `versions` holds pairs (step, tokens), by default all of step 0."""
    return Completion(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.array([-(place + 1) / 8 for place in range(len(token_ids))], np.float32),
        versions=tuple(VersionSpan(step=s, num_tokens=n) for s, n in versions or [(0, len(token_ids))]),
        finish_reason=reason,
    )


@dataclass(slots=True)
class TellingEngine:
    """Says what it was given to say, in its order, and keeps what it was asked; then says `otherwise`."""

    completions: list[Completion] = field(default_factory=list)
    otherwise: Completion = field(default_factory=lambda: say(7, 0))
    error: Exception | None = None
    calls: list[Call] = field(default_factory=list)

    async def generate(
        self, token_ids: IntArray, params: SamplingParams, *, session: str, on_tokens: OnTokens | None = None
    ) -> Completion:
        self.calls.append(Call(token_ids=token_ids, params=params, session=session))
        if self.error is not None:
            raise self.error
        return self.completions.pop(0) if self.completions else self.otherwise

    async def load_weights(self, weights: WeightsRef) -> PolicyVersion:
        return weights.version

    async def aclose(self) -> None:
        """Nothing to release."""


@dataclass(slots=True)
class SilentEngine:
    """Never answers; counts who waits and who was aborted."""

    num_waiting: int = 0
    num_aborted: int = 0

    async def generate(
        self, token_ids: IntArray, params: SamplingParams, *, session: str, on_tokens: OnTokens | None = None
    ) -> Completion:
        self.num_waiting += 1
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            self.num_aborted += 1
            raise
        raise AssertionError("waited for ever")

    async def load_weights(self, weights: WeightsRef) -> PolicyVersion:
        return weights.version

    async def aclose(self) -> None:
        """Nothing to release."""


def make_parts(engine: TellingEngine | SilentEngine, agent: Agent, *, time_limit_s: float = 60.0) -> RolloutParts:
    """What rollouts share, in a simulated world."""
    return RolloutParts(
        engine=engine,
        renderer=ScriptedRenderer(),
        agent=agent,
        params=SamplingParams(max_tokens=8, stop_token_ids=(0,)),
        time_limit_s=time_limit_s,
        world=World(seed=3, disk=MemoryDisk(), is_real=False),
    )
