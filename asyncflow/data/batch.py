"""What a consumer of the transfer queue gets: rows, their columns, and the lease on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncflow.core.types import Ragged, Rows

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """Rows leased to this consumer, with the columns that its task needs, in one order."""

    rows: Rows
    columns: Mapping[str, Ragged]
    task: str
    lease: int

    def __len__(self) -> int:
        """Rows, S."""
        return len(self.rows)

    def __getitem__(self, column: str) -> Ragged:
        """One column."""
        return self.columns[column]

    def __iter__(self) -> Iterator[str]:
        """The names of the columns."""
        return iter(self.columns)


@dataclass(frozen=True, slots=True)
class Asked:
    """Rows that were asked for and did not come yet."""

    task: str
    request: int
