"""The audit: a log of a real loop passes, and every rule it may break is seen and named."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
import pytest

from asyncflow.core.errors import LogDamagedError
from asyncflow.data import records
from asyncflow.data.audit import audit_log
from asyncflow.data.records import RowBytes, read_tickets, ticket_bytes
from tests.data.simulated_log import CONFIG, Entry, audited, simulated, write

RecordT = TypeVar("RecordT", bound=records.Record)
Forge = Callable[[list[Entry]], None]


@pytest.fixture
def entries() -> list[Entry]:
    return list(simulated()[0])


def of_kind(entries: list[Entry], kind: type[RecordT]) -> Iterator[tuple[int, RecordT]]:
    return ((place, record) for place, (record, _) in enumerate(entries) if isinstance(record, kind))


def change(entries: list[Entry], kind: type[records.AnyRecord], number: int, **values: object) -> None:
    """Replace fields of the record of this kind and number."""
    places = [place for place, (record, _) in enumerate(entries) if isinstance(record, kind)]
    record, payload = entries[places[number]]
    entries[places[number]] = (msgspec.structs.replace(record, **values), payload)


def trained(entries: list[Entry], number: int) -> records.Trained:
    return list(of_kind(entries, records.Trained))[number][1]


def tickets(*numbers: int) -> bytes:
    return ticket_bytes(np.array(numbers, np.int64))


def put_after(entries: list[Entry], kind: type[records.Record], number: int, record: records.AnyRecord) -> None:
    entries.insert(list(of_kind(entries, kind))[number][0] + 1, (record, b""))


def remove(entries: list[Entry], kind: type[records.Record], number: int) -> None:
    del entries[list(of_kind(entries, kind))[number][0]]


@pytest.mark.parametrize("seed", range(4))
def test_a_run_of_the_real_loop_breaks_no_rule_and_has_the_loops_own_accounts(seed: int) -> None:
    entries, result = simulated(seed=seed)
    audit = audited(entries)
    assert audit.violations == []
    assert (audit.submitted, audit.trained, len(audit.pending)) == (result.counts.admitted, 24, result.counts.pending)
    assert audit.dropped_by_reason == dict(result.counts.dropped)
    assert "failed" in audit.dropped_by_reason
    assert (audit.twice, audit.lost, audit.last_step) == ([], [], CONFIG.steps)
    assert max(audit.checked.by_age) == result.staleness_max
    assert audit.checked.groups == 24


def test_a_killed_run_has_what_it_did_not_finish_pending(entries: list[Entry]) -> None:
    place = list(of_kind(entries, records.Trained))[2][0]
    audit = audited(entries[: place + 1])
    assert audit.violations == []
    assert (audit.trained, len(audit.pending)) == (12, audit.submitted - 12 - sum(audit.dropped_by_reason.values()))
    assert audit.pending


def test_a_log_that_begins_at_a_checkpoint_counts_what_came_before() -> None:
    first = simulated()[1].snapshots[1]
    entries, result = simulated(snapshot=first)
    assert isinstance(entries[0][0], records.Opened)
    assert entries[0][0].carried is not None
    audit = audited(entries)
    assert audit.violations == []
    assert (audit.submitted, audit.trained) == (result.counts.admitted, result.counts.trained)
    assert audit.dropped_by_reason == dict(result.counts.dropped)


def test_rows_that_were_compacted_are_bounded_by_their_admission_or_unknown(entries: list[Entry]) -> None:
    audit = audited(entries, compacted=True)
    assert audit.violations == []
    assert (audit.checked.groups, audit.checked.bounded_groups, audit.checked.unknown_groups) == (0, 24, 0)
    change(entries, records.Opened, 0, max_staleness=0)
    assert audited(entries, compacted=True).checked.unknown_groups > 0


def train_twice(entries: list[Entry]) -> None:
    first, second = trained(entries, 0), trained(entries, 1)
    ours, theirs = read_tickets(first.tickets)[0], read_tickets(second.tickets)[0]
    batches = tuple(
        RowBytes(ticket_bytes(np.where(read_tickets(b.tickets) == theirs, ours, read_tickets(b.tickets))), b.indices)
        for b in second.batches
    )
    changed = np.where(read_tickets(second.tickets) == theirs, ours, read_tickets(second.tickets))
    change(entries, records.Trained, 1, tickets=ticket_bytes(changed), batches=batches)


def lose_a_row(entries: list[Entry]) -> None:
    first, *others = trained(entries, 1).batches
    change(entries, records.Trained, 1, batches=(RowBytes(first.tickets[:-8], first.indices[:-4]), *others))


def repeat_a_row(entries: list[Entry]) -> None:
    batches = trained(entries, 1).batches
    again = RowBytes(batches[0].tickets[:8], batches[0].indices[:4])
    change(entries, records.Trained, 1, batches=(*batches, again))


def train_a_foreign_row(entries: list[Entry]) -> None:
    other = trained(entries, 0).batches[0]
    again = RowBytes(other.tickets[:8], other.indices[:4])
    change(entries, records.Trained, 1, batches=(*trained(entries, 1).batches, again))


def invent_a_row(entries: list[Entry]) -> None:
    batches = trained(entries, 1).batches
    more = RowBytes(batches[0].tickets[:8], np.array([9], "<i4").tobytes())
    change(entries, records.Trained, 1, batches=(*batches, more))


def train_and_drop(entries: list[Entry]) -> None:
    put_after(entries, records.Trained, 0, records.Dropped(tickets=trained(entries, 0).tickets[:8], reason="timeout"))


def drop_and_train(entries: list[Entry]) -> None:
    ticket = trained(entries, 0).tickets[:8]
    place = next(iter(of_kind(entries, records.Trained)))[0]
    entries.insert(place, (records.Dropped(tickets=ticket, reason="timeout"), b""))


def drop_without_reason(entries: list[Entry]) -> None:
    change(entries, records.Dropped, 0, reason="")


def drop_twice(entries: list[Entry]) -> None:
    put_after(entries, records.Dropped, 0, next(iter(of_kind(entries, records.Dropped)))[1])


def skip_a_step(entries: list[Entry]) -> None:
    change(entries, records.Trained, 3, step=9)


def shrink_a_step(entries: list[Entry]) -> None:
    change(entries, records.Trained, 3, tickets=trained(entries, 3).tickets[:-8])


def tighten_the_bound(entries: list[Entry]) -> None:
    change(entries, records.Opened, 0, max_staleness=0)


def train_before_live(entries: list[Entry]) -> None:
    """Tokens of a version that the trainer had not made: the steps' records stand too early."""
    place = list(of_kind(entries, records.Trained))[4][0]
    late = next(at for at, record in of_kind(entries, records.Produced) if at > place)
    entries.insert(place, entries.pop(late))


