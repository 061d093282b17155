"""The packed path gives the logits and gradients of the padded one, or is not taken."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncflow.engines.train.forward import choose_forward, packed, padded
from asyncflow.engines.train.packed_attention import plan_packing

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

PACKED_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2, grouped heads": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3, one key head": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=8)),
    "gpt2, learnt positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    ),
}


def seeded(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return PACKED_MODELS[name]().eval()


def gradients(model: PreTrainedModel) -> torch.Tensor:
    vector = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return vector


@pytest.mark.parametrize("name", PACKED_MODELS)
def test_packed_equals_padded_forward_and_backward(name: str) -> None:
    rng = np.random.default_rng(0)
    lengths_S = np.array([9, 1, 40, 17, 16, 2, 39], np.int32)
    total = int(lengths_S.sum())
    token_ids_T = torch.tensor(rng.integers(0, 40, total))
    keep_N = torch.tensor(np.sort(rng.choice(total, 60, replace=False)))
    model, reference = seeded(name), seeded(name)
    assert choose_forward(model) is packed
    one = packed(model, token_ids_T, lengths_S, keep_N)
    other = padded(reference, token_ids_T, lengths_S, keep_N)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    directions = torch.tensor(rng.normal(size=one.shape), dtype=torch.float32)
    torch.autograd.backward((one * directions).sum())
    torch.autograd.backward((other * directions).sum())
    torch.testing.assert_close(gradients(model), gradients(reference), rtol=1e-4, atol=1e-5)


def make_windowed_model() -> PreTrainedModel:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)).eval()


def test_padded_gives_the_models_own_logits_sample_by_sample() -> None:
    model = make_windowed_model()
    lengths_S = np.array([11, 3, 20], np.int32)
    token_ids_T = torch.arange(34) % 40
    samples = torch.split(token_ids_T, lengths_S.tolist())
    expected = torch.cat([model(input_ids=sample[None]).logits[0] for sample in samples])
    torch.testing.assert_close(padded(model, token_ids_T, lengths_S, torch.arange(34)), expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_needs_more_than_causal_attention_is_padded_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = make_windowed_model()
    own_attention = model.config._attn_implementation
    with caplog.at_level(logging.WARNING):
        assert choose_forward(model) is padded
    assert "path=padded" in caplog.text
    assert "sliding_window" in caplog.text
    assert model.config._attn_implementation == own_attention


def test_a_model_that_ignores_the_attention_it_is_given_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a model lets samples see each other, which only shows in the logits."""
    model = seeded("llama")
    monkeypatch.setattr(model, "set_attn_implementation", lambda _: None)
    monkeypatch.setattr(
        "asyncflow.engines.train.forward.packed",
        lambda model, token_ids_T, lengths_S, keep_N: model(input_ids=token_ids_T[None]).logits[0, keep_N],
    )
    assert choose_forward(model) is padded


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_every_token_has_one_cell_and_padding_is_small(lengths: list[int]) -> None:
    packing = plan_packing(np.array(lengths, np.int32), torch.device("cpu"))
    assert sum(samples * longest for samples, longest in packing.rectangles) == len(packing.token_of_cell)
    assert packing.token_of_cell[packing.cell_of_token].tolist() == list(range(sum(lengths)))
    assert len(set(packing.cell_of_token.tolist())) == sum(lengths)
    assert len(packing.token_of_cell) <= max(1.3 * sum(lengths), 16 * len(lengths))
    assert packing.position_ids.tolist() == [position for length in lengths for position in range(length)]
