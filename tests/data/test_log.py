"""The durable log: what was appended comes back, what is damaged is named, and actions wait for the disk."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncflow.core.errors import LedgerError, LogDamagedError, RunFolderError
from asyncflow.data.log import Log, LogMode, MemoryLog, NoLog, read_log
from tests.data.log_files import SMALL, Content, names, open_log, read, write

contents = st.lists(st.tuples(st.binary(max_size=60), st.binary(max_size=300)), max_size=8)


@settings(max_examples=30)
@given(openings=st.lists(contents, max_size=3), segment_bytes=st.integers(1, 900), each_round=st.booleans())
def test_records_come_back_in_order(openings: list[list[Content]], segment_bytes: int, each_round: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        for records in openings:
            asyncio.run(write(Path(name), records, segment_bytes=segment_bytes, each_round=each_round))
        assert read(Path(name)) == [record for records in openings for record in records]


async def test_segments_are_no_larger_than_asked_but_for_one_record(tmp_path: Path) -> None:
    await write(tmp_path, [(b"m", b"x" * 300)] * 20 + [(b"m", b"x" * 5000)], segment_bytes=1000)
    sizes = [(tmp_path / name).stat().st_size for name in names(tmp_path) if name != "lock"]
    assert len(sizes) == 11
    assert all(size <= 1000 for size in sizes[:-1])


async def test_a_record_of_many_buffers(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(
        b"m", [b"ab"] * 5000 + [memoryview(b"xyz")[1:], b"", np.zeros((0,), np.uint8), np.ones((2, 2), np.uint8)]
    )
    await log.aclose()
    assert read(tmp_path) == [(b"m", b"ab" * 5000 + b"yz" + b"\1" * 4)]


async def test_a_tail_cut_at_any_byte_is_a_clean_end_and_is_gone_on_from(tmp_path: Path) -> None:
    await write(tmp_path, SMALL)
    path = tmp_path / "00000001.log"
    whole = path.read_bytes()
    start = list(read_log(tmp_path))[-1].place.record
    for cut in range(start, len(whole)):
        for lost in (b"", b"\0" * (len(whole) - cut), b"\0" * 5000, b"\xff" * 9):  # zeros: pages that never came
            path.write_bytes(whole[:cut] + lost)
            assert read(tmp_path) == SMALL[:-1]
    path.write_bytes(whole[: len(whole) - 3])
    await write(tmp_path, [(b"again", b"")])
    assert read(tmp_path) == [*SMALL[:-1], (b"again", b"")]
    assert path.stat().st_size == start


@pytest.mark.parametrize("next_opening", [False, True])
async def test_any_changed_byte_in_the_middle_is_damage(tmp_path: Path, next_opening: bool) -> None:
    await write(tmp_path, SMALL)
    path = tmp_path / "00000001.log"
    whole = path.read_bytes()
    end = len(whole) if next_opening else list(read_log(tmp_path))[-1].place.record
    if next_opening:  # a later segment says that all of this one was on the disk
        await write(tmp_path, [])
    for position in range(end):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        with pytest.raises(LogDamagedError, match=rf"{path} is damaged at byte \d+: .*Restore"):
            read(tmp_path)


async def test_damage_is_not_written_after(tmp_path: Path) -> None:
    await write(tmp_path, SMALL)
    path = tmp_path / "00000001.log"
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(LogDamagedError, match=r"byte 28: record 1 is damaged; it was on the disk, as record 2 shows"):
        open_log(tmp_path)
    assert path.read_bytes() == damaged
    assert names(tmp_path) == ["00000001.log", "lock"]


async def test_records_of_a_flush_that_never_ended_may_be_lost_in_any_combination(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(b"flushed")
    await log.flush()
    for meta, payload in SMALL:
        log.append(meta, [payload])
    await log.aclose()
    second, third = list(read_log(tmp_path))[1:3]
    path = tmp_path / "00000001.log"
    whole = bytearray(path.read_bytes())
    # The pages of the second record never came, those after it did.
    whole[second.place.record : third.place.record] = bytes(third.place.record - second.place.record)
    path.write_bytes(whole)
    assert read(tmp_path) == [(b"flushed", b"")]


async def test_a_record_inside_a_payload_is_none(tmp_path: Path) -> None:
    await write(tmp_path / "a", SMALL)
    inner = (tmp_path / "a" / "00000001.log").read_bytes()
    await write(tmp_path / "b", [(b"first", b""), (b"m", inner)])
    path = tmp_path / "b" / "00000001.log"
    path.write_bytes(path.read_bytes()[:-1])
    assert read(tmp_path / "b") == [(b"first", b"")]


async def test_a_missing_or_foreign_segment_is_damage(tmp_path: Path) -> None:
    for _ in range(3):
        await write(tmp_path, SMALL)
    middle = tmp_path / "00000002.log"
    aside = middle.rename(tmp_path.parent / "aside")
    with pytest.raises(LogDamagedError, match=r"00000002\.log.*the file is missing, though there is 00000003\.log"):
        read(tmp_path)
    (tmp_path / "00000001.log").rename(middle)
    aside.rename(tmp_path / "00000001.log")
    with pytest.raises(LogDamagedError, match=r"00000001\.log.*header of segment 1"):
        read(tmp_path)


async def test_a_segment_that_begins_later_than_the_one_before_ends_is_damage(tmp_path: Path) -> None:
    await write(tmp_path, SMALL)
    await write(tmp_path, SMALL)
    path = tmp_path / "00000001.log"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LogDamagedError, match=r"00000001\.log .*record 5 should follow.* begins with record 6"):
        read(tmp_path)


async def test_files_of_others_are_named_and_drafts_removed(tmp_path: Path) -> None:
    (tmp_path / "00000001.log.draft").write_bytes(b"half")
    await write(tmp_path, SMALL)
    assert not [name for name in names(tmp_path) if name.endswith(".draft")]
    (tmp_path / "00000002.log.draft").write_bytes(b"half")
    assert read(tmp_path) == SMALL
    (tmp_path / "notes.txt").touch()
    for use in (partial(read, tmp_path), partial(open_log, tmp_path)):
        with pytest.raises(RunFolderError, match=r"not the log's: notes\.txt"):
            use()


async def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(RunFolderError, match="being written by another process"):
        open_log(tmp_path)
    await log.aclose()
    await open_log(tmp_path).aclose()


async def test_sync_acts_after_the_flush_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, flushed = threading.Event(), []
    real = os.fdatasync

    def fdatasync(descriptor: int) -> None:
        gate.wait()
        real(descriptor)
        flushed.append(descriptor)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log, acted = open_log(tmp_path), list[int]()
    for _ in range(20):
        log.append(b"m")
    done = asyncio.Event()
    log.when_safe(20, lambda: log.when_safe(20, done.set))
    log.when_safe(1, lambda: log.when_safe(3, lambda: acted.append(3)))  # must not overtake the second
    for lsn in (7, 2, 20):
        log.when_safe(lsn, partial(acted.append, lsn))
    await asyncio.sleep(0.02)
    assert acted == []
    gate.set()
    await done.wait()
    assert acted == [2, 3, 7, 20]
    assert len(flushed) <= 2, "records that wait share a flush"
    log.when_safe(5, lambda: acted.append(5))
    assert acted[-1] == 5, "what is on the disk is acted upon at once"
    await log.aclose()


async def test_an_action_that_fails_holds_up_no_other(tmp_path: Path) -> None:
    reported: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(str(context["exception"])))
    log, acted = open_log(tmp_path), list[int]()

    def fail() -> None:
        raise ValueError("wrong")

    lsn = log.append(b"m")
    log.when_safe(lsn, fail)
    log.when_safe(lsn, partial(acted.append, lsn))
    await log.aclose()
    assert acted == [1]
    assert len(reported) == 1


async def test_memory_may_be_used_again_once_written(tmp_path: Path) -> None:
    log, block = open_log(tmp_path, mode=LogMode.GROUP_COMMIT), np.zeros(100_000, np.uint8)
    for number in range(20):
        block[:] = number
        written = asyncio.Event()
        log.when_written(log.append(b"m", [block]), written.set)
        await written.wait()
    await log.aclose()
    assert [payload[0] for _, payload in read(tmp_path)] == list(range(20))


async def test_group_commit_acts_at_once_and_flushes_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flushed = os.fdatasync, threading.Event()

    def fdatasync(descriptor: int) -> None:
        real(descriptor)
        flushed.set()

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    log, acted = open_log(tmp_path, mode=LogMode.GROUP_COMMIT, group_commit_s=0.001), list[int]()
    lsn = log.append(b"m")
    log.when_safe(lsn, partial(acted.append, lsn))
    assert acted == [1]
    assert await asyncio.to_thread(flushed.wait, 30), "without another call"
    await log.aclose()


async def test_group_commit_flushes_when_asked(tmp_path: Path) -> None:
    log = open_log(tmp_path, mode=LogMode.GROUP_COMMIT, group_commit_s=3600)
    log.append(b"m")
    await log.flush()
    log.append(b"n")
    await log.aclose()
    await log.aclose()
    assert read(tmp_path) == [(b"m", b""), (b"n", b"")]
    with pytest.raises(LedgerError, match="closed"):
        log.append(b"late")
    with pytest.raises(LedgerError, match="mode off"):
        open_log(tmp_path, mode=LogMode.OFF)


@pytest.mark.parametrize("log", [NoLog(), MemoryLog()])
async def test_logs_without_a_disk_act_at_once(log: Log) -> None:
    acted: list[int] = []
    for number in (1, 2):
        assert log.append(b"m", [b"a", np.ones(2, np.uint8)]) == number
        log.when_safe(number, partial(acted.append, number))
        log.when_written(number, partial(acted.append, -number))
    await log.flush()
    await log.aclose()
    assert acted == [1, -1, 2, -2]
    assert not isinstance(log, MemoryLog) or log.records == [(b"m", b"a\1\1")] * 2