def admit_again(entries: list[Entry]) -> None:
    put_after(entries, records.Admitted, 5, list(of_kind(entries, records.Admitted))[2][1])


def skip_a_ticket(entries: list[Entry]) -> None:
    remove(entries, records.Admitted, 4)


def admit_under_another_version(entries: list[Entry]) -> None:
    change(entries, records.Admitted, 20, live_step=0)


def admit_too_many(entries: list[Entry]) -> None:
    place, record = list(of_kind(entries, records.Admitted))[7]
    entries.insert(place + 1, (msgspec.structs.replace(record, first=8), b""))


def forget_who_opened(entries: list[Entry]) -> None:
    del entries[0]


def open_again_in_an_older_epoch(entries: list[Entry]) -> None:
    opened = entries[0][0]
    assert isinstance(opened, records.Opened)
    put_after(entries, records.Trained, 2, opened)


def go_on_from_the_future(entries: list[Entry]) -> None:
    opened = entries[0][0]
    assert isinstance(opened, records.Opened)
    put_after(entries, records.Trained, 2, msgspec.structs.replace(opened, epoch=2, restored_step=7))


def produce_for_an_older_epoch(entries: list[Entry]) -> None:
    """A process took the log over, and then rows of a ticket come that only the one before it had."""
    opened = entries[0][0]
    assert isinstance(opened, records.Opened)
    place = list(of_kind(entries, records.Produced))[3][0]
    entries.insert(place, (msgspec.structs.replace(opened, epoch=2), b""))


def admit_before_live(entries: list[Entry]) -> None:
    """A process took the log over and admits under the weights that were live before."""
    opened = entries[0][0]
    assert isinstance(opened, records.Opened)
    place = list(of_kind(entries, records.Admitted))[-1][0]
    entries.insert(place, (msgspec.structs.replace(opened, epoch=2), b""))


def lose_a_ticket(entries: list[Entry]) -> None:
    """A new process issues tickets and says nothing about one that the old process had not finished."""
    place = list(of_kind(entries, records.Admitted))[-1][0]
    opened = entries[0][0]
    assert isinstance(opened, records.Opened)
    live = list(of_kind(entries, records.Live))[-1][1]
    number = max(record.first for _, record in of_kind(entries, records.Admitted)) + 1
    del entries[place + 1 :]
    admitted = records.Admitted(first=number, count=1, live_step=live.step)
    later = msgspec.structs.replace(opened, epoch=2, steps=99, max_staleness=9)
    entries += [(later, b""), (live, b""), (admitted, b"")]


def put_twice(entries: list[Entry]) -> None:
    place = list(of_kind(entries, records.Produced))[2][0]
    entries.insert(place + 1, entries[place])


def write_twice(entries: list[Entry]) -> None:
    place = list(of_kind(entries, records.Written))[2][0]
    entries.insert(place + 1, entries[place])


def change_the_prompt(entries: list[Entry]) -> None:
    place, record = list(of_kind(entries, records.Dispatched))[3]
    entries.insert(place + 1, (msgspec.structs.replace(record, prompt="another"), b""))


