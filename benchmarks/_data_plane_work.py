"""What every arm of `data_plane.py` moves, and how each row is checked. Nothing but numpy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.generic]
Rows: TypeAlias = dict[str, "list[Array] | Array"]
"""What a producer has: for each column a list of rows that differ in length, or one array."""
Batch: TypeAlias = dict[str, "tuple[Array, NDArray[np.int64] | None]"]
"""What a consumer gets: for each column its values, and the length of each row where they differ."""

MIXED: Mapping[str, np.dtype[np.generic]] = {
    "prompt": np.dtype(np.int64),
    "response": np.dtype(np.int64),
    "logprobs": np.dtype(np.float32),
}
MIXED_RAGGED = frozenset(MIXED)
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "M": (*MIXED, "reward"),
    "S": (*MIXED, "reward"),
    "W": (*MIXED, "reward"),
    "T": ("tokens",),
    "D": tuple(f"field_{i}" for i in range(9)),
}
TOKENS = 16
DENSE_SHAPE = (1024, 8192)
"""Of each of D's nine float32 columns: the `Small` setting of TransferQueue's own benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One workload: `rows` rows, `passes` times over, put `put_rows` at a time."""

    workload: str
    rows: int
    passes: int = 1
    put_rows: int = 32
    get_rows: int = 32
    warm_rows: int = 320
    seed: int = 0
    in_one_partition: bool = False
    """For TransferQueue, whose cost grows with the partition."""

    @property
    def label(self) -> str:
        """What tells its results from others."""
        return f"{self.workload} in one partition" if self.in_one_partition else self.workload

    @property
    def columns(self) -> tuple[str, ...]:
        """Their names."""
        return COLUMNS[self.workload]

    @property
    def total_rows(self) -> int:
        """How many are moved while the clock runs."""
        return self.rows * self.passes


def make_rows(job: Job) -> Rows:
    """All rows of a pass; the reward, or the first value, is the row's number."""
    rng = np.random.default_rng(job.seed)
    if job.workload == "D":
        fields: Rows = {name: rng.standard_normal(DENSE_SHAPE, dtype=np.float32) for name in job.columns}
        fields["field_0"][:, 0] = np.arange(job.rows)  # type: ignore[call-overload]
        return fields
    if job.workload == "T":
        tokens = rng.integers(0, 150_000, size=(job.rows, TOKENS))
        tokens[:, 0] = np.arange(job.rows)
        return {"tokens": tokens}
    lengths = {name: rng.integers(64, 1025, size=job.rows) for name in ("prompt", "response")}
    lengths["logprobs"] = lengths["response"]
    rows: Rows = {"reward": np.arange(job.rows, dtype=np.float32)}
    for name, dtype in MIXED.items():
        total = int(lengths[name].sum())
        values = rng.integers(0, 150_000, size=total) if dtype.kind == "i" else -rng.random(total, dtype=np.float32)
        rows[name] = np.split(values, np.cumsum(lengths[name])[:-1])
    return rows


def cut(rows: Rows, size: int) -> list[Rows]:
    """Consecutive batches of `size` rows; the last may be smaller."""
    total = len(next(iter(rows.values())))
    return [{name: column[i : i + size] for name, column in rows.items()} for i in range(0, total, size)]


def num_bytes(rows: Rows) -> int:
    """Of the values alone."""
    return sum(sum(row.nbytes for row in column) for column in rows.values())


# -- checksums -------------------------------------------------------------------------------


def checksums(batch: Batch) -> NDArray[np.uint64]:
    """For each row, the sum of its values' bits, columns weighted by their place in the alphabet.

    Exact, and the same however the rows were put together.
    """
    total: NDArray[np.uint64] | None = None
    for place, name in enumerate(sorted(batch)):
        values, lengths = batch[name]
        words = np.ascontiguousarray(values).view(np.uint64 if values.dtype.itemsize == 8 else np.uint32)
        if lengths is None:
            sums = words.reshape(len(values), -1).sum(axis=1, dtype=words.dtype)
        else:
            starts = np.zeros(len(lengths), np.int64)
            np.cumsum(lengths[:-1], out=starts[1:])
            sums = np.add.reduceat(words, starts)
        weighted = sums.astype(np.uint64) * np.uint64(2 * place + 1)
        total = weighted if total is None else total + weighted
    assert total is not None
    return total


