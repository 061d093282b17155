"""`asyncflow audit` and what `asyncflow replay` prints, on run folders with logs of simulated runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from asyncflow.cli.main import main
from asyncflow.cli.proof import show_replay
from asyncflow.core.types import Ticket
from asyncflow.core.world import World
from asyncflow.data import records
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.observe.run_folder import RunFolder
from asyncflow.observe.selection import mann_whitney
from asyncflow.workflow.checkpoint import LEDGER_FILE
from asyncflow.workflow.checkpoint_folder import begin_draft, publish
from tests.data.simulated_log import CONFIG, Entry, simulated, write

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")


def make_run(entries: Sequence[Entry], *, deterministic: bool = False) -> Path:
    """A run folder with this log."""
    config = CONFIG.model_copy(update={"recipe": "quickstart", "name": "one", "deterministic": deterministic})
    world = World()
    with RunFolder.create(config, root=Path("runs"), world=world) as folder:
        write(folder.path / "ledger", entries)
    return folder.path


def keep(run: Path, step: int, snapshot: LedgerSnapshot) -> Path:
    """Publish a checkpoint with this ledger."""
    draft = begin_draft(run / "checkpoints", step)
    (draft / LEDGER_FILE).write_bytes(msgspec.json.encode(snapshot))
    return publish(draft, World().disk)


def metrics(run: Path, *lines: dict[str, object]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_sound_run_is_proved(capsys: Out) -> None:
    entries, result = simulated()
    run = make_run(entries)
    keep(run, 4, result.snapshots[1])
    keep(run, 6, result.snapshots[2])
    assert main(["audit", "one"]) == 0
    out = capsys.readouterr().out
    counts = result.counts
    assert f"submitted {counts.admitted} = trained 24 + dropped {sum(counts.dropped.values())} (" in out
    assert f"+ pending {counts.pending}     twice 0   lost 0" in out
    assert "max 1 <= bound 1" in out
    assert "lineage ok (6 steps, 1 start) · checkpoints 4 6 verified   OK" in out
    assert "selection   trained / dispatched: prompt tokens" in out
    assert "too few groups for a test, which needs 8 of each" in out
    assert "dropped (no signal) 1: on purpose, algorithm.drop_no_signal" in out
    assert main(["audit", "one", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["trained"], found["twice"], found["checkpoints_verified"]) == (True, 24, [], [4, 6])
    assert found["dropped"] == dict(counts.dropped)


def test_a_forged_log_exits_with_3_and_says_where(capsys: Out) -> None:
    entries = list(simulated()[0])
    place = next(at for at, (record, _) in enumerate(entries) if isinstance(record, records.Trained))
    ticket = records.read_tickets(entries[place][0].tickets)[0]  # type: ignore[union-attr]
    dropped = records.Dropped(tickets=records.ticket_bytes(ticket.reshape(1)), reason="timeout")
    entries.insert(place + 1, (dropped, b""))
    make_run(entries)
    assert main(["audit", "one"]) == 3
    out = capsys.readouterr().out
    assert f"! ticket {ticket} was dropped (timeout) after it was trained in step 1 (record {place + 2})" in out
    assert "1 violation" in out
    assert "OK" not in out
    assert main(["audit", "one", "--json"]) == 3
    [violation] = json.loads(capsys.readouterr().out)["violations"]
    assert (violation["ticket"], violation["lsn"]) == (ticket, place + 2)


def test_a_log_that_cant_be_read_exits_with_1(capsys: Out) -> None:
    run = make_run(simulated()[0])
    write(run / "ledger", [])  # a second segment: all of the first was on the disk
    segment = run / "ledger" / "00000001.log"
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 1
    segment.write_bytes(bytes(data))
    assert main(["audit", "one"]) == 1
    assert "00000001.log is damaged at byte" in capsys.readouterr().err


def test_no_log_exits_with_1_and_no_run_word_with_2(capsys: Out) -> None:
    run = make_run(simulated()[0])
    (run / "ledger").rename(run / "ledger.old-1")
    assert main(["audit", "one"]) == 1
    err = capsys.readouterr().err
    assert "has no log" in err
    assert "ledger.old-1 was set aside" in err
    assert main(["audit"]) == 2
    assert main(["audit", "nothing"]) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"trained": 17}, "counts 17 trained groups, the log 16"),
        ({"admitted": 99}, "is dropped in only one of the log and its ledger.json"),
        ({"pending": ()}, "is dropped in only one of the log and its ledger.json"),
        ({"dropped": {"magic": 3}}, "counts dropped groups as {'magic': 3}, the log as"),
    ],
)
def test_a_checkpoint_whose_ledger_differs_is_a_violation(capsys: Out, change: dict[str, Any], expected: str) -> None:
    entries, result = simulated()
    run = make_run(entries)
    keep(run, 4, dataclasses.replace(result.snapshots[1], **change))
    assert main(["audit", "one"]) == 3
    assert expected in capsys.readouterr().out


def test_a_checkpoint_of_another_moment_or_with_other_bytes_is_a_violation(capsys: Out) -> None:
    entries, result = simulated()
    run = make_run(entries)
    keep(run, 4, result.snapshots[2])
    folder = keep(run, 6, result.snapshots[2])
    (folder / LEDGER_FILE).write_bytes((folder / LEDGER_FILE).read_bytes() + b" ")
    assert main(["audit", "one"]) == 3
    out = capsys.readouterr().out
    assert "step-000004: " in out
    assert "no checkpoint verified" in out
    assert "2 bytes" not in out
    assert "ledger.json: has" in out


def test_a_checkpoint_with_accounts_that_never_were_at_once_is_a_violation(capsys: Out) -> None:
    """At step 2, with tickets that were admitted, and dropped, after step 3."""
    entries, result = simulated()
    run = make_run(entries)
    early, late = result.snapshots[0], result.snapshots[2]
    records_of_drops = [record for record, _ in entries if isinstance(record, records.Dropped)]
    gone = {ticket for record in records_of_drops for ticket in records.read_tickets(record.tickets).tolist()}
    pending = (
        *early.pending,
        *(Ticket(ticket) for ticket in range(early.admitted, late.admitted) if ticket not in gone),
    )
    keep(run, 2, dataclasses.replace(late, trained=early.trained, pending=pending))
    assert main(["audit", "one"]) == 3
    out = capsys.readouterr().out
    assert f"at no moment of step 2 were {late.admitted} groups admitted and {len(gone)} dropped in the log" in out
    assert "1 violation" in out


def test_metrics_that_say_something_else_are_a_violation(capsys: Out) -> None:
    run = make_run(simulated()[0])
    lines = [{"kind": "step", "at": "", "step": 1, "trained": 4, "staleness_max": 0}]
    metrics(run, *lines)
    assert main(["audit", "one"]) == 0
    metrics(run, *lines, {"kind": "step", "at": "", "step": 2, "trained": 9, "staleness_max": 7})
    assert main(["audit", "one"]) == 3
    out = capsys.readouterr().out
    assert "metrics.jsonl counts 9 trained groups after step 2, the log 8" in out
    assert "metrics.jsonl says that step 2 trained on tokens up to 7 versions old, the log" in out


@pytest.mark.parametrize(("deterministic", "code"), [(False, 0), (True, 3)])
def test_weights_taken_again_with_other_bits_break_only_a_deterministic_promise(
    capsys: Out, deterministic: bool, code: int
) -> None:
    entries = list(simulated()[0])
    entries += [(records.Live(step=6, lineage="a", fingerprint=text * 32), b"") for text in "ab"]
    make_run(entries, deterministic=deterministic)
    assert main(["audit", "one"]) == code
    assert "the weights of step 6 were taken again with other bits after a resume" in capsys.readouterr().out


def test_the_audit_imports_no_torch() -> None:
    make_run(simulated()[0])
    program = (
        "import sys; from asyncflow.cli.main import main; main(['audit', 'one']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_test_of_a_difference_beyond_chance_is_mann_whitneys() -> None:
    z, p = mann_whitney([1.0, 2.0, 2.0, 3.0, 5.0], [2.0, 3.0, 4.0, 4.0, 6.0, 7.0])
    assert z == pytest.approx(-8.5 / 29.1818**0.5, abs=1e-4)  # by hand: U = 6.5 of 30; ties of 3, 2 and 2
    assert p == pytest.approx(0.1156, abs=1e-3)
    assert mann_whitney([1.0] * 9, [1.0] * 9) == (0.0, 1.0)


def test_what_a_replay_found_is_said(capsys: Out) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")
    from asyncflow.recipes.replay import Replay, ReplayedBatch

    result = Replay(run="one", step=3, num_groups=2, is_deterministic=True, started_from=2)
    rows = ("4.0", "4.1", "4.2", "7.2", "7.0")
    result.batches.append(ReplayedBatch(rows=rows, num_tokens=40, threads=2, sha256={"token_ids": "ab" * 32}))
    result.compare("loss", "equal", "0.5")
    show_replay(result, as_json=False)
    out = capsys.readouterr().out
    assert "step 3 of one: 2 groups, 1 micro-batch, 5 rows, 40 tokens" in out
    assert "rows    4.0-2 7.2,0" in out
    assert "token_ids abababababab" in out
    assert "OK: all that could be compared is equal" in out
    assert not result.breaks_a_promise
    result.compare("checkpoint", "differs", "1e-9 apart")
    show_replay(result, as_json=False)
    assert "a deterministic run promises equal bits" in capsys.readouterr().out
    assert result.breaks_a_promise
