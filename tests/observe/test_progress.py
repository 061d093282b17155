"""What the terminal shows."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from asyncflow.core.types import FinishReason, Group, Prompt, Ticket, Trajectory
from asyncflow.observe.plain_text import harmless, one_line, sparkline, to_ascii
from asyncflow.observe.progress import LiveProgress, PlainProgress, Progress, SilentProgress, progress_on
from asyncflow.observe.progress_state import ProgressState, RunPlan
from asyncflow.observe.progress_view import frame

PLAN = RunPlan(
    name="2026-11-20-blue-fox", title=("cpu", "seed 7"), plan=("rollout x1", "staleness ≤ 1"), steps=160, bound=1
)


def step(number: int) -> dict[str, float | int | str]:
    return {
        "step": number,
        "steps": 160,
        "reward": number / 160,
        "length": 8.0,
        "staleness_mean": 0.83,
        "staleness_max": 1,
        "tokens_per_s": 21345.0,
        "admitted": 40 * number,
        "trained": 32 * number,
        "dropped": 2,
        "dropped_no_signal": 2,
        "queued_groups": 12,
        "train_busy": 0.88,
        "rollout_busy": 0.91,
        "both_busy": 0.79,
        "elapsed_s": 1.5 * number,
    }


def group(completion: str, reward: float, ticket: int = 0) -> Group:
    shown = Trajectory(
        token_ids=np.zeros(1, np.int32),
        loss_mask=np.ones(1, np.bool_),
        logprobs=np.zeros(1, np.float32),
        versions=np.zeros(1, np.int32),
        reward=reward,
        prompt_text="417+385=",
        completion_text=completion,
        finish_reason=FinishReason.STOP,
    )
    return Group(ticket=Ticket(ticket), prompt=Prompt(id="p", text="417+385="), trajectories=(shown,))


def feed(progress: Progress, steps: int = 80) -> None:
    progress.open(PLAN)
    for number in (0, 50, 100):
        progress.record(
            "warmup", {"step": number, "steps": 100, "loss": 1.5, "staleness_mean": 0.0, "elapsed_s": number / 10}
        )
    for number in range(1, steps + 1):
        progress.record("step", step(number))
    progress.record("evaluation", {"step": steps, "accuracy": 0.7383})
    progress.group(group("[red]no[/red]\n\x1b[2J802", 1.0))
    progress.group(group("803", 0.0))
    progress.close()


def console(
    width: int = 120, *, is_terminal: bool = False, encoding: str = "utf-8"
) -> tuple[Console, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    return Console(file=file, width=width, force_terminal=is_terminal, color_system=None), file


def text_of(file: io.TextIOWrapper) -> str:
    file.seek(0)
    return file.read()


def fed(steps: int = 80) -> ProgressState:
    progress = SilentProgress()
    feed(progress, steps)
    return progress.state


def test_a_wide_frame_shows_everything() -> None:
    progress = LiveProgress(console()[0])
    feed(progress)
    lines = frame(progress.state, 120).plain.splitlines()
    assert lines[0] == " step   80/160 ━━━━━━━━━━━━──────────── 50 %   2:00 left   21 k tokens/s"
    assert lines[1].startswith(" learn reward 0.50 ▁▂")
    assert "held-out 73.8%" in lines[1]
    assert "length 8.0" in lines[1]
    assert lines[2] == " flow  admitted 3200 → trained 2560   dropped 2   (no signal 2)   queue 12   +2 rolled out"
    assert lines[3] == " busy  train 88 % · rollout 91 % · both 79 %   staleness 0.83 (max 1 ≤ 1)"
    assert lines[4] == ' last  "417+385=" → "[red]no[/red]\\n802" right   "417+385=" → "803" wrong'


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_a_frame_keeps_to_its_width_and_drops_whole_segments(width: int) -> None:
    progress = LiveProgress(console()[0])
    feed(progress)
    lines = frame(progress.state, width).plain.splitlines()
    assert len(lines) == 5
    assert all(len(line) <= width for line in lines)
    if width >= 60:
        assert "held-out 73.8%" in lines[1]
        assert not any("…" in line for line in lines[:4])


def test_missing_values_are_left_out() -> None:
    progress = LiveProgress(console()[0])
    assert frame(progress.state, 80).plain == " start nothing is trained yet"
    progress.record("step", {})
    progress.record("step", {"step": 3, "reward": float("nan")})
    assert frame(progress.state, 80).plain.splitlines()[0].startswith(" step  3/? ─")
    progress.record("evaluation", {})
    progress.record("health", {})


def test_rolled_out_groups_are_counted_with_the_record_and_not_after_a_resume() -> None:
    state = ProgressState()
    for ticket in range(40):
        state.group(group("802", 1.0, ticket))
    state.record("step", step(1))
    state.group(group("802", 1.0, 41))
    assert "admitted 40 → rolled out 40 → trained 32" in frame(state, 120).plain
    state.record("step", step(2))
    assert "admitted 80 → trained 64" in frame(state, 120).plain


def test_a_long_wait_for_a_step_shows_what_comes_meanwhile() -> None:
    state = ProgressState()
    state.plan = RunPlan(name="one", drops_equal=True)
    assert frame(state, 80, 83.0).plain == " start nothing is trained yet   1:23 since the start"
    state.group(group("802", 1.0))
    assert frame(state, 80).plain.splitlines()[1] == " flow  +1 rolled out (1 without signal)"
    state.record("step", step(1))
    assert "+1" not in frame(state, 120).plain
    for ticket in range(3):
        state.group(group("802", 1.0, ticket))
    shown = frame(state, 120, 12.0).plain
    assert "0:12 since the last step" in shown
    assert "+3 rolled out (3 without signal)" in shown
    state.plan = RunPlan(name="one")
    assert "+3 rolled out" in frame(state, 120).plain
    assert "without signal" not in frame(state, 120, 4.0).plain
    assert "since the last step" not in frame(state, 120, 4.0).plain


def test_a_log_in_which_no_step_comes_says_what_comes_every_half_minute() -> None:
    now = [0.0]
    file = io.StringIO()
    progress = PlainProgress(Console(file=file, width=120, get_time=lambda: now[0]))
    progress.open(PLAN)
    progress.record("step", step(1))
    for second in range(61):
        now[0] = float(second)
        progress.group(group("802", 1.0, second))
    waiting = [line for line in file.getvalue().splitlines() if line.startswith("waiting")]
    assert waiting == ["waiting after step   1/160  +31 rolled out", "waiting after step   1/160  +61 rolled out"]


def test_a_live_display_counts_the_time_since_the_last_step() -> None:
    now = [0.0]
    file = io.StringIO()
    progress = LiveProgress(Console(file=file, width=120, force_terminal=True, get_time=lambda: now[0]))
    progress.open(PLAN)
    now[0] = 61.0
    progress.record("health", {"message": "compiling"})
    assert "1:01 since the start" in progress._frame().plain
    progress.record("step", step(1))
    assert "since" not in progress._frame().plain
    now[0] = 999.0
    progress.close()
    assert "since" not in progress._frame().plain


def test_the_warm_up_has_a_bar_of_its_own() -> None:
    state = ProgressState()
    state.record("warmup", {"step": 30, "steps": 100, "loss": 1.25})
    lines = frame(state, 80).plain.splitlines()
    assert lines[0].startswith(" warm-up  30/100 ━━━━━━━─")
    assert lines[1] == " learn loss 1.250"
    assert state.step == 0


def test_the_last_step_is_known_for_the_message_on_ctrl_c() -> None:
    assert (fed(80).step, fed(80).plan.name) == (80, PLAN.name)


def test_a_terminal_gets_a_live_display_that_leaves_its_last_frame() -> None:
    out, file = console(100, is_terminal=True)
    progress = progress_on(out)
    assert isinstance(progress, LiveProgress)
    feed(progress)
    progress.record("health", {"message": "entropy is [low]"})
    shown = text_of(file)
    assert "asyncflow" in shown
    assert "run 2026-11-20-blue-fox · cpu · seed 7" in shown
    assert "80/160" in shown
    assert "! entropy is [low]" in shown
    assert "\x1b[2J" not in shown


def test_a_log_gets_plain_lines_every_few_seconds() -> None:
    out, file = console()
    progress = progress_on(out)
    assert isinstance(progress, PlainProgress)
    feed(progress, 160)
    progress.record("health", {"message": "look here"})
    lines = text_of(file).splitlines()
    assert "\x1b" not in text_of(file)
    assert lines[1] == " plan  rollout x1 · staleness ≤ 1"
    assert lines[2] == "warm-up   0/100  loss 1.500"
    steps = [line for line in lines if line.startswith("step")]
    assert steps[0].startswith("step   1/160  reward 0.01")
    assert steps[1].startswith("step   5/160")  # 5 s later, at 1.5 s a step
    assert steps[-1].startswith("step 160/160")
    assert lines[-1] == "! look here"


def test_a_terminal_that_knows_only_ascii_gets_ascii() -> None:
    out, file = console(encoding="ascii")
    feed(PlainProgress(out), 2)
    assert "staleness <= 1" in text_of(file)
    assert to_ascii("a → b ▁▂ é") == "a -> b  ?"


def test_a_display_that_cannot_draw_does_not_end_the_run() -> None:
    out, file = console(is_terminal=True)
    progress = LiveProgress(out)
    file.close()
    feed(progress)
    assert progress.state.step == 80


@pytest.mark.parametrize("hostile", ["\x1b]0;title\x07", "\u202eabc", "a\rb", "\x00\x9b31m", "\x1b[31m" * 50])
def test_text_of_models_cannot_steer_the_terminal(hostile: str) -> None:
    shown = one_line(hostile, 30)
    assert len(shown) <= 30
    assert shown.isprintable()


def test_harmless_text_keeps_its_lines_only() -> None:
    assert harmless("\x1b]0;title\x07a\r\nb\t\u202ec\x9b2J\x1b[1m") == "]0;titlea\nb c2J"


def test_a_long_text_keeps_its_end() -> None:
    assert one_line("so the answer is " * 9 + "802", 20) == "so the answer…is 802"


def test_sparklines_average_long_histories() -> None:
    assert sparkline([1.0, 1.0], 8) == "▁▁"
    assert sparkline(list(range(100)), 4) == "▁▃▆█"
    assert sparkline([1.0], 8) == ""
    assert sparkline([float("nan"), 1.0, 2.0], 8) == "▁█"
