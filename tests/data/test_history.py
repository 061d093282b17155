"""The log read back: columns as they were put, wherever they lie, and each payload read once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from asyncflow.core.errors import LogDamagedError
from asyncflow.core.types import Rows
from asyncflow.data import history as subject
from asyncflow.data import records
from asyncflow.data.gate import Gate
from asyncflow.data.history import History, Payloads, read_history, tasks_of
from asyncflow.data.layout import read
from asyncflow.data.log import Place, read_payload
from asyncflow.data.records import read_rows
from tests.data.simulated_log import Entry, simulated, write


def opened(folder: Path) -> History:
    tasks, numbers = tasks_of(folder)
    return read_history(folder, tasks, Gate(**numbers))


def expected(entries: list[Entry], name: str) -> dict[tuple[int, int], bytes]:
    """The bytes of a column by row, read from the records one by one."""
    found: dict[tuple[int, int], bytes] = {}
    for record, payload in entries:
        if not isinstance(record, records.Produced | records.Written):
            continue
        for spec in (spec for spec in record.columns if spec.name == name):
            values = read(spec, np.frombuffer(payload, np.uint8)).rows()
            if isinstance(record, records.Produced):
                for place, value in enumerate(values):
                    ticket, index = divmod(place, record.group_size)
                    found[record.first + ticket, index] = value.tobytes()
            else:
                rows = read_rows(record.rows)
                places = np.frombuffer(record.places, "<i4") if record.places else range(len(rows))
                pairs = zip(rows.tickets.tolist(), rows.indices.tolist(), places, strict=True)
                found.update({(ticket, index): values[place].tobytes() for ticket, index, place in pairs})
    return found


@pytest.mark.parametrize("name", ["token_ids", "versions", "reward", "advantage"])
def test_a_column_is_as_it_was_put_in_any_order_of_rows(tmp_path: Path, name: str) -> None:
    entries, _ = simulated()
    history = opened(write(tmp_path / "ledger", entries))
    wanted = expected(entries, name)
    rng = np.random.default_rng(3)
    for step, record in history.steps.items():
        rows = Rows.join([read_rows(batch) for batch in record.batches])
        rows = rows[rng.permutation(len(rows))]
        values = [row.tobytes() for row in history.column(rows, name).rows()]
        pairs = zip(rows.tickets.tolist(), rows.indices.tolist(), strict=True)
        assert values == [wanted[pair] for pair in pairs], step
        for batch in history.micro_batches(step, [name]):
            assert len(batch.columns[name].lengths) == len(batch.rows)


def test_a_column_of_a_group_may_come_in_several_writes(tmp_path: Path) -> None:
    entries, _ = simulated()
    wanted = expected(entries, "advantage")
    place = next(at for at, (record, _) in enumerate(entries) if isinstance(record, records.Written))
    record, payload = entries[place]
    assert isinstance(record, records.Written)
    rows = read_rows(record.rows)
    halves = []
    for places in (np.arange(0, len(rows), 2), np.arange(1, len(rows), 2)[::-1]):
        named = records.row_bytes(rows[places])
        halves.append(
            (records.Written(rows=named, places=places.astype("<i4").tobytes(), columns=record.columns), payload)
        )
    entries[place : place + 1] = halves
    values = opened(write(tmp_path / "ledger", entries)).column(rows, "advantage").rows()
    pairs = zip(rows.tickets.tolist(), rows.indices.tolist(), strict=True)
    assert [value.tobytes() for value in values] == [wanted[pair] for pair in pairs]
    assert len({value.tobytes() for value in values}) > 1


def test_each_payload_of_a_step_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, _ = simulated()
    history = opened(write(tmp_path / "ledger", entries))
    reads: Counter[Place] = Counter()

    def counted(place: Place) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        reads[place] += 1
        return read_payload(place)

    monkeypatch.setattr(subject, "read_payload", counted)
    list(history.micro_batches(2, ["token_ids", "versions", "advantage", "reward"]))
    assert set(reads.values()) == {1}


def test_payloads_in_memory_are_bounded(tmp_path: Path) -> None:
    entries, _ = simulated()
    history = opened(write(tmp_path / "ledger", entries))
    places = list(dict.fromkeys(block.place for block in history.blocks.values()))[:3]
    payloads = Payloads(max_bytes=places[0].length + places[1].length)
    held = [payloads[place] for place in places[:2]]
    assert payloads[places[0]] is held[0]
    again = payloads[places[2]]
    assert payloads[places[2]] is again
    assert payloads[places[1]] is not held[1]  # the one that was not used for longest is gone


def test_a_row_that_has_no_such_column_is_named(tmp_path: Path) -> None:
    entries, _ = simulated()
    history = opened(write(tmp_path / "ledger", entries))
    rows = read_rows(history.steps[1].batches[0])
    ticket = int(rows.tickets[0])
    with pytest.raises(LogDamagedError, match=f"row 0 of ticket {ticket} has no column nothing"):
        history.column(Rows(np.array([ticket]), np.array([0], np.int32)), "nothing")
    with pytest.raises(LogDamagedError, match="ticket 9999 has no rows"):
        history.column(Rows(np.array([9999]), np.array([0], np.int32)), "token_ids")


def test_columns_names_are_those_of_the_put_and_of_later_writes(tmp_path: Path) -> None:
    history = opened(write(tmp_path / "ledger", simulated()[0]))
    ticket = int(read_rows(history.steps[1].batches[0]).tickets[0])
    assert history.column_names(ticket) == ("token_ids", "loss_mask", "logprobs", "versions", "reward", "advantage")


def test_a_log_that_begins_at_a_checkpoint_is_read_back(tmp_path: Path) -> None:
    snapshot = simulated()[1].snapshots[1]
    entries, result = simulated(snapshot=snapshot)
    history = opened(write(tmp_path / "ledger", entries))
    assert history.ledger.counts() == result.counts
    assert history.last_step == 6
    just_begun = opened(write(tmp_path / "begun", entries[:1]))
    assert just_begun.last_step == 4  # the checkpoint's, though no step of this log was taken
    assert just_begun.ledger.snapshot() == snapshot
