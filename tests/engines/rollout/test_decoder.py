"""Continuous batching against plain forward passes, in this process and step by step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from asyncflow.core.types import Completion, FinishReason, IntArray, SamplingParams, VersionSpan
from asyncflow.engines.rollout import decoder as decoder_module
from asyncflow.engines.rollout.decoder import Decoder, Progress
from asyncflow.engines.rollout.messages import Chunk, Finished, Generate, completion
from asyncflow.engines.rollout.model import check_decoding, prefill
from asyncflow.engines.rollout.scheduler import Limits
from tests.engines.rollout.tiny import CONFIGS, VOCABULARY, build, prompts, score

LIMITS = Limits(max_running=5, prefill_tokens=24, cache_tokens=100_000)


def submit(decoder: Decoder, request: int, prompt: IntArray, params: SamplingParams, *, stream: bool = False) -> None:
    decoder.submit(Generate(request=request, token_ids=prompt.tobytes(), params=params, is_streamed=stream))


def run(decoder: Decoder) -> dict[int, Completion]:
    """Step until nothing is left."""
    done: dict[int, Completion] = {}
    while not decoder.is_idle:
        done |= {one.request: completion(one) for one in decoder.step().finished}
    return done


def complete(
    model: PreTrainedModel, asked: Iterable[tuple[IntArray, SamplingParams]], limits: Limits = LIMITS
) -> list[Completion]:
    decoder = Decoder(model, limits)
    for request, (prompt, params) in enumerate(asked):
        submit(decoder, request, prompt, params)
    return [one for _, one in sorted(run(decoder).items())]


def assert_scored(model: PreTrainedModel, prompt: IntArray, one: Completion) -> None:
    expected = score(model, np.concatenate([prompt, one.token_ids]))[len(prompt) - 1 :]
    np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_are_those_of_a_plain_forward_pass(name: str) -> None:
    model = build(name)
    check_decoding(model)
    asked = [
        (prompt, SamplingParams(max_tokens=1 + index % 6 * 2, seed=index))
        for index, prompt in enumerate(prompts([1, 7, 2, 11, 7, 3, 1, 12, 5, 9, 4, 6]))
    ]
    for (prompt, params), one in zip(asked, complete(model, asked), strict=True):
        assert len(one.token_ids) == params.max_tokens
        assert_scored(model, prompt, one)


def test_greedy_is_what_transformers_generates() -> None:
    model = build()
    asked = [(prompt, SamplingParams(max_tokens=25, temperature=0)) for prompt in prompts([3, 8, 5])]
    for (prompt, _), one in zip(asked, complete(model, asked), strict=True):
        tokens = torch.from_numpy(prompt.astype(np.int64))[None]
        expected = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=25, do_sample=False, pad_token_id=0
        )
        assert one.token_ids.tolist() == expected[0, len(prompt) :].tolist()


def test_every_seed_gives_the_same_completion_in_any_company() -> None:
    model = build()
    asked = [
        (prompt, SamplingParams(max_tokens=10, seed=index)) for index, prompt in enumerate(prompts([4] * 6 + [9] * 6))
    ]
    together = complete(model, asked, Limits(max_running=12, prefill_tokens=999, cache_tokens=9999))
    alone = [complete(model, [one])[0] for one in asked]
    assert [one.token_ids.tolist() for one in together] == [one.token_ids.tolist() for one in alone]


def test_siblings_differ_and_their_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[list[int]] = []

    def count(model: PreTrainedModel, token_ids: torch.Tensor) -> object:
        computed.append(list(token_ids.shape))
        return prefill(model, token_ids)

    monkeypatch.setattr(decoder_module, "prefill", count)
    model, prompt = build(), prompts([8])[0]
    asked = [(prompt, SamplingParams(max_tokens=4 + seed, seed=seed)) for seed in range(11)]
    completions = complete(model, asked)
    assert computed == [[1, 7]], "later siblings copy it from those that run"
    assert len({tuple(one.token_ids[:4]) for one in completions}) > 5
    for one in completions:
        assert_scored(model, prompt, one)


def steps(decoder: Decoder, count: int) -> list[Progress]:
    return [decoder.step() for _ in range(count)]


def test_weights_that_change_in_mid_completion_are_named_token_by_token() -> None:
    model, other = build(seed=1), build(seed=2)
    old = {name: parameter.clone() for name, parameter in model.named_parameters()}
    decoder = Decoder(model, LIMITS)
    asked = prompts([6, 3, 1])
    for request, prompt in enumerate(asked):
        submit(decoder, request, prompt, SamplingParams(max_tokens=9, seed=request))
    decoder.change_version(4)
    steps(decoder, 5)
    model.load_state_dict(other.state_dict())
    decoder.change_version(5)
    decoder.change_version(6)
    done = run(decoder)
    plain = build(seed=1)
    plain.load_state_dict(old, strict=False)
    for request, prompt in enumerate(asked):
        one = done[request]
        assert one.versions == (VersionSpan(step=4, num_tokens=5), VersionSpan(step=6, num_tokens=4))
        sequence = np.concatenate([prompt, one.token_ids])
        np.testing.assert_allclose(one.logprobs[:5], score(plain, sequence)[len(prompt) - 1 :][:5], atol=1e-4)
        np.testing.assert_allclose(one.logprobs[5:], score(other, sequence)[len(prompt) - 1 :][5:], atol=1e-4)


def test_a_stop_token_ends_the_row_and_frees_it() -> None:
    model, prompt = build(), prompts([4])[0]
    params = SamplingParams(max_tokens=30, seed=1)
    whole = complete(model, [(prompt, params)])[0].token_ids.tolist()
    stops = [(whole[6],), (VOCABULARY - 1, whole[2], 99_999), (-5,)]
    asked = [(prompt, SamplingParams(max_tokens=30, seed=1, stop_token_ids=stop)) for stop in stops]
    by_first, by_second, never = complete(model, asked)
    assert by_first.token_ids.tolist() == whole[: whole.index(whole[6]) + 1]
    assert by_first.finish_reason is FinishReason.STOP
    assert by_second.token_ids[-1] in {VOCABULARY - 1, whole[2]}
    assert (never.token_ids.tolist(), never.finish_reason) == (whole, FinishReason.LENGTH)
    alone = Limits(max_running=1, prefill_tokens=24, cache_tokens=100_000)
    _, without = complete(model, [asked[0], (prompt, params)], alone)
    assert without.token_ids.tolist() == whole, "the row's next request must not inherit its stop tokens"


@pytest.mark.parametrize("victim", range(7))
def test_an_aborted_request_leaves_the_others_as_they_were(victim: int) -> None:
    model, decoder = build(), Decoder(build(), LIMITS)
    asked = [(prompt, SamplingParams(max_tokens=8, seed=7 * index)) for index, prompt in enumerate(prompts([5] * 7))]
    expected = complete(model, asked)
    for request, (prompt, params) in enumerate(asked):
        submit(decoder, request, prompt, params)
    steps(decoder, 3)
    decoder.abort(victim)
    decoder.abort(victim)
    assert decoder.num_running == (5 if victim > 4 else 4)
    done = run(decoder)
    assert done.keys() == set(range(7)) - {victim}
    assert all(done[request].token_ids.tolist() == expected[request].token_ids.tolist() for request in done)


def test_only_streamed_requests_are_told_of_token_by_token() -> None:
    decoder = Decoder(build(), LIMITS)
    first, second = prompts([3, 3])
    submit(decoder, 1, first, SamplingParams(max_tokens=5), stream=True)
    submit(decoder, 2, second, SamplingParams(max_tokens=7))
    chunks: list[Chunk] = []
    finished: dict[int, Finished] = {}
    while not decoder.is_idle:
        progress = decoder.step()
        chunks += progress.chunks
        finished |= {one.request: one for one in progress.finished}
    assert {chunk.request for chunk in chunks} == {1}
    assert b"".join(chunk.token_ids for chunk in chunks) == finished[1].token_ids
    assert b"".join(chunk.logprobs for chunk in chunks) == finished[1].logprobs


def test_a_distribution_that_is_none_fails_the_request_alone() -> None:
    model, decoder = build(), Decoder(build(), LIMITS)
    broken = Decoder(model, LIMITS)
    model.get_input_embeddings().weight[7] = torch.nan
    good, bad = np.array([1, 2], np.int32), np.array([1, 7], np.int32)
    submit(broken, 0, good, SamplingParams(max_tokens=1))
    submit(broken, 1, bad, SamplingParams(max_tokens=1))
    submit(decoder, 0, good, SamplingParams(max_tokens=1))
    progress = broken.step()
    assert [one.request for one in progress.failed] == [1]
    assert [one.token_ids for one in progress.finished] == [run(decoder)[0].token_ids.tobytes()]
    assert broken.is_idle


def test_long_and_short_sequences_share_the_cache_while_it_grows_and_shrinks() -> None:
    model = build()
    lengths = [1, 60, 2, 30, 1, 1, 1, 90, 3, 2, 1]
    asked = [
        (prompt, SamplingParams(max_tokens=1 + 7 * (index % 3), seed=index))
        for index, prompt in enumerate(prompts(lengths))
    ]
    for (prompt, _), one in zip(asked, complete(model, asked), strict=True):
        assert_scored(model, prompt, one)


def test_a_long_step_says_that_it_goes_on() -> None:
    """After every part of a prefill that is cut into parts: a step may be much longer than a message may wait."""
    signs: list[int] = []
    model = build()
    decoder = Decoder(model, LIMITS, lambda: signs.append(decoder.num_running))
    for request, prompt in enumerate(prompts([20, 20, 20])):
        submit(decoder, request, prompt, SamplingParams(max_tokens=4))
    while decoder.num_running < 3:
        decoder.step()
    signs.clear()
    decoder.change_version(1)
    decoder.step()
    assert signs == [3, 3, 3]
