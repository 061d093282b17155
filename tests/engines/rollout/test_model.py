"""What can be served is; what can't is refused before the run starts, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from asyncflow.core.errors import ConfigError, WeightSyncError
from asyncflow.core.types import PolicyVersion, WeightsRef
from asyncflow.engines.channel import MemoryChannel, fingerprint
from asyncflow.engines.rollout.attention import attend, attend_one, register
from asyncflow.engines.rollout.model import Weights, check_decoding, context_limit, open_model
from tests.engines.rollout.tiny import CONTEXT, SIZES, VOCABULARY, WINDOW, build, parameters, save, shapes

SMALL = {**SIZES, "max_position_embeddings": CONTEXT, "num_key_value_heads": 2, "head_dim": 8}


def test_the_context_is_what_the_model_attends_to() -> None:
    assert context_limit(build("llama")) == CONTEXT
    assert context_limit(build("mistral, within its window")) == WINDOW
    assert context_limit(build("gpt2")) == 64
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, sliding_window=WINDOW, pad_token_id=0))
    assert context_limit(gemma) == WINDOW


def test_layers_that_are_not_attention_are_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="linear_attention"):
        context_limit(mamba)


def softcapped() -> PreTrainedModel:
    return Gemma2ForCausalLM._from_config(Gemma2Config(**SMALL, pad_token_id=0), attn_implementation=register())


def with_position_bias() -> PreTrainedModel:
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    return BloomForCausalLM._from_config(config, attn_implementation="eager")


def that_forgets_positions() -> PreTrainedModel:
    """What a model looks like that keeps a state of its own beside the cache."""
    model = build()
    assert isinstance(model, LlamaForCausalLM)
    rotary = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda states, position_ids: rotary(states, torch.zeros_like(position_ids))
    plain = model.forward

    def forward(**inputs: torch.Tensor) -> object:
        model.model.rotary_emb.forward = rotary if "past_key_values" not in inputs else model.model.rotary_emb.forward
        return plain(**inputs)

    model.forward = forward
    return model


@pytest.mark.parametrize("build_unfit", [softcapped, with_position_bias, that_forgets_positions])
def test_a_model_that_decodes_something_else_is_refused(build_unfit: object) -> None:
    assert callable(build_unfit)
    with pytest.raises(ConfigError, match="can't serve"):
        check_decoding(build_unfit().eval())


def test_a_model_opens_in_the_dtype_asked_for(tmp_path: Path) -> None:
    model = open_model(save(build(), tmp_path), "cpu", "bfloat16")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shared", [1, 3])
def test_decode_attention_is_sdpa(shared: int) -> None:
    query, key, value = (torch.randn(5, heads, length, 8) for heads, length in ((2 * shared, 1), (2, 16), (2, 16)))
    mask = torch.zeros(5, 1, 1, 11).masked_fill(torch.arange(11) > torch.arange(5)[:, None, None, None] * 2, -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key[:, :, :11], value[:, :, :11], attn_mask=mask, scale=0.3, enable_gqa=True
    )
    output = attend_one(query, key[:, :, :11], value[:, :, :11], mask, 0.3)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_what_decode_attention_does_not_know_is_left_to_sdpa() -> None:
    query, key, value = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    mask, bias = torch.zeros(2, 1, 1, 6), torch.randn(2, 4, 1, 6)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    output, _ = attend(torch.nn.Module(), query, key, value, mask, position_bias=bias)
    torch.testing.assert_close(output, expected.transpose(1, 2))


def test_loaded_weights_are_those_sent_and_tied_ones_stay_tied() -> None:
    model, source = build("tied llama", seed=1), build("tied llama", seed=2)
    channel = MemoryChannel.create(shapes(source))
    weights = Weights(model, channel)
    before = weights.fingerprint()
    ref = channel.write(parameters(source), 3, "")
    assert weights.load(ref) == ref.version.fingerprint != before
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens).logits, source(tokens).logits)
    channel.close()


def test_bfloat16_weights_are_attested_bit_by_bit() -> None:
    model = build().to(torch.bfloat16)
    held = {name: ("bfloat16", p.view(torch.uint16).numpy()) for name, p in model.named_parameters()}
    channel = MemoryChannel.create({name: (dtype, bits.shape) for name, (dtype, bits) in held.items()})
    ref = channel.write({name: bits + np.uint16(1) for name, (_, bits) in held.items()}, 1, "")
    weights = Weights(model, channel)
    assert weights.fingerprint() == fingerprint(held)
    assert weights.load(ref) == ref.version.fingerprint == weights.fingerprint()
    channel.close()


def test_a_channel_for_another_model_is_refused() -> None:
    channel = MemoryChannel.create(shapes(build()))
    with pytest.raises(ConfigError, match="different models"):
        Weights(build("tied llama"), channel)
    with pytest.raises(ConfigError, match="bfloat16"):
        Weights(build().to(torch.bfloat16), channel)
    channel.close()


def test_weights_without_a_channel_are_refused() -> None:
    ref = WeightsRef(version=PolicyVersion(step=1), address="memory:0")
    with pytest.raises(WeightSyncError, match="without a channel"):
        Weights(build(), None).load(ref)
