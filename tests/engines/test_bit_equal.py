"""What makes equal calls give equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncflow.engines.bit_equal import ALIGNMENT_BYTES, bit_equal, fixed
from asyncflow.engines.models import open_weights
from tests.engines.train.tiny import build_tiny_model


def test_weights_lie_where_torch_puts_memory_whatever_the_file_says(tmp_path: Path) -> None:
    """The length of a file's header decides where its tensors are."""
    file = Path(build_tiny_model(tmp_path)) / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for length in range(0, 64, 8):
        save_file(tensors, file, metadata={"format": "pt", "more": "x" * length})
        model = open_weights(str(tmp_path), "cpu", torch.float32)
        found = dict(model.named_parameters())
        assert {parameter.data_ptr() % ALIGNMENT_BYTES for parameter in found.values()} == {0}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_block_makes_torch_deterministic_and_leaves_it_as_it_was() -> None:
    def flags() -> tuple[bool, bool]:
        return torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic

    with bit_equal():
        assert flags() == (True, True)
        with bit_equal():
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert flags() == (True, True)
    assert flags() == (False, False)


@pytest.mark.parametrize(("offered", "number"), [(0, 1), (3, 3)])
def test_the_number_of_threads_is_asked_once(offered: int, number: int) -> None:
    offers = iter([offered])
    threads = fixed(lambda: next(offers))
    assert [threads(), threads()] == [number, number]
