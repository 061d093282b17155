"""The durable log under kills, disks that fail, and compaction: nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.errors import LogDamagedError, RunFolderError
from asyncflow.data import log_segments
from asyncflow.data.log import FileLog, LogMode, compact, read_log, read_payload
from tests.data.log_files import SMALL, Content, names, open_log, read, write


def break_after(monkeypatch: pytest.MonkeyPatch, call: str, num_good: int) -> list[int]:
    """Let `os.call` fail from a call on, for good; the list that is returned holds the calls."""
    real: Callable[..., int | None] = getattr(os, call)
    calls: list[int] = []

    def failing(*arguments: object) -> int | None:
        calls.append(1)
        if len(calls) > num_good:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, failing)
    return calls


@pytest.mark.parametrize("mode", [LogMode.SYNC, LogMode.GROUP_COMMIT])
@pytest.mark.parametrize("call", ["writev", "fdatasync"])
async def test_a_disk_that_fails_ends_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: LogMode, call: str
) -> None:
    failures: list[Exception] = []
    log = FileLog.open(tmp_path, mode=mode, on_failure=failures.append, group_commit_s=0)
    acted: list[int] = []
    log.when_safe(log.append(b"good"), partial(acted.append, 1))
    await log.flush()
    calls = break_after(monkeypatch, call, 0)
    lost = log.append(b"lost", [b"x" * 10])
    if mode == LogMode.SYNC:
        log.when_safe(lost, partial(acted.append, lost))
    log.when_written(lost, partial(acted.append, lost))
    for close in (log.flush, log.flush, log.aclose, log.aclose):
        with pytest.raises(RunFolderError, match=r"no space is left on the disk.*Nothing after record 1 "):
            await close()
    assert [type(error) for error in failures] == [RunFolderError]
    log.when_safe(3, partial(acted.append, 3))
    assert acted == [1]
    assert len(calls) == 1, "a failed flush is not tried again"


CHILD = """
import asyncio, sys, resource
from pathlib import Path
from asyncflow.data.log import FileLog, LogMode

async def main(folder, limit):
    failed = asyncio.Event()
    def on_failure(error):
        print("failed", error, flush=True)
        failed.set()
    log = FileLog.open(Path(folder), mode=LogMode.SYNC, on_failure=on_failure, segment_bytes=100_000)
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    while not failed.is_set():
        for _ in range(7):
            lsn = log.append(b"meta", [b"%d " % log._next_lsn, b"x" * 1999])
            log.when_safe(lsn, lambda lsn=lsn: print(lsn, flush=True))
        await asyncio.sleep(0)
        if lsn % 70 == 7:
            await log.flush()

