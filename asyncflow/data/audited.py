"""What an audit keeps of a group: where it stands, and a few numbers of its rows instead of the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from asyncflow.core.columns import LOSS_MASK, REWARD, VERSIONS
from asyncflow.core.types import NOT_SAMPLED, Ragged, Rows
from asyncflow.data.layout import read
from asyncflow.data.records import Produced

VersionCounts: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs (version, tokens that it sampled)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A rule that the log breaks, in a sentence, and where."""

    what: str
    lsn: int
    ticket: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.what} (record {self.lsn})"


@dataclass(slots=True, kw_only=True)
class AuditedStep:
    """A trained step: the record that ends it, who wrote it, its bound, and the oldest version its tokens are of.

    `is_whole` while the versions of all its tokens are still known.
    """

    lsn: int
    epoch: int
    bound: int
    oldest_version: int | None = None
    is_whole: bool = True

    def add(self, group: AuditedGroup) -> None:
        """Count one of its groups."""
        versions = [version for version, _ in group.versions or ()]
        self.is_whole &= bool(versions)
        self.oldest_version = min(
            versions + ([] if self.oldest_version is None else [self.oldest_version]), default=None
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """A group's rows in numbers; None where a column was not put with them."""

    versions: VersionCounts | None
    completion_tokens: float | None
    reward: float | None


@dataclass(slots=True, kw_only=True)
class AuditedGroup:
    """A ticket. `lsn` is its first admission, `live_step` and `epoch` those of its last one.

    `completion_tokens` and `reward` are means over its siblings. Until it ends, `versions` says
    which weights sampled its tokens; None where its payload is gone.
    """

    ticket: int
    lsn: int
    epoch: int
    live_step: int = -1
    prompt: str = ""
    prompt_tokens: int | None = None
    num_rows: int = 0
    completion_tokens: float | None = None
    reward: float | None = None
    versions: VersionCounts | None = None
    is_versioned: bool = False
    steps: tuple[int, ...] = ()
    reason: str = ""
    times_reissued: int = 0
    _columns: frozenset[str] = frozenset()
    _written: dict[str, set[int]] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether a step trained it."""
        return bool(self.steps)

    @property
    def has_ended(self) -> bool:
        """Whether it was trained or dropped."""
        return bool(self.steps or self.reason)

    @property
    def ending(self) -> str:
        """How it ended, in words; empty while it has not."""
        if self.steps:
            return f"trained in step {self.steps[-1]}"
        return f"dropped ({self.reason})" if self.reason else ""

    def produce(self, record: Produced, columns: frozenset[str], measures: Measures | None) -> None:
        """Its rows are there."""
        self.num_rows = record.group_size
        self._columns = columns
        self.is_versioned = VERSIONS in columns
        if measures is not None:
            self.versions = measures.versions
            self.completion_tokens, self.reward = measures.completion_tokens, measures.reward

    def sampling_faults(self, last_step: int) -> Iterator[str]:
        """Whether a token was sampled by weights older than its admission, or not made yet."""
        versions = [version for version, _ in self.versions or ()]
        if versions and min(versions) < self.live_step:
            yield f"ticket {self.ticket}, admitted under version {self.live_step}, holds tokens of {min(versions)}"
        if versions and max(versions) > last_step:
            yield f"ticket {self.ticket} holds tokens of version {max(versions)}, but the last step was {last_step}"

    def write(self, column: str, indices: list[int]) -> list[int]:
        """Rows got a column; those of them that had it already or do not exist."""
        written = self._written.setdefault(column, set())
        odd = [index for index in indices if not 0 <= index < self.num_rows or index in written]
        odd += indices if column in self._columns else []
        written.update(indices)
        return odd

    def take_back(self) -> None:
        """It waits to be rolled out again: what was put for it is void."""
        self.times_reissued += 1
        self.num_rows = 0
        self.completion_tokens = self.reward = None
        self.forget()

    def issue_again(self, live_step: int, epoch: int) -> None:
        """It was admitted again."""
        self.live_step, self.epoch = live_step, epoch

    def forget(self) -> None:
        """It has ended: nothing can come for its rows."""
        self.versions = None
        self._columns = frozenset()
        self._written = {}


@dataclass(slots=True, kw_only=True)
class Checked:
    """Staleness of the trained tokens, as far as the log still shows it.

    `by_age` counts tokens. The tokens of `bounded_groups` are gone, but these groups were admitted so late
    that the bound holds for any token; for `unknown_groups` nothing is left to tell.
    """

    by_age: Counter[int] = field(default_factory=Counter)
    groups: int = 0
    bounded_groups: int = 0
    unknown_groups: int = 0

    def add(self, group: AuditedGroup, step: int, bound: int) -> list[str]:
        """Count the tokens of a group trained in the step that made version `step`; what breaks the bound."""
        if group.versions is None:
            if group.is_versioned:
                is_bounded = group.live_step >= 0 and step - 1 - group.live_step <= bound
                self.bounded_groups += is_bounded
                self.unknown_groups += not is_bounded
            return []
        self.groups += 1
        faults = []
        for version, count in group.versions:
            age = step - 1 - version
            self.by_age[age] += count
            if not 0 <= age <= bound:
                faults.append(
                    f"step {step} trained on {count} tokens of ticket {group.ticket} that are {age} versions old "
                    f"(sampled by version {version}); the bound is {bound}"
                )
        return faults


def row_faults(step: int, batches: Iterable[Rows], sizes: Mapping[int, int]) -> Iterator[tuple[int, str]]:
    """What is wrong with a step's micro-batches, by ticket: groups have these sizes, and each row is trained once."""
    found: dict[int, list[int]] = {}
    for batch in batches:
        for ticket, indices in by_ticket(batch):
            found.setdefault(ticket, []).extend(indices)
    for ticket in sorted(found.keys() - sizes.keys()):
        yield ticket, f"step {step} trained on rows of ticket {ticket}, which is not one of its groups"
    for ticket, size in sorted(sizes.items()):
        counts = Counter(found.get(ticket, ()))
        for index in (index for index in range(size) if counts[index] == 0):
            yield ticket, f"row {index} of ticket {ticket} is missing from step {step}, which trained its group"
        for index, count in counts.items():
            if not 0 <= index < size:
                yield ticket, f"step {step} trained on row {index} of ticket {ticket}, which has {size} rows"
            elif count > 1:
                yield ticket, f"row {index} of ticket {ticket} is in step {step} {count} times"


def by_ticket(rows: Rows) -> Iterator[tuple[int, list[int]]]:
    """Each ticket, once, with the indices of its rows."""
    order = np.argsort(rows.tickets, kind="stable")
    tickets, starts = np.unique(rows.tickets[order], return_index=True)
    for ticket, indices in zip(tickets.tolist(), np.split(rows.indices[order], starts[1:]), strict=True):
        yield ticket, indices.tolist()


def groups_of(record: Produced, payload: NDArray[np.uint8] | None) -> list[Measures]:
    """The groups of a block in numbers; none where the payload is gone."""
    if payload is None:
        return []
    wanted = {VERSIONS, LOSS_MASK, REWARD}
    columns = {spec.name: read(spec, payload) for spec in record.columns if spec.name in wanted}
    versions, mask, reward = (_per_group(columns.get(name), record.count) for name in (VERSIONS, LOSS_MASK, REWARD))
    return [
        Measures(
            versions=None if versions is None else _count(versions[place]),
            completion_tokens=None if mask is None else float(np.count_nonzero(mask[place])) / record.group_size,
            reward=None if reward is None or not len(reward[place]) else float(reward[place].astype(float).mean()),
        )
        for place in range(record.count)
    ]


def _per_group(column: Ragged | None, count: int) -> list[NDArray[np.generic]] | None:
    """The values of each group of a block."""
    if column is None:
        return None
    rows = len(column.lengths) // count
    ends = np.cumsum(np.maximum(column.lengths, 0))[rows - 1 :: rows]
    return np.split(column.values, ends[:-1])


def _count(versions: NDArray[np.generic]) -> VersionCounts:
    found, counts = np.unique(versions[versions != NOT_SAMPLED], return_counts=True)
    return tuple(zip(found.tolist(), counts.tolist(), strict=True))
