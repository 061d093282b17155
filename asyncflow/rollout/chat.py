"""`Chat`: through which an agent talks to the policy, and which keeps the record.

Tokens are recorded once, as the engine sampled them, and never made again from text.
**Invariant**: the prompt of every turn begins with all tokens of the turns before it; the
loss mask is true exactly on sampled tokens.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from asyncflow.core.ports import Renderer, RolloutEngine
from asyncflow.core.types import (
    NOT_SAMPLED,
    Completion,
    FinishReason,
    FloatArray,
    IntArray,
    Prompt,
    SamplingParams,
    Trajectory,
    VersionSpan,
)
from asyncflow.core.world import World, derive_seed


class Chat:
    """One conversation with the policy.

    `params` are those of every turn; the seed of turn k derives from theirs and k. `world` is
    where an agent takes its time and randomness from, and runs what would block (`run_foreign`).
    """

    def __init__(
        self, engine: RolloutEngine, renderer: Renderer, params: SamplingParams, session: str, world: World
    ) -> None:
        self.world = world
        self._engine = engine
        self._renderer = renderer
        self._params = params
        self._session = session
        self._turns: list[tuple[IntArray, Completion]] = []

    async def respond(self, text: str) -> str:
        """Add what the policy is told, sample its turn, and return the turn's text without the end token."""
        told = self._told(text)
        history = [array for heard, said in self._turns for array in (heard, said.token_ids)]
        params = replace(self._params, seed=derive_seed(self._params.seed, len(self._turns)))
        completion = await self._engine.generate(
            np.concatenate([*history, told]).astype(np.int32), params, session=self._session
        )
        self._turns.append((told, completion))
        return self._renderer.text(completion.token_ids)

    def _told(self, text: str) -> IntArray:
        """The tokens of a message. After a turn that was cut, they begin with the end token it lacks."""
        if not self._turns:
            return self._renderer.prompt_ids(text)
        end = self._renderer.stop_token_ids[:1] if self.was_cut else ()
        return np.concatenate([np.array(end, np.int32), self._renderer.next_ids(text)])

    def trajectory(self, prompt: Prompt, reward: float) -> Trajectory:
        """The record so far, with what it was worth. Needs at least one turn."""
        token_ids: list[IntArray] = []
        logprobs: list[FloatArray] = []
        versions: list[IntArray] = []
        mask: list[bool] = []
        for told, said in self._turns:
            token_ids += [told, said.token_ids]
            logprobs += [np.zeros(len(told), np.float32), said.logprobs]
            versions += [np.full(len(told), NOT_SAMPLED, np.int32), expand_versions(said.versions)]
            mask += [False] * len(told) + [True] * len(said.token_ids)
        last = self._turns[-1][1]
        return Trajectory(
            token_ids=np.concatenate(token_ids),
            loss_mask=np.array(mask),
            logprobs=np.concatenate(logprobs),
            versions=np.concatenate(versions),
            reward=reward,
            prompt_text=prompt.text,
            completion_text="\n".join(self._renderer.text(said.token_ids) for _, said in self._turns),
            finish_reason=last.finish_reason,
            num_turns=len(self._turns),
        )

    @property
    def num_turns(self) -> int:
        """Turns sampled so far."""
        return len(self._turns)

    @property
    def was_cut(self) -> bool:
        """Whether the last turn ended because it ran out of tokens."""
        return bool(self._turns) and self._turns[-1][1].finish_reason is FinishReason.LENGTH


def expand_versions(spans: tuple[VersionSpan, ...]) -> IntArray:
    """One version for each token, from run-length code.

    >>> expand_versions((VersionSpan(step=4, num_tokens=2), VersionSpan(step=5, num_tokens=1))).tolist()
    [4, 4, 5]
    """
    return np.repeat([span.step for span in spans], [span.num_tokens for span in spans]).astype(np.int32)


Agent = Callable[[Prompt, Chat], Awaitable[float]]
"""An environment is an asynchronous function over a chat that returns the reward."""
