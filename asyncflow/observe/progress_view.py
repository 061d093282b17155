"""How a run looks on a terminal: pure functions from its state to lines of text.

Every line is made of segments, the most important first; those that do not fit the width
are left out whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

import asyncflow
from asyncflow.observe.plain_text import one_line, short_number, short_time, sparkline
from asyncflow.observe.progress_state import Glimpse, ProgressState, RunPlan

BAR_WIDTH = 24
SPARK_WIDTH = 12
GAP = "   "
WAIT_SHOWN_S = 5.0
"""A wait for the next step is shown from then on."""


def header(plan: RunPlan) -> list[Text]:
    """The lines before the first step."""
    title = Text.assemble(("asyncflow", "bold cyan"), (f" {asyncflow.__version__}", "cyan"))
    for fact in [f"run {plan.name}", *plan.title]:
        title.append(" · ", "dim").append(fact, "bold" if fact.startswith("run ") else "")
    return [title, *_labelled("plan", [Text(" · ".join(plan.plan))] if plan.plan else [])]


def frame(state: ProgressState, width: int, waited_s: float = 0.0) -> Text:
    """The live lines, at most `width` characters wide, `waited_s` after the last record."""
    lines = [_fit([*_step(state), *_waited(state, waited_s)], width)]
    lines += [_fit(line(state), width) for line in (_learn, _flow, _busy)]
    return Text("\n").join(line for line in [*lines, _last(state, width)] if line.plain)


def step_line(state: ProgressState) -> str:
    """The state on one plain line, for logs."""
    parts = [Text(f"{_phase(state)} {_count(state)}"), *_measures(state, spark=0), *_staleness(state)]
    return "  ".join(part.plain for part in [*parts, *_tokens(state), *_left(state)])


def waiting_line(state: ProgressState) -> str:
    """What has come since the last step, on one plain line, for logs in which no step comes."""
    return "  ".join([f"waiting after {_phase(state)} {_count(state)}", *(part.plain for part in _new(state))])


def warning(message: str) -> Text:
    """A line that is not overlooked."""
    return Text.assemble(("! ", "bold yellow"), (one_line(message, 400), "yellow"))


def _step(state: ProgressState) -> list[Text]:
    if not state.phase:
        return _labelled("start", [Text("nothing is trained yet", "dim")])
    bar = _label(_phase(state)).append(f"{_count(state)} ", "bold").append(_bar(_done(state)))
    return [bar.append(f" {100 * _done(state):.0f} %"), *_left(state), *_tokens(state)]


def _learn(state: ProgressState) -> list[Text]:
    return _labelled("learn", [*_measures(state, spark=SPARK_WIDTH)])


def _measures(state: ProgressState, *, spark: int) -> Iterator[Text]:
    """What is learnt: the warm-up's loss, or rewards, held-out accuracy and lengths."""
    if state.phase == "warmup":
        yield from _number(state, "loss", "loss", "{:.3f}")
    elif state.phase == "step":
        yield from _history("reward", state.rewards, "{:.2f}", spark, "bold")
        yield from _history("held-out", state.held_out, "{:.1%}", spark // 2, "bold green")
        yield from _history("length", state.lengths, "{:.1f}", spark // 2)


def _flow(state: ProgressState) -> list[Text]:
    numbers = state.latest
    if state.phase != "step" or "admitted" not in numbers:
        return _labelled("flow", list(_new(state)))
    trained = int(numbers.get("trained", 0))
    chain = [f"admitted {numbers['admitted']:.0f}"]
    if numbers.get("rolled_out", -1) >= trained:  # a resumed run has not seen those before
        chain.append(f"rolled out {numbers['rolled_out']:.0f}")
    reasons = ", ".join(f"{reason} {count}" for reason, count in state.dropped.items())
    dropped = [Text(f"dropped {numbers.get('dropped', 0):.0f}"), *([Text(f"({reasons})")] if reasons else [])]
    queue = _number(state, "queued_groups", "queue", "{:.0f}")
    return _labelled("flow", [Text(" → ".join([*chain, f"trained {trained}"])), *dropped, *queue, *_new(state)])


def _new(state: ProgressState) -> Iterator[Text]:
    """Groups since the last record: what moves while a step is long in coming."""
    if state.new_groups:
        equal = f" ({state.new_equal} without signal)" if state.plan.drops_equal and state.new_equal else ""
        yield Text(f"+{state.new_groups} rolled out{equal}")


def _waited(state: ProgressState, waited_s: float) -> Iterator[Text]:
    if waited_s >= WAIT_SHOWN_S:
        yield Text(f"{short_time(waited_s)} since {'the last step' if state.phase else 'the start'}", "dim")


def _busy(state: ProgressState) -> list[Text]:
    if state.phase != "step":
        return []
    roles = {"train": "train_busy", "rollout": "rollout_busy", "both": "both_busy"}
    shares = [f"{name} {100 * state.latest[key]:.0f} %" for name, key in roles.items() if key in state.latest]
    segments = [Text(" · ".join(shares))] if shares else []
    return _labelled("busy", [*segments, *_staleness(state)])


def _last(state: ProgressState, width: int) -> Text:
    if not state.glimpses:
        return Text()
    # Label, gap between the two, quotes, arrows and verdicts take the rest.
    room = max(16, (width - 7 - 3) // len(state.glimpses) - 14)
    shown = [_glimpse(glimpse, room) for glimpse in state.glimpses]
    return _fit(_labelled("last", shown), width)


def _glimpse(glimpse: Glimpse, room: int) -> Text:
    prompt = one_line(glimpse.prompt, max(room // 2, room - len(glimpse.completion)))
    completion = one_line(glimpse.completion, max(8, room - len(prompt)))
    verdict, style = _verdict(glimpse.reward)
    return Text.assemble((f'"{prompt}"', "dim"), " → ", f'"{completion}"', (f" {verdict}", style))


def _verdict(reward: float) -> tuple[str, str]:
    if reward == 1:
        return "right", "green"
    return ("wrong", "red") if reward == 0 else (f"{reward:.2f}", "yellow")


def _staleness(state: ProgressState) -> Iterator[Text]:
    numbers = state.latest
    if state.phase == "step" and "staleness_mean" in numbers:
        bound = f" ≤ {state.plan.bound}" if state.plan.bound is not None else ""
        most = f" (max {numbers['staleness_max']:.0f}{bound})" if "staleness_max" in numbers else ""
        yield Text(f"staleness {numbers['staleness_mean']:.2f}{most}")


def _tokens(state: ProgressState) -> Iterator[Text]:
    if "tokens_per_s" in state.latest:
        yield Text(f"{short_number(state.latest['tokens_per_s'])} tokens/s")


def _left(state: ProgressState) -> Iterator[Text]:
    if state.left_s:
        yield Text(f"{short_time(state.left_s)} left")


def _number(state: ProgressState, key: str, name: str, form: str) -> Iterator[Text]:
    if key in state.latest:
        yield Text(f"{name} {form.format(state.latest[key])}")


def _history(name: str, values: Sequence[float], form: str, spark: int, style: str = "") -> Iterator[Text]:
    if values:
        picture = sparkline(list(values), spark) if spark else ""
        yield Text(f"{name} ").append(form.format(values[-1]), style).append(f" {picture}" if picture else "", "cyan")


def _bar(done: float) -> Text:
    halves = round(done * BAR_WIDTH * 2)
    full, half = divmod(halves, 2)
    rest = BAR_WIDTH - full - half
    return Text.assemble(("━" * full + "╸" * half, "green"), ("─" * rest, "dim"))


def _done(state: ProgressState) -> float:
    return min(1.0, state.latest.get("step", 0.0) / state.steps) if state.steps else 0.0


def _count(state: ProgressState) -> str:
    total = str(state.steps) if state.steps else "?"
    return f"{state.latest.get('step', 0):{len(total)}.0f}/{total}"


def _phase(state: ProgressState) -> str:
    return "warm-up" if state.phase == "warmup" else "step"


def _label(name: str) -> Text:
    return Text.assemble((f" {name:<5} ", "dim"))


def _labelled(name: str, segments: Sequence[Text]) -> list[Text]:
    return [Text.assemble(_label(name), segments[0]), *segments[1:]] if segments else []


def _fit(segments: Sequence[Text], width: int) -> Text:
    """As many of the segments as fit on one line, from the first, which is cut where it must be."""
    line = Text()
    for index, segment in enumerate(segments):
        if index and line.cell_len + len(GAP) + segment.cell_len > width:
            break
        line.append(GAP if index else "").append(segment)
    line.truncate(width, overflow="ellipsis")
    return line
