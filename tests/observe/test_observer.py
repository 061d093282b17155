"""What the observer writes, and that it never raises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.types import FinishReason, Group, Prompt, Ticket, Trajectory
from asyncflow.core.world import MemoryDisk, RealDisk, World
from asyncflow.observe.json_lines import MAX_BUFFERED, JsonLines, read_json_lines
from asyncflow.observe.observer import RunObserver
from asyncflow.observe.progress import SilentProgress
from asyncflow.observe.records import METRICS_FILE, Rollout, Span, read_metrics, read_rollouts, read_spans
from asyncflow.observe.rollout_log import RolloutLog


def trajectory(versions: list[int], reward: float = 1.0) -> Trajectory:
    steps = np.array(versions, np.int32)
    return Trajectory(
        token_ids=np.arange(len(steps), dtype=np.int32),
        loss_mask=steps >= 0,
        logprobs=np.zeros(len(steps), np.float32),
        versions=steps,
        reward=reward,
        prompt_text="1+1=",
        completion_text="2",
        finish_reason=FinishReason.STOP,
    )


def group(ticket: int, *trajectories: Trajectory) -> Group:
    prompt = Prompt(id=f"p{ticket}", text="1+1=", answer="2")
    return Group(ticket=Ticket(ticket), prompt=prompt, trajectories=trajectories or (trajectory([-1, 4, 4]),))


class BrokenDisk(MemoryDisk):
    def append(self, path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")


def test_records_spans_and_rollouts_are_read_back(tmp_path: Path) -> None:
    observer = RunObserver(tmp_path, World(), SilentProgress())
    observer.span("train", "apply", 1.0, 2.5)
    observer.group(group(7, trajectory([-1, 4, 4, 5, -1, 5]), trajectory([-1], reward=0.5)))
    observer.record("step", {"step": 1, "reward": 0.25, "loss": np.float32(0.5).item(), "bad": float("nan")})
    [metric] = read_metrics(tmp_path)
    assert (metric.kind, metric.values) == ("step", {"step": 1, "reward": 0.25, "loss": 0.5})
    assert metric.at.endswith("+00:00")
    assert read_spans(tmp_path) == [Span(role="train", name="apply", start_s=1.0, end_s=2.5)]
    first, second = read_rollouts(tmp_path)
    assert first == Rollout(
        ticket=7,
        sibling=0,
        prompt_id="p7",
        prompt="1+1=",
        completion="2",
        answer="2",
        reward=1.0,
        finish_reason="stop",
        num_turns=1,
        num_tokens=6,
        versions=[(4, 2), (5, 2)],
    )
    assert (second.sibling, second.reward, second.versions) == (1, 0.5, [])


def test_everything_is_written_with_the_next_record() -> None:
    disk = MemoryDisk()
    observer = RunObserver(Path("run"), World(disk=disk, is_real=False), SilentProgress())
    observer.span("train", "apply", 1.0, 2.0)
    observer.group(group(0))
    assert disk.files == {}
    observer.record("warmup", {"step": 1})
    assert len(disk.files) == 3


def test_nothing_raises_and_the_first_loss_is_shown() -> None:
    shown: list[str] = []

    class Display(SilentProgress):
        def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
            shown.append(f"{kind} {values.get('message', '')}")
            raise RuntimeError("a display that cannot draw")

    observer = RunObserver(Path("run"), World(disk=BrokenDisk(), is_real=False), Display())
    for step in range(3):
        observer.span("train", "apply", 1.0, 2.0)
        observer.group(group(step))
        observer.record("step", {"step": step})
    assert observer.num_lost > 3
    assert sum("No space left on device" in line for line in shown) == 1
    assert sum(line.startswith("step") for line in shown) == 3


def test_what_a_run_went_back_from_is_not_read(tmp_path: Path) -> None:
    lives = [
        [("warmup", 1), ("warmup", 2)],  # interrupted, and begun again
        [("warmup", 1), ("warmup", 2), ("warmup", 3), ("evaluation", 0), ("step", 1), ("step", 2)],
        [("evaluation", 2), ("health", 2), ("health", 2), ("step", 3), ("step", 4), ("evaluation", 4)],
        [("evaluation", 2), ("step", 3), ("evaluation", 3)],  # from the checkpoint of step 2 again, steps=3
        [("evaluation", 3)],
    ]
    disk = MemoryDisk()
    observer = RunObserver(tmp_path, World(disk=disk, is_real=False), SilentProgress())
    for life, lines in enumerate(lives):
        for kind, number in lines:
            observer.record(kind, {"step": number, "life": life})
    read = [(metric.kind, metric.values["step"], metric.values["life"]) for metric in read_metrics(tmp_path, disk)]
    assert read == [
        *[("warmup", number, 1) for number in (1, 2, 3)],
        *[("evaluation", 0, 1), ("step", 1, 1), ("step", 2, 1)],
        *[("health", 2, 2)] * 2,
        *[("evaluation", 2, 3), ("step", 3, 3), ("evaluation", 3, 4)],
    ]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([("step", 1), ("step", 2), ("step", 3), ("evaluation", 2)], [("step", 1), ("step", 2), ("evaluation", 2)]),
        ([("step", 1), ("step", 2), ("evaluation", 2), ("step", 2)], [("step", 1), ("step", 2)]),
        ([("evaluation", 0), ("step", 1), ("warmup", 1)], [("warmup", 1)]),
    ],
)
def test_a_run_that_just_went_back_shows_nothing_of_what_it_left(
    tmp_path: Path, written: list[tuple[str, int]], read: list[tuple[str, int]]
) -> None:
    observer = RunObserver(tmp_path, World(), SilentProgress())
    for kind, number in written:
        observer.record(kind, {"step": number})
    assert [(metric.kind, metric.values["step"]) for metric in read_metrics(tmp_path)] == read


def test_a_torn_line_is_passed_over_and_never_joined(tmp_path: Path) -> None:
    RunObserver(tmp_path, World(), SilentProgress()).record("step", {"step": 1})
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"kind": "step", "st')
    assert [metric.values["step"] for metric in read_metrics(tmp_path)] == [1]
    RunObserver(tmp_path, World(), SilentProgress(), is_resumed=True).record("step", {"step": 2})
    assert [metric.values["step"] for metric in read_metrics(tmp_path)] == [1, 2]
    assert read_metrics(tmp_path / "none") == []


def test_many_lines_are_written_without_a_record() -> None:
    disk = MemoryDisk()
    lines = JsonLines(Path("x"), disk, is_resumed=False)
    for number in range(MAX_BUFFERED + 1):
        lines.add({"number": np.int64(number)})
    assert len(read_json_lines(Path("x"), disk)) == MAX_BUFFERED
    with pytest.raises(TypeError, match="object is not a number"):
        lines.add({"number": object()})


def test_a_long_run_keeps_all_of_its_beginning_and_a_sample_of_its_end(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, RealDisk(), full_bytes=20_000)
    for ticket in range(3000):
        log.add(group(ticket))
        if ticket % 100 == 0:
            log.flush()
    log.flush()
    tickets = [rollout.ticket for rollout in read_rollouts(tmp_path)]
    strides = np.diff(tickets)
    assert tickets[:50] == list(range(50))
    assert strides[-1] >= 8
    assert (np.diff(strides) >= 0).mean() > 0.95
    assert len({file.name for file in (tmp_path / "rollouts").iterdir()}) == 3
    # A resumed run goes on as sparsely.
    again = RolloutLog(tmp_path, RealDisk(), full_bytes=20_000)
    again.add(group(3001))
    again.flush()
    assert len(read_rollouts(tmp_path)) == len(tickets)