asyncio.run(main(*sys.argv[1:]))
"""


def start_child(folder: Path, limit: int = 0) -> subprocess.Popen[str]:
    """A process that writes without end and prints what was acknowledged."""
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(limit)], stdout=subprocess.PIPE, text=True)


def check_acknowledged(folder: Path, lines: list[str]) -> None:
    """Every number that was printed is in the log, with its own payload."""
    records = read(folder)
    assert len(records) >= int(lines[-1])
    assert [payload.split()[0] for _, payload in records] == [b"%d" % lsn for lsn in range(1, len(records) + 1)]


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path) -> None:
    draw = random.Random(5)
    for _ in range(3):
        with start_child(tmp_path) as child:
            assert child.stdout is not None
            lines = [child.stdout.readline() for _ in range(draw.randrange(1, 400))]
            child.send_signal(signal.SIGKILL)
            lines += child.stdout.read().splitlines()
        check_acknowledged(tmp_path, lines[:-1] if not lines[-1].strip() else lines)


def test_a_file_that_may_not_grow_is_told_and_nothing_acknowledged_is_lost(tmp_path: Path) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    with start_child(tmp_path, limit=50_001) as child:
        assert child.stdout is not None
        lines = child.stdout.read().splitlines()
    assert "File too large" in lines[-1]
    check_acknowledged(tmp_path, lines[:-1])


async def write_blocks(folder: Path, num: int) -> list[Content]:
    records = [(b"meta %d" % number, bytes([number]) * 40_000) for number in range(num)]
    await write(folder, records, segment_bytes=100_000)
    return records


async def test_compaction_keeps_metas_and_what_is_needed(tmp_path: Path) -> None:
    records = await write_blocks(tmp_path, 7)  # two a segment; the last is never touched
    before = list(read_log(tmp_path))
    freed = compact(tmp_path, lambda record: record.lsn % 2 == 0)
    assert freed >= 3 * 8 * 4096, "whole pages"
    assert compact(tmp_path, lambda record: record.lsn % 2 == 0) == 0
    after = list(read_log(tmp_path))
    assert [record.meta for record in after] == [meta for meta, _ in records]
    for old, new in zip(before, after, strict=True):
        if new.lsn in {1, 3, 5}:
            assert new.place.is_compacted
            assert new.place.length == 40_000
            with pytest.raises(RunFolderError, match=rf"record {new.lsn} .*\(40000 bytes\) was compacted"):
                read_payload(old.place)
        else:
            assert read_payload(old.place).tobytes() == records[new.lsn - 1][1], "places stay true"
    assert compact(tmp_path, lambda record: False) > 0
    await write(tmp_path, [(b"more", b"")])
    assert [record.lsn for record in read_log(tmp_path)] == list(range(1, 9))


async def test_compaction_may_be_killed_and_may_run_while_the_log_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = await write_blocks(tmp_path, 6)
    with monkeypatch.context() as patch:
        break_after(patch, "fsync", 1)
        with pytest.raises(OSError, match="No space"):
            compact(tmp_path, lambda record: False)
    assert len(list(read_log(tmp_path))) == 6
    assert not [name for name in names(tmp_path) if name.endswith(".draft")]
    log = open_log(tmp_path, segment_bytes=100_000)
    thread = threading.Thread(target=compact, args=(tmp_path, lambda record: record.lsn == 2))
    thread.start()
    for meta, payload in records:
        log.append(meta, [payload])
        await asyncio.sleep(0)
    await log.aclose()
    thread.join()
    metas = [record.meta for record in read_log(tmp_path)]
    assert metas == [meta for meta, _ in records] * 2


async def test_a_changed_record_is_not_handed_out(tmp_path: Path) -> None:
    await write(tmp_path, SMALL)
    place = list(read_log(tmp_path))[3].place
    path = tmp_path / "00000001.log"
    content = bytearray(path.read_bytes())
    content[place.offset] ^= 1
    path.write_bytes(content)
    with pytest.raises(LogDamagedError, match="not what it was"):
        read_payload(place)


async def test_rounds_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = log_segments.SegmentWriter.write

    def spy(end: log_segments.SegmentWriter, records: Sequence[log_segments.Pending]) -> None:
        sizes.append(sum(record.payload_bytes for record in records))
        real(end, records)

    monkeypatch.setattr(log_segments.SegmentWriter, "write", spy)
    log = open_log(tmp_path, segment_bytes=64 << 20)
    block = np.zeros(1 << 20, np.uint8)
    for _ in range(50):
        log.append(b"m", [block])
    await log.aclose()
    assert sum(sizes) == 50 << 20
    assert max(sizes) <= 17 << 20


async def test_nothing_is_acknowledged_before_its_segment_has_a_name_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = open_log(tmp_path, segment_bytes=1)  # each record in a segment of its own
    await log.flush()
    synced: list[str] = []
    monkeypatch.setattr(log_segments, "sync_folder", lambda folder: synced.append("folder"))
    real = os.fdatasync

    def fdatasync(descriptor: int) -> None:
        synced.append("file")
        real(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    acted: list[list[str]] = []
    for _ in range(2):
        log.when_safe(log.append(b"m"), lambda: acted.append(list(synced)))
    await log.aclose()
    assert synced[-3:] == ["file", "folder", "file"], "what is before a segment is on the disk when it begins"
    assert acted[-1] == synced
