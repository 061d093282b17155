"""What a run wrote about itself, read back from its folder, live or afterwards.

A resumed run goes back to its checkpoint and repeats the steps since then, so a step may
come twice, or be followed by a lower one: what the run went back from does not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

import msgspec

from asyncflow.core.world import Disk, RealDisk
from asyncflow.observe.json_lines import read_json_lines

METRICS_FILE = "metrics.jsonl"
SPANS_FILE = "spans.jsonl"
ROLLOUTS_FOLDER = "rollouts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A line of `metrics.jsonl`. `at` is the wall clock in ISO format, UTC."""

    kind: str
    at: str
    values: dict[str, float | int | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """`role` was busy with `name` between two times of the loop's clock, in seconds."""

    role: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A line of `rollouts/`: one trajectory. `versions` holds pairs (optimizer step, tokens sampled by it)."""

    ticket: int
    sibling: int
    prompt_id: str
    prompt: str
    completion: str
    answer: str
    reward: float | None
    finish_reason: str
    num_turns: int
    num_tokens: int
    versions: list[tuple[int, int]]


def read_metrics(folder: Path, disk: Disk | None = None) -> list[Metric]:
    """The records of a run in their order, without steps and evaluations that it went back from."""
    metrics: list[Metric] = []
    for line in read_json_lines(folder / METRICS_FILE, disk or RealDisk()):
        numbers = {name: value for name, value in line.items() if isinstance(value, float | int | str)}
        kind, at = str(numbers.pop("kind", "")), str(numbers.pop("at", ""))
        metrics.append(Metric(kind=kind, at=at, values=numbers))
    return _still_true(metrics)


def _still_true(metrics: list[Metric]) -> list[Metric]:
    """Read from the end, a phase's steps must fall; an evaluation of step s stands before step s + 1."""
    kept: list[Metric] = []
    warmup = step = evaluation = inf
    for metric in reversed(metrics):
        number = float(metric.values.get("step", -1))
        match metric.kind:
            case "warmup":
                is_true = number < warmup
                warmup = min(warmup, number)
            case "step":
                is_true = number < step and number <= evaluation and warmup == inf
                step = min(step, number)
            case "evaluation":
                is_true = number < evaluation and number < step and warmup == inf
                evaluation = min(evaluation, number)
            case _:
                is_true = True
        if is_true:
            kept.append(metric)
    return kept[::-1]


def read_spans(folder: Path, disk: Disk | None = None) -> list[Span]:
    """All spans of a run in the order in which they ended."""
    return [msgspec.convert(line, Span) for line in read_json_lines(folder / SPANS_FILE, disk or RealDisk())]


def read_rollouts(folder: Path, disk: Disk | None = None) -> list[Rollout]:
    """All trajectories that were kept, by ticket ranges."""
    return [
        msgspec.convert(line, Rollout)
        for file in sorted((folder / ROLLOUTS_FOLDER).glob("*.jsonl"))
        for line in read_json_lines(file, disk or RealDisk())
    ]
