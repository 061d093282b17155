"""The log of a run thinned out: what goes, what stays, and that nothing is read twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from asyncflow.data import records
from asyncflow.data.log import FileLog, LogMode
from asyncflow.data.log_reader import LoggedRecord, compact_segment, read_log, read_metas
from asyncflow.recipes import thinning
from asyncflow.recipes.thinning import Thinner
from tests.data.simulated_log import Entry, simulated


def write(folder: Path, *parts: list[Entry]) -> Path:
    """A log with a segment for each part, and an open one."""

    async def append() -> None:
        for part in (*parts, []):
            log = FileLog.open(folder, mode=LogMode.GROUP_COMMIT, on_failure=lambda error: None)
            for record, payload in part:
                log.append(records.encode(record), (payload,) if payload else ())
            await log.aclose()

    asyncio.run(append())
    return folder


def tickets_of(record: records.AnyRecord) -> set[int]:
    if isinstance(record, records.Produced):
        return {*range(record.first, record.first + record.count)}
    return {*records.read_tickets(record.rows.tickets).tolist()} if isinstance(record, records.Written) else set()


def kept(folder: Path) -> set[int]:
    """The tickets of payloads that are there."""
    found: set[int] = set()
    for logged in read_log(folder):
        if logged.place.length and not logged.place.is_compacted:
            found |= tickets_of(records.decode(logged.meta))
    return found


def trained(entries: list[Entry], *steps: int) -> set[int]:
    found = (record for record, _ in entries if isinstance(record, records.Trained) and record.step in steps)
    return {ticket for record in found for ticket in records.read_tickets(record.tickets).tolist()}


def test_rows_of_steps_before_the_oldest_checkpoint_go_and_no_others(tmp_path: Path) -> None:
    entries = simulated()[0]
    folder = write(tmp_path / "ledger", entries)
    assert kept(folder) >= trained(entries, 1, 2, 3, 4, 5, 6)
    Thinner(folder).thin_out(3)
    assert kept(folder) == trained(entries, 4, 5, 6)


def test_rows_that_a_task_has_not_acknowledged_stay_though_they_are_trained(tmp_path: Path) -> None:
    entries = simulated()[0]
    late = next(record for record, _ in entries if isinstance(record, records.Done))
    waiting = {*records.read_tickets(late.tickets).tolist()} & trained(entries, 1, 2)
    assert waiting
    rest = [entry for entry in entries if entry[0] is not late]
    folder = write(tmp_path / "ledger", rest, [(late, b"")])
    thinner = Thinner(write(tmp_path / "before", rest))
    thinner.thin_out(2)
    assert kept(tmp_path / "before") & trained(entries, 1, 2) == waiting
    Thinner(folder).thin_out(2)
    assert not kept(folder) & trained(entries, 1, 2)


def test_a_task_that_came_later_keeps_what_was_not_trained_then_and_no_more(tmp_path: Path) -> None:
    entries = simulated()[0]
    first = entries[0][0]
    assert isinstance(first, records.Opened)
    place = next(at for at, (one, _) in enumerate(entries) if isinstance(one, records.Trained) and one.step == 3) + 1
    again = records.Opened(epoch=2, tasks={**first.tasks, "new": ("token_ids",)}, trains=first.trains)
    folder = write(tmp_path / "ledger", [*entries[:place], (again, b""), *entries[place:]])
    Thinner(folder).thin_out(6)
    assert kept(folder) == trained(entries, 4, 5, 6)


def test_each_segment_is_read_once_and_written_again_only_for_what_goes_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = simulated()[0]
    half = len(entries) // 2
    folder = write(tmp_path / "ledger", entries[:half], entries[half:])
    reads: list[str] = []
    rewrites: list[str] = []

    def read(path: Path) -> list[LoggedRecord]:
        reads.append(path.name)
        return [*read_metas(path)]

    rewrite = compact_segment

    def compact(path: Path, is_needed: object) -> int:
        rewrites.append(path.name)
        return rewrite(path, is_needed)  # type: ignore[arg-type]

    monkeypatch.setattr(thinning, "read_metas", read)
    monkeypatch.setattr(thinning, "compact_segment", compact)
    thinner = Thinner(folder)
    for _ in range(3):
        thinner.thin_out(1)
    assert reads == ["00000001.log", "00000002.log"]
    assert rewrites == ["00000001.log"]
    thinner.thin_out(6)
    assert len(reads) == 2
    assert kept(folder) == set()
    rewrites.clear()
    thinner.thin_out(6)
    assert rewrites == []


def test_metas_are_those_of_a_full_reading(tmp_path: Path) -> None:
    folder = write(tmp_path / "ledger", simulated()[0])
    Thinner(folder).thin_out(2)
    assert [*read_metas(folder / "00000001.log")] == [*read_log(folder)]
