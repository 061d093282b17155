"""What a display knows about a run: the latest of everything, and some histories."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asyncflow.core.types import Group

HISTORY = 512
PACE_STEPS = 20
"""The time left is predicted from the pace of so many steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What is known before a run starts.

    `title` are facts for the first line, such as `cpu`; `plan` are those of the second, such
    as `rollout 1 thread`. `bound` is the staleness bound in versions. `drops_equal` says that
    groups with equal rewards will be dropped.
    """

    name: str
    title: Sequence[str] = ()
    plan: Sequence[str] = ()
    steps: int = 0
    bound: int | None = None
    drops_equal: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Glimpse:
    """A recent rollout, to be shown."""

    prompt: str
    completion: str
    reward: float


class ProgressState:
    """Fed with records and groups; read by the views. Missing values stay None."""

    def __init__(self) -> None:
        self.plan = RunPlan(name="")
        self.phase = ""
        self.latest: dict[str, float] = {}
        self.rewards: deque[float] = deque(maxlen=HISTORY)
        self.lengths: deque[float] = deque(maxlen=HISTORY)
        self.held_out: deque[float] = deque(maxlen=HISTORY)
        self.glimpses: deque[Glimpse] = deque(maxlen=2)
        self.num_rolled_out = 0
        self.new_groups = 0
        self.new_equal = 0
        self._pace: deque[tuple[float, float]] = deque(maxlen=PACE_STEPS + 1)

    @property
    def step(self) -> int:
        """Optimizer steps of reinforcement learning that are done."""
        return int(self.latest.get("step", 0)) if self.phase == "step" else 0

    @property
    def steps(self) -> int:
        """Steps of the present phase, 0 where unknown."""
        return int(self.latest.get("steps", self.plan.steps))

    @property
    def left_s(self) -> float | None:
        """Seconds until the last step, at the recent pace."""
        if len(self._pace) < 2 or not self.steps:
            return None
        (first, since_s), (last, now_s) = self._pace[0], self._pace[-1]
        return (now_s - since_s) / (last - first) * max(0.0, self.steps - last) if last > first else None

    @property
    def dropped(self) -> dict[str, int]:
        """Dropped groups by reason, from values named `dropped_REASON`."""
        named = {name.removeprefix("dropped_"): int(value) for name, value in self.latest.items() if value}
        return {
            reason.replace("_", " "): count for reason, count in named.items() if f"dropped_{reason}" in self.latest
        }

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Take in a record."""
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        if kind == "evaluation":
            self._note(self.held_out, numbers.get("accuracy"))
        elif kind in {"step", "warmup"}:
            if kind != self.phase:
                self._pace.clear()
                self.latest = {}
            self.phase = kind
            self.latest |= numbers
            self._keep_pace(numbers)
        if kind == "step":
            # Counted with the rest of the record: a live count would run ahead of what was admitted.
            self.latest["rolled_out"] = float(self.num_rolled_out)
            self.new_groups = self.new_equal = 0
            self._note(self.rewards, numbers.get("reward"))
            self._note(self.lengths, numbers.get("length"))

    def group(self, group: Group) -> None:
        """Take in a group: count it, also since the last step, and keep one of its rollouts to show."""
        self.num_rolled_out += 1
        self.new_groups += 1
        self.new_equal += len({one.reward for one in group.trajectories}) <= 1
        if group.trajectories:
            # Neighbouring tickets show different siblings, so right and wrong ones both come up.
            shown = group.trajectories[group.ticket % len(group.trajectories)]
            self.glimpses.append(
                Glimpse(prompt=shown.prompt_text, completion=shown.completion_text, reward=shown.reward)
            )

    @staticmethod
    def _note(history: deque[float], value: float | None) -> None:
        if value is not None:
            history.append(value)

    def _keep_pace(self, numbers: Mapping[str, float]) -> None:
        if "step" in numbers and "elapsed_s" in numbers:
            self._pace.append((numbers["step"], numbers["elapsed_s"]))
