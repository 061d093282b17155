"""Writing and reading small logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from asyncflow.data.log import FileLog, LogMode, read_log, read_payload

Content = tuple[bytes, bytes]
SMALL = [(b"first", b"one" * 5), (b"", b""), (b"third", b""), (b"fourth", b"four"), (b"fifth", b"5" * 40)]


def open_log(
    folder: Path, *, mode: LogMode = LogMode.SYNC, group_commit_s: float = 0.01, segment_bytes: int = 1 << 20
) -> FileLog:
    """A log whose failures end the test."""

    def fail(error: Exception) -> None:
        raise error

    return FileLog.open(folder, mode=mode, on_failure=fail, group_commit_s=group_commit_s, segment_bytes=segment_bytes)


async def write(
    folder: Path, records: Sequence[Content], *, each_round: bool = True, segment_bytes: int = 1 << 20
) -> None:
    """One opening that writes these, each flushed before the next, or all at once."""
    log = open_log(folder, segment_bytes=segment_bytes)
    for meta, payload in records:
        half = len(payload) // 2
        log.append(meta, [payload[:half], np.frombuffer(payload[half:], np.uint8)])
        if each_round:
            await log.flush()
    await log.aclose()


def read(folder: Path) -> list[Content]:
    """Everything in the log; the numbers must be 1, 2, 3, …"""
    records = list(read_log(folder))
    assert [record.lsn for record in records] == list(range(1, len(records) + 1))
    return [(record.meta, read_payload(record.place).tobytes()) for record in records]


def names(folder: Path) -> list[str]:
    """What lies in the folder."""
    return sorted(path.name for path in folder.iterdir())
