"""Staleness bounds side by side, simulated: what a bound would gain before anything is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asyncflow.core.config import EvaluateConfig, RunConfig
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import Simulation, simulate

SAMPLE_TOKENS = len("prompt 000") + 2
"""Tokens of a simulated sample: its prompt, and a completion of two tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """How long things take, in seconds; every draw is log-normal around its mean.

    `rollout_s` is the mean time of one completion and `sigma` the spread of its logarithm,
    `train_s` the time in which a whole step's gradients are computed, `load_s` that of a
    weight load.
    """

    rollout_s: float
    sigma: float
    train_s: float
    load_s: float

    def script(self, config: RunConfig) -> Script:
        """Engines that take these times for this configuration; every completion has two tokens."""
        samples = config.groups_per_step * config.group_size

        def completion_s(rng: np.random.Generator) -> float:
            return self.rollout_s * float(np.exp(self.sigma * rng.standard_normal() - self.sigma**2 / 2))

        def accumulate_s(rng: np.random.Generator, num_tokens: int) -> float:
            return self.train_s * num_tokens / (samples * SAMPLE_TOKENS)

        return Script(
            completion_s=completion_s,
            num_tokens=lambda rng: 2,
            accumulate_s=accumulate_s,
            apply_s=lambda rng: 0.0,
            load_s=lambda rng: self.load_s,
        )


def compare(config: RunConfig, times: Times, bounds: Sequence[int]) -> dict[int, Simulation]:
    """Simulate a run of `config.steps` steps under each staleness bound, on the same draws."""
    quiet = EvaluateConfig(every=0, final_num_prompts=1)
    runs: dict[int, Simulation] = {}
    for bound in bounds:
        one = config.model_copy(update={"max_staleness": bound, "evaluate": quiet})
        runs[bound] = simulate(one, times.script(one), seed=config.seed)
    return runs
