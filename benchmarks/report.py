"""What every benchmark prints: one table, and the same rows as JSON."""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

PACKAGES = ("asyncflow", "numpy", "torch", "transformers")

T_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % quantiles of Student's t for 0, 1, 2, … degrees of freedom."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure. `met` says whether it reached the goal; None where there is none."""

    name: str
    value: float
    unit: str
    spread: str = ""
    goal: str = ""
    met: bool | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to reach."""

    relation: str
    value: float

    def is_met(self, value: float) -> bool:
        """Whether a figure reaches it."""
        relations: dict[str, Callable[[float, float], bool]] = {
            ">": float.__gt__,
            ">=": float.__ge__,
            "<": float.__lt__,
            "<=": float.__le__,
        }
        return relations[self.relation](float(value), self.value)


def row(name: str, values: Iterable[float], unit: str, goal: Goal | None = None) -> Row:
    """Median and range."""
    seen = list(values)
    median = statistics.median(seen)
    return Row(
        name=name,
        value=median,
        unit=unit,
        spread=f"{min(seen):.3g} to {max(seen):.3g}" if len(seen) > 1 else "",
        goal=f"{goal.relation} {goal.value:g}" if goal else "",
        met=goal.is_met(median) if goal else None,
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t); infinite for one value.

    >>> [round(x, 3) for x in t_interval([1.0, 2.0, 3.0])]
    [2.0, 2.484]
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.inf
    quantile = T_95[len(values) - 1] if len(values) <= len(T_95) else 1.96
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """Show the rows."""
    table = Table(title=title)
    for column in ("figure", "value", "unit", "spread", "goal", "met"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "no"
        table.add_row(row.name, f"{row.value:.4g}", row.unit, row.spread, row.goal, met)
    Console(width=max(Console().width, 160)).print(table)


def write_json(file: Path, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Write the rows with the versions they were measured with."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [asdict(row) | {"value": row.value if math.isfinite(row.value) else None} for row in rows]
    content = {"versions": versions, "seeds": list(seeds), "rows": lines}
    file.write_text(json.dumps(content, indent=2) + "\n")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
