"""What has to hold in a process so that equal calls give equal bits, on machines of one type.

- **The number of threads is fixed**: long sums are split among them.
- **Nothing depends on timing**: torch refuses algorithms that add up in the order in which
  threads arrive.
- **Weights begin at a multiple of 64 bytes** (`aligned`): files give them any address, and the
  product of a matrix and a vector may add up in another order there. Measured with MKL: of
  addresses 4, 8, 16, 32 and 48 bytes off, the first two gave other bits.
- **A call's shapes follow from its own arguments.** Who calls has to see to that: the product
  of a row alone has other bits than the same row's in a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

ALIGNMENT_BYTES = 64
"""Where torch's own memory begins."""

CUBLAS_WORKSPACE = ":4096:8"
"""Memory in which cuBLAS needs no choice that depends on what else runs; read at its first use."""


@contextmanager
def bit_equal() -> Iterator[None]:
    """Inside, torch computes what depends on timing in another way, or raises `RuntimeError`.

    Holds for the whole process; blocks may be nested.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(mode=True, warn_only=False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn


def fixed(num_threads: Callable[[], int]) -> Callable[[], int]:
    """The same number of threads at every call: what is offered now, 1 if that is left open."""
    number = num_threads() or 1
    return lambda: number


def aligned(model: PreTrainedModel) -> PreTrainedModel:
    """The model, with what lies elsewhere moved to memory of torch's own."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT_BYTES:
            tensor.data = tensor.data.clone()
    return model
