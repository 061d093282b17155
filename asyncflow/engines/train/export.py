"""Parameters as the bits that a weight channel carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from asyncflow.core.errors import ConfigError
from asyncflow.engines.channel import Array

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def channel_shapes(parameters: Mapping[str, nn.Parameter], dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What `MemoryChannel.create` wants to know. Raises `ConfigError` for a dtype it does not carry."""
    if dtype not in DTYPES:
        raise ConfigError(f"rollout.dtype is {dtype!r}; weights are exported as {', '.join(DTYPES)}")
    return {name: (dtype, tuple(parameter.shape)) for name, parameter in parameters.items()}


def to_bits(parameter: nn.Parameter, dtype: str) -> Array:
    """A parameter on the host in `dtype`; bfloat16, which numpy lacks, as the uint16 of its bits.

    A view where nothing has to be converted.
    """
    tensor = parameter.detach().to("cpu", DTYPES[dtype])
    return cast(Array, (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy())
