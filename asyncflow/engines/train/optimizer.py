"""AdamW on accumulated gradients: one division, one clip, one check, one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asyncflow.core.config import TrainConfig, WarmupConfig
from asyncflow.core.errors import InvariantError, NonFiniteError, RunFolderError

FINAL_PART = 0.1
"""Where a falling learning rate ends, as a part of the full one."""

STATE = ("step", "exp_avg", "exp_avg_sq")
"""AdamW's tensors for each parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of training with one optimizer; a new phase begins with a fresh one.

    The learning rate rises linearly over `rise_steps` and falls linearly to a tenth over
    `fall_steps`; 0 leaves either out. Log-probabilities are those of
    `softmax(logits / temperature)`: the distribution that rollouts are sampled from.
    """

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    rise_steps: int = 0
    fall_steps: int = 0
    temperature: float = 1.0

    @classmethod
    def reinforcement(cls, config: TrainConfig, *, temperature: float) -> Phase:
        """The phase of a run's reinforcement learning; the temperature is the rollouts'."""
        return cls(
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            rise_steps=config.rise_steps,
            temperature=temperature,
        )

    @classmethod
    def supervised(cls, config: WarmupConfig, train: TrainConfig) -> Phase:
        """The phase of the supervised warm-up."""
        return cls(
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            fall_steps=config.steps,
        )


def learning_rate(phase: Phase, step: int) -> float:
    """The learning rate of a phase's step, counted from 0.

    >>> phase = Phase(learning_rate=1.0, betas=(0.9, 0.99), weight_decay=0, max_grad_norm=1, rise_steps=2)
    >>> [learning_rate(phase, step) for step in range(3)]
    [0.5, 1.0, 1.0]
    """
    rate = phase.learning_rate
    if phase.rise_steps:
        rate *= min(1.0, (step + 1) / phase.rise_steps)
    if phase.fall_steps:
        rate *= 1 - (1 - FINAL_PART) * min(1.0, step / max(1, phase.fall_steps - 1))
    return rate


class Optimizer:
    """AdamW for named parameters; `steps` counts those of the phase."""

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], phase: Phase) -> None:
        self.phase = phase
        self.steps = 0
        self._parameters = dict(named_parameters)
        matrices = [p for p in self._parameters.values() if p.ndim > 1]
        vectors = [p for p in self._parameters.values() if p.ndim <= 1]  # norms and biases do not decay
        self._adamw = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": phase.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=phase.betas,
            fused=True,
        )

    def step(self, denominator: float) -> tuple[float, float]:
        """Divide the gradients, clip them, take a step, forget them; the norm before clipping and the rate.

        Raises `NonFiniteError` before anything is changed.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        if not gradients or not denominator > 0:
            raise InvariantError(f"optimizer step {self.steps} over {len(gradients)} gradients / {denominator}")
        norm = torch.nn.utils.get_total_norm(gradients) / denominator
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient norm of optimizer step {self.steps} is {norm.item()}")
        clip = min(1.0, self.phase.max_grad_norm / (norm.item() + 1e-6))
        torch._foreach_mul_(gradients, clip / denominator)
        rate = learning_rate(self.phase, self.steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        self._adamw.step()
        self.forget_gradients()
        self.steps += 1
        return norm.item(), rate

    def change_phase(self, phase: Phase) -> None:
        """Go on under other hyperparameters, with the moments as they are."""
        self.phase = phase
        for group, decay in zip(self._adamw.param_groups, (phase.weight_decay, 0.0), strict=True):
            group["weight_decay"] = decay
            group["betas"] = phase.betas

    def forget_gradients(self) -> None:
        """Begin the next optimizer step."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """AdamW's tensors as `exp_avg.PARAMETER` and so on; empty before the first step."""
        return {
            f"{key}.{name}": self._adamw.state[parameter][key]
            for name, parameter in self._parameters.items()
            if parameter in self._adamw.state
            for key in STATE
        }

    def restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        """Go back to a `state` that was read from a disk. Raises `RunFolderError` when it is another model's."""
        expected = {f"{key}.{name}" for name in self._parameters for key in STATE}
        if not state.keys() <= expected:
            raise RunFolderError(f"optimizer state of an unknown parameter: {min(state.keys() - expected)}")
        for full_name, tensor in state.items():
            key, _, name = full_name.partition(".")
            parameter = self._parameters[name]
            self._adamw.state[parameter][key] = tensor.to(parameter.device, copy=True)  # a file's address is any
        self.steps = steps
