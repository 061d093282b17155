"""The observer of a real run: writes everything into the run folder and feeds the display."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from asyncflow.core.metrics import Observer
from asyncflow.core.types import Group
from asyncflow.core.world import World
from asyncflow.observe.json_lines import JsonLines
from asyncflow.observe.records import METRICS_FILE, SPANS_FILE
from asyncflow.observe.rollout_log import RolloutLog


class RunObserver:
    """Implements `core.metrics.Observer`.

    Lines are buffered and written with the next record, so after a crash at most the spans
    and rollouts since the last step are missing. Nothing here raises: what the disk does not
    take is lost, counted in `num_lost` and shown once as a warning.
    """

    def __init__(self, run: Path, world: World, display: Observer, *, is_resumed: bool = False) -> None:
        self._world = world
        self._display = display
        self._metrics = JsonLines(run / METRICS_FILE, world.disk, is_resumed=is_resumed)
        self._spans = JsonLines(run / SPANS_FILE, world.disk, is_resumed=is_resumed)
        self._rollouts = RolloutLog(run, world.disk)
        self.num_lost = 0

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Write a line of metrics and everything buffered before it."""
        at = self._world.wall_clock().isoformat(timespec="milliseconds")
        self._attempt(lambda: self._metrics.add({"kind": kind, "at": at, **values}))
        self.flush()
        self._attempt(lambda: self._display.record(kind, values))

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Note a span."""
        line = {"role": role, "name": name, "start_s": round(start_s, 6), "end_s": round(end_s, 6)}
        self._attempt(lambda: self._spans.add(line))
        self._attempt(lambda: self._display.span(role, name, start_s, end_s))

    def group(self, group: Group) -> None:
        """Note the trajectories of a group."""
        self._attempt(lambda: self._rollouts.add(group))
        self._attempt(lambda: self._display.group(group))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        for log in (self._metrics, self._spans, self._rollouts):
            self._attempt(log.flush)

    def _attempt(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - a run must not end because it could not be observed
            self._lost(error)

    def _lost(self, error: Exception) -> None:
        self.num_lost += 1
        if self.num_lost == 1:
            message = f"the run goes on, but not everything about it can be recorded: {type(error).__name__}: {error}"
            self._attempt(lambda: self._display.record("health", {"message": message}))
