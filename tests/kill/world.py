"""What the processes of the kill tests compute: rollouts, advantages and optimizer steps of a tiny numpy policy.

Everything follows from the seed, the ticket and the weights, in float64 and without BLAS, so that the same
content gives the same bits wherever it lies in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.types import Ragged
from asyncflow.data.gate import Gate
from asyncflow.data.layout import ColumnLike
from asyncflow.data.ledger import QueueTask

Floats = NDArray[np.float64]

TASKS = {
    "train": ("features", "versions", "reward", "advantage"),
    "advantages": ("reward",),
}
QUEUE_TASKS = [QueueTask(name=name, needs=needs, trains=name == "train") for name, needs in TASKS.items()]
WIDTH = 8
NO_ANSWER = "no answer"
NO_SIGNAL = "no signal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The numbers of one system."""

    seed: int
    steps: int
    max_staleness: int
    groups_per_step: int = 4
    group_size: int = 2
    save_every: int = 4

    @property
    def gate(self) -> Gate:
        """Its gate."""
        return Gate(groups_per_step=self.groups_per_step, max_staleness=self.max_staleness, steps=self.steps)

    @property
    def rows_per_step(self) -> int:
        """Rows that make an optimizer step."""
        return self.groups_per_step * self.group_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """Weights and the optimizer's memory after `step` steps."""

    step: int
    weights: Floats
    momentum: Floats
    second: Floats


def begin(setting: Setting) -> Trainer:
    """Before the first step."""
    weights = np.random.default_rng(setting.seed).normal(size=WIDTH)
    return Trainer(step=0, weights=weights, momentum=np.zeros(WIDTH), second=np.zeros(WIDTH))


def is_unanswered(setting: Setting, ticket: int) -> bool:
    """Whether the rollout of this ticket fails."""
    return bool(np.random.default_rng([setting.seed, ticket, 99]).random() < 0.08)


def roll_out(setting: Setting, ticket: int, version: int, weights: Floats) -> Mapping[str, ColumnLike]:
    """The columns of a group."""
    features: list[Floats] = []
    rewards: list[float] = []
    for sibling in range(setting.group_size):
        rng = np.random.default_rng([setting.seed, ticket, sibling])
        rows = rng.normal(size=(int(rng.integers(2, 6)), WIDTH))
        answers = np.tanh((rows * weights).sum(axis=1))
        features.append(rows.ravel())
        rewards.append(float(np.round(answers.mean(), 1)))
    versions = [np.full(len(rows) // WIDTH, version, np.int32) for rows in features]
    return {"features": Ragged.stack(features), "versions": Ragged.stack(versions), "reward": np.array(rewards)}


def advantages(rewards: Floats) -> Floats:
    """Of one group."""
    return np.asarray(rewards - rewards.mean(), np.float64)


def take_step(trainer: Trainer, groups: Sequence[tuple[Sequence[Floats], Floats]]) -> Trainer:
    """An optimizer step on groups in this order, which changes the result: features and advantages of each."""
    weights, momentum, second = (part.copy() for part in (trainer.weights, trainer.momentum, trainer.second))
    for features, advantage in groups:
        gradient = 0.01 * weights
        for rows, scale in zip(features, advantage.tolist(), strict=True):
            tokens = np.array(rows).reshape(-1, WIDTH)
            slope = 1 - np.tanh((tokens * weights).sum(axis=1)) ** 2
            gradient = gradient - scale * (tokens * slope[:, None]).sum(axis=0)
        momentum = 0.9 * momentum + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        weights = weights - 0.05 * momentum / (np.sqrt(second) + 1e-8)
    return Trainer(step=trainer.step + 1, weights=weights, momentum=momentum, second=second)


# -- files ---------------------------------------------------------------------------------------


def save(trainer: Trainer, path: Path) -> Path:
    """Write a draft of a file; `publish` gives it its name."""
    draft = path.with_suffix(".draft.npy")
    np.save(draft, np.stack([np.full(WIDTH, trainer.step), trainer.weights, trainer.momentum, trainer.second]))
    return draft


def load(path: Path) -> Trainer:
    """What `save` wrote."""
    step, weights, momentum, second = np.load(path, allow_pickle=False)
    return Trainer(step=int(step[0]), weights=weights, momentum=momentum, second=second)


def checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(folder.glob("step-??????.npy"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """The checkpoint after so many steps."""
    return folder / f"step-{step:06d}.npy"


def live_path(folder: Path) -> Path:
    """The weights that rollouts are made with."""
    return folder / "live.npy"
