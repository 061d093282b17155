"""The display of a run: live on a terminal, plain lines in a log, or nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from asyncflow.core.metrics import NullObserver, Observer
from asyncflow.core.types import Group
from asyncflow.observe.plain_text import to_ascii
from asyncflow.observe.progress_state import ProgressState, RunPlan
from asyncflow.observe.progress_view import frame, header, step_line, waiting_line, warning

FRAMES_PER_S = 2.0
LINE_EVERY_S = 5.0
WAITING_EVERY_S = 30.0


class Progress(Observer, Protocol):
    """An observer with a beginning and an end. Nothing here raises."""

    @property
    def state(self) -> ProgressState:
        """What has been shown: the run's name, the last step."""
        ...

    def open(self, plan: RunPlan) -> None:
        """Show the plan and begin."""
        ...

    def close(self) -> None:
        """Leave the last frame standing. May be called twice, or without `open`."""
        ...


def progress_on(console: Console) -> Progress:
    """A live display where the console is a terminal, else one plain line every few seconds."""
    return LiveProgress(console) if console.is_terminal else PlainProgress(console)


class LiveProgress:
    """Four lines that are redrawn in place, with warnings scrolling away above them."""

    def __init__(self, console: Console) -> None:
        self.state = ProgressState()
        self._console = console
        self._live: Live | None = None
        self._step_s = console.get_time()

    def open(self, plan: RunPlan) -> None:
        """Show the plan and begin to redraw."""
        self.state.plan = plan
        _contained(lambda: _write(self._console, header(plan)))
        _contained(self._start)

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Take in a record; the next frame shows it."""
        _contained(lambda: self.state.record(kind, values))
        if kind in {"step", "warmup"}:
            self._step_s = self._console.get_time()
        if kind == "health":
            _contained(lambda: _write(self._console, [warning(str(values.get("message", "")))]))

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Spans are not shown: records carry the shares of time."""

    def group(self, group: Group) -> None:
        """Take in a group."""
        _contained(lambda: self.state.group(group))

    def close(self) -> None:
        """Draw the last frame and stop."""
        live, self._live = self._live, None
        self._step_s = math.inf  # nobody waits any more
        if live is not None:
            _contained(live.stop)

    def _start(self) -> None:
        self._step_s = self._console.get_time()
        self._live = Live(get_renderable=self._frame, console=self._console, refresh_per_second=FRAMES_PER_S)
        self._live.start()

    def _frame(self) -> Text:
        # Drawn by a thread while the event loop takes in records: a frame may mix two steps,
        # and one that trips over a growing history is left out.
        drawn: list[Text] = []
        waited_s = self._console.get_time() - self._step_s
        _contained(lambda: drawn.append(_drawable(self._console, frame(self.state, self._console.width, waited_s))))
        return drawn[0] if drawn else Text()


class PlainProgress:
    """One line for the first step, the last, and one every few seconds between them.

    While groups come but no step does, a line every half minute says so.
    """

    def __init__(self, console: Console) -> None:
        self.state = ProgressState()
        self._console = console
        self._shown: tuple[str, float] = ("", 0.0)
        self._line_s = console.get_time()

    def open(self, plan: RunPlan) -> None:
        """Show the plan."""
        self.state.plan = plan
        _contained(lambda: _write(self._console, header(plan)))

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Take in a record, and show it when it is time."""
        _contained(lambda: self._record(kind, values))

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Spans are not shown."""

    def group(self, group: Group) -> None:
        """Take in a group, and say so when nothing else was said for long."""
        _contained(lambda: self.state.group(group))
        if self._console.get_time() - self._line_s >= WAITING_EVERY_S:
            _contained(lambda: self._line(Text(waiting_line(self.state))))

    def close(self) -> None:
        """Nothing is left to do."""

    def _line(self, text: Text) -> None:
        self._line_s = self._console.get_time()
        _write(self._console, [text])

    def _record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        self.state.record(kind, values)
        if kind == "health":
            self._line(warning(str(values.get("message", ""))))
        elif kind in {"step", "warmup"} and self._is_due():
            self._shown = (kind, self.state.latest.get("elapsed_s", 0.0))
            self._line(Text(step_line(self.state)))

    def _is_due(self) -> bool:
        phase, shown_s = self._shown
        latest = self.state.latest
        is_last = latest.get("step") == self.state.steps
        return phase != self.state.phase or is_last or latest.get("elapsed_s", 1e9) - shown_s >= LINE_EVERY_S


class SilentProgress(NullObserver):
    """Shows nothing, and knows what it would have shown."""

    def __init__(self) -> None:
        self.state = ProgressState()

    def open(self, plan: RunPlan) -> None:
        """Note the plan."""
        self.state.plan = plan

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Take in a record."""
        _contained(lambda: self.state.record(kind, values))

    def close(self) -> None:
        """Nothing is left to do."""


def _write(console: Console, lines: list[Text]) -> None:
    for line in lines:
        console.print(_drawable(console, line), soft_wrap=True, highlight=False)


def _drawable(console: Console, text: Text) -> Text:
    return text if console.encoding.lower().startswith("utf") else Text(to_ascii(text.plain))


def _contained(call: Callable[[], object]) -> None:
    """A display may fail to draw; a run must not end because of it, nor fill the terminal with reasons."""
    with contextlib.suppress(Exception):
        call()
