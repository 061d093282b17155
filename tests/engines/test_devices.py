"""One answer to where a role computes, for both engines; what is not there is refused before anything starts."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

import torch

from asyncflow.core.errors import ConfigError
from asyncflow.engines.devices import pick_device


def pretend(monkeypatch: pytest.MonkeyPatch, num_gpus: int, cuda: str | None = "13.0") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setattr(torch.version, "cuda", cuda)


@pytest.mark.parametrize(
    ("name", "num_gpus", "device"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda"),
        ("cpu", 0, "cpu"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_name_gives_a_device(name: str, num_gpus: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, num_gpus)
    assert pick_device(name, "train") == device


@pytest.mark.parametrize("role", ["train", "rollout"])
@pytest.mark.parametrize(
    ("name", "num_gpus", "cuda", "message"),
    [
        ("gpu", 1, "13.0", "is not one of cpu, cuda, cuda:1 and so on, or auto"),
        ("mps", 1, "13.0", "is not one of"),
        ("", 1, "13.0", "is not one of"),
        ("cuda", 0, None, "this torch is built for CPUs only"),
        ("cuda", 0, "13.0", "torch sees no GPU"),
        ("cuda:2", 2, "13.0", "torch sees cuda:0 to cuda:1"),
        ("cuda:99", 1, "13.0", "torch sees cuda:0 to cuda:0"),
    ],
)
def test_what_is_not_there_is_refused(
    role: str, name: str, num_gpus: int, cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, num_gpus, cuda)
    with pytest.raises(ConfigError, match=message) as caught:
        pick_device(name, role)
    assert str(caught.value).startswith(f"{role}.device = '{name}'")
