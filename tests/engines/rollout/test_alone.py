"""A decoder that works alone gives equal requests equal bits, whatever came before and whatever waits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from asyncflow.core.types import SamplingParams
from asyncflow.engines.rollout import decoder as decoder_module
from asyncflow.engines.rollout.cache import SlotCache
from asyncflow.engines.rollout.decoder import Decoder, Progress
from asyncflow.engines.rollout.messages import Generate
from asyncflow.engines.rollout.model import decode
from asyncflow.engines.rollout.scheduler import Limits
from tests.engines.rollout.tiny import build, prompts

LIMITS = Limits(max_running=16, prefill_tokens=999, cache_tokens=100_000)
LENGTHS = [1, 9, 2, 60, 5, 17, 3, 33, 1, 8, 12, 40, 5, 6, 90, 4, 2, 21, 7, 30]
ASKED = [
    (prompt, SamplingParams(max_tokens=5 + 11 * (index % 5), seed=index))
    for index, prompt in enumerate([*prompts(LENGTHS), prompts(LENGTHS)[1]])  # one prompt twice
]
Answers = dict[int, tuple[bytes, bytes]]
"""The tokens and log-probabilities of each request, as bytes: equal only if every bit is."""


def ask(decoder: Decoder, index: int) -> None:
    prompt, params = ASKED[index]
    decoder.submit(Generate(request=index, token_ids=prompt.tobytes(), params=params, is_streamed=False))


def answers(progress: Progress) -> Answers:
    return {one.request: (one.token_ids, one.logprobs) for one in progress.finished}


def finish(decoder: Decoder) -> Answers:
    done: Answers = {}
    while not decoder.is_idle:
        done |= answers(decoder.step())
    return done


def run(model: PreTrainedModel, order: Sequence[int], *, alone: bool = True) -> Answers:
    decoder = Decoder(model, LIMITS, alone=alone)
    for index in order:
        ask(decoder, index)
    return finish(decoder)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("qwen2, 4 queries to 2 keys")


@pytest.fixture(scope="module")
def each(model: PreTrainedModel) -> Answers:
    """Every request in a decoder of its own."""
    return {index: run(model, [index])[index] for index in range(len(ASKED))}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_requests_changes_no_bit(seed: int, model: PreTrainedModel, each: Answers) -> None:
    order = np.random.default_rng(seed).permutation(len(ASKED)).tolist()
    assert run(model, order) == each


def test_requests_that_come_and_go_change_no_bit(model: PreTrainedModel, each: Answers) -> None:
    decoder, done = Decoder(model, LIMITS, alone=True), Answers()
    for index in range(len(ASKED)):
        ask(decoder, index)
        for _ in range(index % 7):
            done |= answers(decoder.step())
        if index % 5 == 4:
            decoder.abort(index - index % 3)  # some of these run, some wait, some are done
        assert decoder.num_running <= 1
    done |= finish(decoder)
    assert len(done) > 15
    assert done == {index: each[index] for index in done}


def test_every_shape_follows_from_the_request(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room in the cache too: a longer request before must not leave it larger."""
    shapes: list[tuple[object, ...]] = []

    def watch(
        model: PreTrainedModel, cache: SlotCache, tokens: torch.Tensor, lengths: torch.Tensor, longest: int
    ) -> torch.Tensor:
        logits = decode(model, cache, tokens, lengths, longest)
        shapes.append((cache._keys[0].shape, tokens.shape, lengths.tolist(), longest))
        return logits

    monkeypatch.setattr(decoder_module, "decode", watch)
    run(model, [2])
    expected = list(shapes)
    shapes.clear()
    run(model, [14, 3, 2])
    assert shapes[-len(expected) :] == expected


def test_batches_change_bits(model: PreTrainedModel, each: Answers) -> None:
    """So the tests above can fail: in a batch the tokens are the same, the last bits of log-probs are not."""
    together = run(model, range(len(ASKED)), alone=False)
    assert {index: tokens for index, (tokens, _) in together.items()} == {
        index: tokens for index, (tokens, _) in each.items()
    }
    assert together != each


@pytest.mark.parametrize("alone", [True, False])
def test_a_broken_request_leaves_nothing_behind(*, alone: bool) -> None:
    """Keys that are NaN must not stay in columns that a shorter sequence in the same row hides."""
    model = build()
    model.get_input_embeddings().weight[7] = torch.nan
    decoder = Decoder(model, LIMITS, alone=alone)
    params = SamplingParams(max_tokens=1)
    for request, prompt in enumerate([[1, 7, 7, 7, 7], [1, 2]]):
        token_ids = np.array(prompt, np.int32).tobytes()
        decoder.submit(Generate(request=request, token_ids=token_ids, params=params, is_streamed=False))
        progress = decoder.step()
        assert [one.request for one in progress.failed] == [0] * (request == 0)
    assert [one.request for one in progress.finished] == [1]