def go_live_before_the_step(entries: list[Entry]) -> None:
    change(entries, records.Live, 3, step=5)


def keep_another_step(entries: list[Entry]) -> None:
    change(entries, records.Checkpointed, 0, step=1)


def misnumber_threads(entries: list[Entry]) -> None:
    change(entries, records.Trained, 1, threads=(1,) * (len(trained(entries, 1).batches) + 2))


FORGERIES: list[tuple[Forge, str]] = [
    (train_twice, r"ticket \d+ was trained twice, in steps 1 and 2"),
    (lose_a_row, r"row \d of ticket \d+ is missing from step 2"),
    (repeat_a_row, r"row \d of ticket \d+ is in step 2 2 times"),
    (train_a_foreign_row, r"step 2 trained on rows of ticket \d+, which is not one of its groups"),
    (invent_a_row, r"step 2 trained on row 9 of ticket \d+, which has 3 rows"),
    (train_and_drop, r"ticket \d+ was dropped \(timeout\) after it was trained in step 1"),
    (drop_and_train, r"ticket \d+ was trained in step 1 after it was dropped \(timeout\)"),
    (drop_without_reason, r"ticket \d+ was dropped without a reason"),
    (drop_twice, r"ticket \d+ was dropped \(.*\) after it was dropped"),
    (skip_a_step, "step 9 follows step 3"),
    (shrink_a_step, "step 4 has 3 groups instead of 4"),
    (tighten_the_bound, r"step \d trained on \d+ tokens of ticket \d+ that are 1 versions old .* the bound is 0"),
    (train_before_live, r"ticket \d+ .*(came late|holds tokens of version|without rows|never admitted)"),
    (admit_again, r"ticket 2 was admitted twice"),
    (skip_a_ticket, "ticket 5 was admitted, though the next one was 4"),
    (admit_under_another_version, r"ticket \d+ was admitted under version 0, but live was [1-9]"),
    (admit_too_many, "ticket 8 passed the gate too early: 8 groups stood before it"),
    (forget_who_opened, "the log begins without a record of who opened it"),
    (open_again_in_an_older_epoch, "epoch 1 follows epoch 1: an older process wrote on"),
    (go_on_from_the_future, "the run went on from step 7, but the log ends at step 3"),
    (produce_for_an_older_epoch, r"the rows of ticket \d+ came late: it was not admitted in this epoch"),
    (admit_before_live, r"ticket \d+ was admitted under version \d, but live was none"),
    (lose_a_ticket, r"ticket \d+ is lost"),
    (put_twice, r"the rows of ticket \d+ came late: it was produced already"),
    (write_twice, r"column advantage of row 0 of ticket \d+ was written twice"),
    (change_the_prompt, r"ticket \d+ was prompt \d+ and became prompt another"),
    (go_live_before_the_step, "version 5 went live before its step was trained; the last was"),
    (keep_another_step, "a checkpoint of step 1 was kept after step 2"),
    (misnumber_threads, "step 2 names .* thread counts for"),
]


@pytest.mark.parametrize(("forge", "expected"), FORGERIES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_forged_log_is_seen(entries: list[Entry], forge: Forge, expected: str) -> None:
    forge(entries)
    found = audited(entries)
    matching = [violation for violation in found.violations if re.search(expected, violation.what)]
    assert matching, [violation.what for violation in found.violations[:8]]
    assert all(str(violation).endswith(f"(record {violation.lsn})") for violation in matching)
    assert found.num_violations == len(found.violations)


def test_accounts_of_forged_logs(entries: list[Entry]) -> None:
    train_twice(entries)
    assert len(audited(entries).twice) == 1
    lost = list(simulated()[0])
    lose_a_ticket(lost)
    assert audited(lost).lost


def test_a_log_that_is_being_written_ends_where_it_is_torn(entries: list[Entry], tmp_path: Path) -> None:
    folder = write(tmp_path / "ledger", entries)
    [segment] = folder.glob("*.log")
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-7])
    audit = audit_log(folder)
    assert (audit.violations, audit.num_records) == ([], len(entries) - 1)


def test_a_flipped_byte_is_damage_and_no_violation(entries: list[Entry], tmp_path: Path) -> None:
    folder = write(tmp_path / "ledger", entries[:100])
    write(folder, entries[100:])  # a second segment, which says that all of the first was on the disk
    segment = min(folder.glob("*.log"))
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(bytes(data))
    with pytest.raises(LogDamagedError, match="damaged at byte"):
        audit_log(folder)


def test_progress_is_told_in_bytes(entries: list[Entry], tmp_path: Path) -> None:
    folder = write(tmp_path / "ledger", entries)
    told: list[int] = []
    audit_log(folder, told.append)
    [segment] = folder.glob("*.log")
    assert 0 < segment.stat().st_size - sum(told) < 64
