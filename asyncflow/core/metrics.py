"""What a run tells about itself while it runs: records, spans, and who receives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from asyncflow.core.types import Group


class Observer(Protocol):
    """Receives everything that happens in a run. Must be quick and must not raise."""

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """One line of `metrics.jsonl`: kind `step`, `evaluation`, `warmup` or `health`."""
        ...

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """`role` was busy with `name` between these times of the loop's clock."""
        ...

    def group(self, group: Group) -> None:
        """A group was rolled out."""
        ...


class NullObserver:
    """Receives and forgets."""

    def record(self, kind: str, values: Mapping[str, float | int | str]) -> None:
        """Forget it."""

    def span(self, role: str, name: str, start_s: float, end_s: float) -> None:
        """Forget it."""

    def group(self, group: Group) -> None:
        """Forget it."""
