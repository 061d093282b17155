"""What every rollout engine promises, as functions over an engine.

An adapter's tests start an engine and run these (see `SUITE`). A check may leave the engine
under any weights, but running. `closing_is_final` is apart, because it does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np
import pytest

from asyncflow.core.errors import EngineLostError, RolloutError, WeightSyncError
from asyncflow.core.ports import RolloutEngine
from asyncflow.core.types import Completion, FinishReason, FloatArray, IntArray, SamplingParams, TokenChunk, WeightsRef

SESSION = "test"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An engine and what is needed to judge it.

    Prompts are drawn from ids below `vocabulary`; `num_slots` completions run at once. `publish`
    makes other weights readable, the next step each time, and `score` gives the log-prob of
    every token of a sequence but the first under the weights of a step that it published.
    """

    engine: RolloutEngine
    vocabulary: int
    num_slots: int
    publish: Callable[[], WeightsRef]
    score: Callable[[IntArray, int], FloatArray]

    def prompt(self, length: int, seed: int = 0) -> IntArray:
        """A prompt of random tokens."""
        return np.random.default_rng(seed).integers(0, self.vocabulary, length).astype(np.int32)

    async def generate(self, prompt: IntArray, params: SamplingParams) -> Completion:
        """One completion."""
        return await self.engine.generate(prompt, params, session=SESSION)

    async def generate_all(self, prompts: list[IntArray], params: list[SamplingParams]) -> list[Completion]:
        """Completions that run at the same time."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self.generate(prompt, one), name=f"generate {index}")
                for index, (prompt, one) in enumerate(zip(prompts, params, strict=True))
            ]
        return [task.result() for task in tasks]


def same(one: Completion, other: Completion) -> bool:
    """Whether two completions hold the same tokens, and log-probs up to rounding."""
    return np.array_equal(one.token_ids, other.token_ids) and np.allclose(one.logprobs, other.logprobs, atol=1e-4)


def assert_scored(subject: Subject, prompt: IntArray, completion: Completion) -> None:
    """Every log-prob is that of the weights that the completion names for its token."""
    sequence, start = np.concatenate([prompt, completion.token_ids]), 0
    for span in completion.versions:
        tokens = slice(start, start + span.num_tokens)
        expected = subject.score(sequence, span.step)[len(prompt) - 1 :][tokens]
        np.testing.assert_allclose(completion.logprobs[tokens], expected, atol=1e-4)
        start += span.num_tokens


async def a_completion_is_aligned(subject: Subject) -> None:
    completion = await subject.generate(subject.prompt(5), SamplingParams(max_tokens=7))
    assert len(completion.token_ids) == len(completion.logprobs) == 7
    assert completion.finish_reason is FinishReason.LENGTH
    assert sum(span.num_tokens for span in completion.versions) == 7
    assert completion.token_ids.dtype == np.int32
    assert completion.logprobs.dtype == np.float32
    assert (completion.logprobs <= 0).all()
    assert (completion.token_ids < subject.vocabulary).all()


async def a_prompt_of_one_token_is_enough(subject: Subject) -> None:
    assert len((await subject.generate(subject.prompt(1), SamplingParams(max_tokens=3))).token_ids) == 3


async def logprobs_are_those_of_the_version_named(subject: Subject) -> None:
    await subject.engine.load_weights(subject.publish())
    prompts = [subject.prompt(length, seed=length) for length in (1, 4, 9)]
    params = [SamplingParams(max_tokens=10, seed=seed) for seed in range(3)]
    for prompt, completion in zip(prompts, await subject.generate_all(prompts, params), strict=True):
        assert_scored(subject, prompt, completion)


async def equal_seeds_give_equal_completions_in_any_company(subject: Subject) -> None:
    prompt, params = subject.prompt(6), SamplingParams(max_tokens=12, seed=5)
    alone = await subject.generate(prompt, params)
    others = [SamplingParams(max_tokens=4 + seed, seed=seed) for seed in range(10, 15)]
    crowd = await subject.generate_all(
        [subject.prompt(seed, seed=seed) for seed in range(1, 6)] + [prompt], [*others, params]
    )
    assert same(crowd[-1], alone)
    assert not same(await subject.generate(prompt, SamplingParams(max_tokens=12, seed=6)), alone)


async def more_requests_than_slots_are_all_served(subject: Subject) -> None:
    count = 3 * subject.num_slots + 1
    prompts = [subject.prompt(1 + seed % 7, seed=seed) for seed in range(count)]
    params = [SamplingParams(max_tokens=1 + seed % 5, seed=seed) for seed in range(count)]
    completions = await subject.generate_all(prompts, params)
    assert [len(one.token_ids) for one in completions] == [one.max_tokens for one in params]


async def a_stop_token_ends_a_completion(subject: Subject) -> None:
    prompt, params = subject.prompt(4), SamplingParams(max_tokens=20, seed=1)
    whole = await subject.generate(prompt, params)
    stop = int(whole.token_ids[5])
    length = whole.token_ids.tolist().index(stop) + 1
    stops = (subject.vocabulary + 5, stop)
    stopped = await subject.generate(prompt, SamplingParams(max_tokens=20, seed=1, stop_token_ids=stops))
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.token_ids.tolist() == whole.token_ids[:length].tolist()


async def greedy_ignores_the_seed(subject: Subject) -> None:
    prompt = subject.prompt(4)
    one, other = [
        await subject.generate(prompt, SamplingParams(max_tokens=8, temperature=0, seed=seed)) for seed in (1, 2)
    ]
    assert same(one, other)


async def chunks_add_up_to_the_completion(subject: Subject) -> None:
    chunks: list[TokenChunk] = []
    completion = await subject.engine.generate(
        subject.prompt(3), SamplingParams(max_tokens=9), session=SESSION, on_tokens=chunks.append
    )
    assert np.concatenate([chunk.token_ids for chunk in chunks]).tolist() == completion.token_ids.tolist()
    np.testing.assert_array_equal(np.concatenate([chunk.logprobs for chunk in chunks]), completion.logprobs)
    assert {chunk.step for chunk in chunks} == {span.step for span in completion.versions}


async def a_listener_that_raises_fails_its_own_call(subject: Subject) -> None:
    def listen(chunk: TokenChunk) -> None:
        raise KeyError(len(chunk.token_ids))

    with pytest.raises(KeyError):
        await subject.engine.generate(
            subject.prompt(3), SamplingParams(max_tokens=9), session=SESSION, on_tokens=listen
        )
    await a_completion_is_aligned(subject)


async def cancelling_frees_the_slots(subject: Subject) -> None:
    count = 2 * subject.num_slots
    began = asyncio.Event()

    async def long_one(seed: int) -> None:
        await subject.engine.generate(
            subject.prompt(3, seed),
            SamplingParams(max_tokens=100_000, seed=seed),
            session=SESSION,
            on_tokens=lambda _: began.set(),
        )

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(long_one(seed), name=f"long {seed}") for seed in range(count)]
        await began.wait()
        for task in tasks:
            task.cancel()
    assert all(task.cancelled() for task in tasks)
    await a_completion_is_aligned(subject)


async def weights_change_in_mid_completion(subject: Subject) -> None:
    began = asyncio.Event()
    prompt = subject.prompt(5)
    params = SamplingParams(max_tokens=600, seed=3)
    before = await subject.engine.load_weights(subject.publish())
    ref = subject.publish()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(
            subject.engine.generate(prompt, params, session=SESSION, on_tokens=lambda _: began.set()), name="generate"
        )
        await began.wait()
        after = await subject.engine.load_weights(ref)
    assert after == ref.version
    assert [span.step for span in task.result().versions] == [before.step, after.step]
    assert_scored(subject, prompt, task.result())


async def a_completion_after_loading_is_the_new_policys(subject: Subject) -> None:
    version = await subject.engine.load_weights(subject.publish())
    completion = await subject.generate(subject.prompt(5), SamplingParams(max_tokens=4))
    assert [(span.step, span.num_tokens) for span in completion.versions] == [(version.step, 4)]


async def weights_that_were_overwritten_are_refused(subject: Subject) -> None:
    stale = subject.publish()
    subject.publish()
    subject.publish()
    with pytest.raises(WeightSyncError):
        await subject.engine.load_weights(stale)
    await a_completion_is_aligned(subject)


async def prompts_that_cannot_be_served_are_refused(subject: Subject) -> None:
    for prompt in ([], [subject.vocabulary], [-1], [0] * 1_000_000):
        with pytest.raises(RolloutError):
            await subject.generate(np.array(prompt, np.int32), SamplingParams(max_tokens=1))
    await a_completion_is_aligned(subject)


async def closing_is_final(subject: Subject) -> None:
    """Ends the waiting calls and refuses new ones; may be repeated."""
    began = asyncio.Event()

    async def expect_loss() -> None:
        with pytest.raises(EngineLostError):
            await subject.engine.generate(
                subject.prompt(3),
                SamplingParams(max_tokens=100_000),
                session=SESSION,
                on_tokens=lambda _: began.set(),
            )

    async with asyncio.TaskGroup() as group:
        group.create_task(expect_loss(), name="waiting call")
        await began.wait()
        await subject.engine.aclose()
    await subject.engine.aclose()
    with pytest.raises(EngineLostError):
        await subject.generate(subject.prompt(3), SamplingParams(max_tokens=3))
    with pytest.raises(EngineLostError):
        await subject.engine.load_weights(subject.publish())


SUITE: tuple[Callable[[Subject], Awaitable[None]], ...] = (
    a_completion_is_aligned,
    a_prompt_of_one_token_is_enough,
    logprobs_are_those_of_the_version_named,
    equal_seeds_give_equal_completions_in_any_company,
    more_requests_than_slots_are_all_served,
    a_stop_token_ends_a_completion,
    greedy_ignores_the_seed,
    chunks_add_up_to_the_completion,
    a_listener_that_raises_fails_its_own_call,
    cancelling_frees_the_slots,
    weights_change_in_mid_completion,
    a_completion_after_loading_is_the_new_policys,
    weights_that_were_overwritten_are_refused,
    prompts_that_cannot_be_served_are_refused,
)
