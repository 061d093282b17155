"""The policy as a Hugging Face model: opening it, checking that it can be served, changing its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from asyncflow.core.errors import ConfigError, WeightSyncError
from asyncflow.core.types import WeightsRef
from asyncflow.engines.channel import Array, Manifest, MemoryChannel, fingerprint
from asyncflow.engines.models import context_of, open_weights
from asyncflow.engines.rollout.attention import register
from asyncflow.engines.rollout.cache import SlotCache

PROBE_TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""How far cached logits may lie from plain ones, relative to their spread: batching changes the rounding."""


def open_model(name: str, device: str, dtype: str) -> PreTrainedModel:
    """A model ready to decode, from a folder or a hub name. Raises `ConfigError`."""
    model = open_weights(name, device, getattr(torch, dtype), attention=register())
    return model.requires_grad_(requires_grad=False)


def context_limit(model: PreTrainedModel) -> int:
    """Tokens of a sequence at most. Raises `ConfigError` for layers that are not attention."""
    return context_of(model.config)


def prefill(model: PreTrainedModel, token_ids: Tensor) -> DynamicCache:
    """Keys and values of right-padded sequences `[P, L]`; padding comes after what it could disturb."""
    cache = DynamicCache()
    model.base_model(input_ids=token_ids, past_key_values=cache, use_cache=True)
    return cache


def decode(model: PreTrainedModel, cache: SlotCache, tokens: Tensor, lengths: Tensor, longest: int) -> Tensor:
    """Append `tokens [B]` to the cache at `lengths [B]`; logits of what follows them, `[B, V]`."""
    cache.begin(lengths, longest)
    output = model(
        input_ids=tokens[:, None],
        position_ids=lengths[:, None],
        attention_mask=cache.mask(model.dtype),
        past_key_values=cache,
        use_cache=True,
    )
    logits: Tensor = output.logits[:, -1]
    return logits


@torch.inference_mode()
def check_decoding(model: PreTrainedModel) -> None:
    """Refuse a model that computes something else through the cache than by a plain forward pass.

    Two sequences of different lengths, prefilled together and decoded together: whatever
    relies on unusual positions, masks or caches shows. Raises `ConfigError`.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(1, 13, device=model.device).view(2, 6) * 7919 % vocabulary
    lengths = torch.tensor([4, 2], device=model.device)
    try:
        cache = SlotCache()
        cache.reserve(2, 5)
        cache.fill(prefill(model, tokens[:, :4]), [0, 1], [0, 1])
        plain = [
            model(input_ids=row[None, : length + 1]).logits[0, -1] for row, length in zip(tokens, lengths, strict=True)
        ]
        cached = decode(model, cache, tokens.gather(1, lengths[:, None])[:, 0], lengths, 4)
    except (TypeError, ValueError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the torch engine can't serve {type(model).__name__}: {error}") from error
    expected = torch.stack(plain)
    off = ((cached - expected).abs().max() / expected.std().clamp_min(1e-6)).item()
    if not off <= PROBE_TOLERANCE[str(model.dtype).removeprefix("torch.")]:
        raise ConfigError(
            f"the torch engine can't serve {type(model).__name__}: decoding with its cache differs from a plain "
            f"forward pass by {off:.2g} times the spread of the logits; use another engine"
        )


class Weights:
    """The parameters of a model, as the channel names them. Tied parameters are one."""

    def __init__(self, model: PreTrainedModel, channel: MemoryChannel | None) -> None:
        self._parameters = {name: parameter.data for name, parameter in model.named_parameters()}
        self._channel = channel
        if channel is not None:
            _check_manifest(channel.manifest, self._parameters)

    def load(self, ref: WeightsRef) -> str:
        """Copy a version from the channel into the model; gives the fingerprint of what it then holds.

        Raises `WeightSyncError` when the version is not, or no longer, in the channel.
        """
        if self._channel is None:
            raise WeightSyncError(
                f"weights at {ref.address!r} can't be loaded: the engine was started without a channel"
            )
        for name, bits in self._channel.read(ref).items():
            _set_bits(self._parameters[name], bits)
        if not self._channel.holds(ref):
            raise WeightSyncError(f"step {ref.version.step} was overwritten in the channel while it was loaded")
        return self.fingerprint()

    def fingerprint(self) -> str:
        """A hash of what the parameters hold now: of their memory itself on a CPU, of a copy on the host on a GPU."""
        return fingerprint(dict(self._as_bits()), threads=torch.get_num_threads())

    def _as_bits(self) -> Iterator[tuple[str, tuple[str, Array]]]:
        for name, parameter in self._parameters.items():
            yield name, (_dtype_name(parameter), _bits(parameter.cpu()))


def _check_manifest(manifest: Manifest, parameters: Mapping[str, Tensor]) -> None:
    sent = {spec.name: (spec.dtype, spec.shape) for spec in manifest.tensors}
    held = {name: (_dtype_name(parameter), tuple(parameter.shape)) for name, parameter in parameters.items()}
    odd = [name for name in sorted(sent.keys() | held.keys()) if sent.get(name) != held.get(name)]
    if odd:
        name = odd[0]
        raise ConfigError(
            f"trainer and rollout engine hold different models: {len(odd)} parameters differ, for example {name}: "
            f"sent {sent.get(name)}, served {held.get(name)}"
        )


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _bits(tensor: Tensor) -> Array:
    """A CPU tensor's memory as numpy, which has no bfloat16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    array: Array = tensor.numpy()
    return array


def _set_bits(parameter: Tensor, bits: Array) -> None:
    if parameter.device.type == "cpu":
        np.copyto(_bits(parameter), bits)
    else:
        staged = torch.from_numpy(np.array(bits).view(np.int16 if bits.dtype == np.uint16 else bits.dtype))
        parameter.copy_(staged.view(parameter.dtype))
