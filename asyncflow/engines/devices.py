"""Where a role computes."""

from __future__ import annotations

import torch

from asyncflow.core.errors import ConfigError


def pick_device(name: str, role: str) -> str:
    """The torch device of the setting `ROLE.device`; `auto` is a GPU where there is one.

    Cheap, so that a run can ask before it starts anything. Raises `ConfigError` for a device
    that this machine or this torch does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"{role}.device = {name!r} is not one of cpu, cuda, cuda:1 and so on, or auto")
    if device.type == "cuda" and (problem := _missing_gpu(device.index or 0)):
        raise ConfigError(f"{role}.device = {name!r}, but {problem}; or use {role}.device=auto")
    return str(device)


def _missing_gpu(index: int) -> str:
    """What keeps this GPU from being used, and what to do; empty when nothing does."""
    if torch.version.cuda is None:
        return "this torch is built for CPUs only: install one that is built for CUDA"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        return "torch sees no GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES"
    return "" if index < count else f"torch sees cuda:0 to cuda:{count - 1}: name one of these"