def joined(rows: Rows) -> Batch:
    """The rows as a consumer would get them."""
    batch: Batch = {}
    for name, column in rows.items():
        if isinstance(column, list):
            batch[name] = (np.concatenate(column), np.fromiter((len(row) for row in column), np.int64, len(column)))
        else:
            batch[name] = (column, None)
    return batch


class Checker:
    """Holds what a consumer gets against what was made from the seed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._expected = checksums(joined(make_rows(job)))
        self._seen = np.zeros(len(self._expected), np.int64)

    def check(self, batch: Batch) -> int:
        """The number of rows, each of them right."""
        found = checksums(batch)
        if self._job.workload == "D":
            numbers = batch["field_0"][0][:, 0].astype(np.int64)
        elif self._job.workload == "T":
            numbers = batch["tokens"][0].reshape(-1, TOKENS)[:, 0].astype(np.int64)
        else:
            numbers = batch["reward"][0].reshape(-1).astype(np.int64)
        if not np.array_equal(self._expected[numbers], found):
            raise ValueError(f"{self._job.workload}: a row's checksum differs from the one that was put")
        self._seen[numbers] += 1
        return len(found)

    def reset(self) -> None:
        """Forget the warm-up."""
        self._seen[:] = 0

    def finish(self) -> None:
        """Every row came exactly as often as it was put."""
        if not (self._seen == self._job.passes).all():
            raise ValueError(f"{self._job.workload}: some rows came more or less often than they were put")


# -- one buffer for a batch: what a peer that moves bytes is given ----------------------------


def pack(rows: Rows, columns: Sequence[str]) -> list[bytes | memoryview]:
    """The parts to join: the number of rows, all lengths, then the values of 8 bytes before those of 4."""
    total = len(next(iter(rows.values())))
    lengths, parts = [total], list[bytes | memoryview]()
    for name in by_width(columns):
        column = rows[name]
        if isinstance(column, list):
            lengths += map(len, column)
            parts += [row.data for row in column]
        else:
            parts.append(np.ascontiguousarray(column).data)
    return [np.array(lengths, np.int64).data, *parts]


def unpack(buffer: bytes | memoryview | Array, columns: Sequence[str]) -> Batch:
    """The batch, as views of the buffer."""
    total = int(np.frombuffer(buffer, np.int64, 1)[0])
    ragged = [name for name in by_width(columns) if name in MIXED_RAGGED]
    lengths = np.frombuffer(buffer, np.int64, len(ragged) * total, 8).reshape(-1, total)
    offset, batch = 8 * (1 + len(ragged) * total), Batch()
    for name in by_width(columns):
        size = lengths[ragged.index(name)] if name in ragged else None
        shape = shape_of(name)
        count = int(size.sum()) if size is not None else total * int(np.prod(shape))
        values = np.frombuffer(buffer, dtype_of(name), count, offset)
        offset += values.nbytes
        batch[name] = (values if size is not None else values.reshape(total, *shape), size)
    return batch


def by_width(columns: Sequence[str]) -> Iterator[str]:
    """Wider values first, so that all are aligned."""
    yield from sorted(columns, key=lambda name: -dtype_of(name).itemsize)


def dtype_of(column: str) -> np.dtype[np.generic]:
    """Of its values."""
    return MIXED.get(column) or np.dtype(np.int64 if column == "tokens" else np.float32)


def shape_of(column: str) -> tuple[int, ...]:
    """Of a row, where all rows have the same."""
    return (TOKENS,) if column == "tokens" else (DENSE_SHAPE[1],) if column.startswith("field") else ()


def count(batch: Batch) -> int:
    """Its rows."""
    values, lengths = next(iter(batch.values()))
    return len(values) if lengths is None else len(lengths)


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of several, where they were put one row at a time."""
    if len(batches) == 1:
        return batches[0]
    result: Batch = {}
    for name in batches[0]:
        values, lengths = zip(*(batch[name] for batch in batches), strict=True)
        is_ragged = lengths[0] is not None
        result[name] = (np.concatenate(values), np.concatenate(lengths) if is_ragged else None)
    return result
