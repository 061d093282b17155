"""What an optimizer step has accumulated besides its gradients."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from asyncflow.core.columns import LOSS_MASK
from asyncflow.core.errors import NonFiniteError
from asyncflow.core.ports import LossOutput
from asyncflow.core.types import MicroBatch, PolicyVersion, StepReport


class StepSums:
    """Sums over the micro-batches of one optimizer step, kept as tensors until they are reported."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.num_samples = 0
        self._sums: dict[str, Tensor] = {}
        self._loss = 0.0
        self._num_threads: list[int] = []

    def add(self, batch: MicroBatch, output: LossOutput[Tensor]) -> None:
        """Count a micro-batch. Raises `NonFiniteError`, with nothing counted, when its loss is not a number."""
        loss = output.loss.item()
        if not torch.isfinite(output.loss):
            tickets = np.unique(batch.rows.tickets).tolist()
            raise NonFiniteError(
                f"the loss of a micro-batch is {loss}: {batch.num_tokens} tokens of groups {tickets}; "
                "no gradient was added for them"
            )
        self._loss += loss
        self._num_threads.append(torch.get_num_threads())
        self.num_tokens += int(batch[LOSS_MASK].sum())
        self.num_samples += len(batch.lengths)
        for name, value in output.sums.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def report(self, version: PolicyVersion, denominator: float, grad_norm: float, learning_rate: float) -> StepReport:
        """The step's report; metrics are means over its sampled tokens."""
        return StepReport(
            version=version,
            loss=self._loss / denominator,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            num_tokens=self.num_tokens,
            num_samples=self.num_samples,
            metrics={name: value.item() / max(1, self.num_tokens) for name, value in self._sums.items()},
            num_threads=(*self._num_threads, torch.get_num_threads()),
        )
