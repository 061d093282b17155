"""What no data plane of `data_plane.py` can beat: copying within memory, and writing to the disk."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
from _data_plane_work import Job, Rows, cut, make_rows

ARENA_BYTES = 256 << 20
WRITE_BYTES = 8 << 20
ALIGNMENT = 64


def copied_rows_per_s(job: Job) -> float:
    """Rows that one process concatenates into shared memory, 32 at a time; the best of the passes."""
    batches = cut(make_rows(job), job.put_rows)
    arena = np.frombuffer(mmap.mmap(-1, ARENA_BYTES), np.uint8)
    arena[:] = 0  # so that no page is missing
    best_s = min(_copy_all(batches, arena) for _ in range(job.passes))
    return job.rows / best_s


def _copy_all(batches: list[Rows], arena: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> float:
    begin_s, offset = time.perf_counter(), 0
    for batch in batches:
        for column in batch.values():
            rows = column if isinstance(column, list) else [column]
            size = sum(map(len, rows)) * rows[0].itemsize
            if offset + size > ARENA_BYTES:
                offset = 0
            np.concatenate(rows, out=arena[offset : offset + size].view(rows[0].dtype))
            offset += -(-size // ALIGNMENT) * ALIGNMENT
    return time.perf_counter() - begin_s


def disk_mb_per_s(folder: Path, num_bytes: int) -> dict[str, float]:
    """Sequential writing: through the page cache and synced at the end, and past it."""
    file = folder / "sequential"
    rates: dict[str, float] = {}
    for name, flags in (("buffered", 0), ("direct", getattr(os, "O_DIRECT", 0))):
        try:
            rates[name] = _write(file, num_bytes, flags)
        except OSError:  # a file system without direct writes
            rates[name] = 0.0
        finally:
            file.unlink(missing_ok=True)
    return rates


def _write(file: Path, num_bytes: int, flags: int) -> float:
    block = mmap.mmap(-1, WRITE_BYTES)  # begins at a page, which direct writes ask for
    block[:] = np.random.default_rng(0).bytes(WRITE_BYTES)
    count = max(1, num_bytes // WRITE_BYTES)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags, 0o600)
    try:
        begin_s = time.perf_counter()
        for _ in range(count):
            if os.write(handle, block) != WRITE_BYTES:
                raise OSError(f"{file}: the disk took less than {WRITE_BYTES} bytes at once")
        os.fdatasync(handle)
        return count * WRITE_BYTES / (time.perf_counter() - begin_s) / 1e6
    finally:
        os.close(handle)
