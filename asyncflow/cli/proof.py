"""What `audit` and `replay` print."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from asyncflow.cli.output import show_json
from asyncflow.data.audit import LogAudit
from asyncflow.observe.plain_text import harmless, one_line
from asyncflow.observe.run_audit import RunAudit
from asyncflow.observe.selection import MIN_GROUPS, Measure, Selection

if TYPE_CHECKING:
    from asyncflow.recipes.replay import Replay

MAX_SHOWN = 20
"""Violations that are printed; `--json` has them all."""
HASH_SHOWN = 12
SHOWN_WIDTH = 60


@contextmanager
def log_progress(num_bytes: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while a long log is read, where that is a terminal; gives what hears the bytes read."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=num_bytes)
        yield lambda number: progress.advance(task, number)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what is being done, where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("") as shown:
        yield lambda text: shown.update(harmless(text))


def show_audit(audit: RunAudit, *, as_json: bool) -> None:
    """The accounts, the staleness, the lineage, the selection, and what is wrong."""
    if as_json:
        show_json(audit_json(audit))
        return
    log = audit.log
    _say(f"{_accounts(log)}     twice {len(log.twice):,}   lost {len(log.lost):,}")
    _say(_staleness(log))
    kept = f"checkpoints {' '.join(map(str, audit.verified))} verified" if audit.verified else "no checkpoint verified"
    verdict = Text("OK", "bold green") if audit.is_ok else _faults(audit.num_violations)
    chain = "lineage ok" if audit.is_ok else "lineage"
    _say(
        Text.assemble(
            f"{chain} ({len(log.steps):,} steps, {log.epoch} start{'s' * (log.epoch > 1)}) · {kept}   ", verdict
        )
    )
    for violation in audit.violations[:MAX_SHOWN]:
        _say(Text.assemble(("  ! ", "bold red"), harmless(str(violation))))
    if audit.num_violations > MAX_SHOWN:
        _say(f"  … and {audit.num_violations - MAX_SHOWN:,} more; the first thousand are in the output of --json")
    for note in audit.notes:
        _say(Text.assemble(("  · ", "dim"), harmless(note)))
    for line in _selection(audit.selection):
        _say(line)


def audit_json(audit: RunAudit) -> dict[str, object]:
    """The audit for other programs."""
    log = audit.log
    return {
        "run": audit.name,
        "ok": audit.is_ok,
        "submitted": log.submitted,
        "trained": log.trained,
        "dropped": log.dropped_by_reason,
        "pending": len(log.pending),
        "twice": log.twice,
        "lost": log.lost,
        "reissued": sum(group.times_reissued > 0 for group in log.groups.values()),
        "steps": len(log.steps),
        "last_step": log.last_step,
        "starts": log.epoch,
        "records": log.num_records,
        "staleness": {
            "tokens_by_age": {str(age): count for age, count in sorted(log.checked.by_age.items())},
            "bound": max((step.bound for step in log.steps.values()), default=None),
            "groups_checked": log.checked.groups,
            "groups_bounded_by_admission": log.checked.bounded_groups,
            "groups_unknown": log.checked.unknown_groups,
        },
        "checkpoints_verified": list(audit.verified),
        "num_violations": audit.num_violations,
        "violations": [dataclasses.asdict(violation) for violation in audit.violations],
        "notes": list(audit.notes),
        "selection": dataclasses.asdict(audit.selection),
    }


def show_replay(replay: Replay, *, as_json: bool) -> None:
    """The batch, and what is equal."""
    if as_json:
        show_json({**dataclasses.asdict(replay), "breaks_a_promise": replay.breaks_a_promise})
        return
    rows, tokens = sum(len(batch.rows) for batch in replay.batches), sum(batch.num_tokens for batch in replay.batches)
    head = f"step {replay.step} of {replay.run}: {replay.num_groups:,} groups"
    _say(
        f"{head}, {_counted(len(replay.batches), 'micro-batch')}, {rows:,} rows, {tokens:,} tokens"
        if replay.batches
        else head
    )
    for number, batch in enumerate(replay.batches, 1):
        threads = f", {batch.threads} thread{'s' * (batch.threads > 1)}" if batch.threads else ""
        _say(
            Text.assemble(
                (f"  {number:3}  ", "cyan"), f"{len(batch.rows)} rows, {batch.num_tokens:,} tokens{threads}: "
            )
        )
        _say(f"       rows    {_ranges(batch.rows)}")
        hashes = "  ".join(f"{name} {value[:HASH_SHOWN]}" for name, value in batch.sha256.items())
        _say(f"       sha256  {hashes}")
    for sample in replay.samples:
        text = f"{one_line(sample.prompt, SHOWN_WIDTH)} → {one_line(sample.completion, SHOWN_WIDTH)}"
        _say(f"  {sample.row:>8}  {text}   reward {sample.reward if sample.reward is None else f'{sample.reward:.3g}'}")
    if replay.started_from is not None:
        _say(f"taken again from the checkpoint of step {replay.started_from}:")
    styles = {"equal": "bold green", "differs": "bold red", "not compared": "yellow"}
    for one in replay.comparisons:
        _say(Text.assemble("  ", (f"{one.outcome:<13}", styles[one.outcome]), f"{one.what}: {harmless(one.detail)}"))
    for note in replay.notes:
        _say(Text.assemble(("  · ", "dim"), harmless(note)))
    _say(_verdict(replay))


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'es' * (number != 1)}"


def _verdict(replay: Replay) -> Text:
    outcomes = {one.outcome for one in replay.comparisons}
    if "differs" not in outcomes:
        equal = "equal" in outcomes
        return Text(
            "OK: all that could be compared is equal" if equal else "nothing could be compared", "green" * equal
        )
    if replay.is_deterministic:
        return Text("a deterministic run promises equal bits: this is a fault, or another type of machine", "bold red")
    return Text(
        "bits of an ordinary run may differ (threads, machine); with deterministic=true they are equal", "yellow"
    )


def _say(text: str | Text) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def _faults(number: int) -> Text:
    return Text(f"{number:,} violation{'s' * (number > 1)}", "bold red")


def _accounts(log: LogAudit) -> str:
    reasons = ", ".join(f"{harmless(reason)} {count:,}" for reason, count in log.dropped_by_reason.items())
    dropped = f"{sum(log.dropped_by_reason.values()):,}" + f" ({reasons})" * bool(reasons)
    return f"submitted {log.submitted:,} = trained {log.trained:,} + dropped {dropped} + pending {len(log.pending):,}"


def _staleness(log: LogAudit) -> str:
    """The share of the tokens of each age, and of how many it is not known."""
    checked, total = log.checked, sum(log.checked.by_age.values())
    parts = []
    if total:
        shares = "   ".join(f"{age}: {count / total:.0%}" for age, count in sorted(checked.by_age.items()))
        bound = max((step.bound for step in log.steps.values()), default=0)
        relation = "<=" if max(checked.by_age) <= bound else "> the"
        parts.append(f"{shares.replace('%', ' %')}   max {max(checked.by_age)} {relation} bound {bound}")
    gone = checked.bounded_groups + checked.unknown_groups
    if gone:
        known = f"by admission within the bound: {checked.bounded_groups:,}"
        known += f", unknown: {checked.unknown_groups:,}" * bool(checked.unknown_groups)
        parts.append(
            f"({total:,} tokens checked; rows of {gone:,} of {gone + checked.groups:,} groups are compacted, {known})"
        )
    return "staleness by token   " + ("   ".join(parts) or "nothing was trained yet")


def _selection(selection: Selection) -> Iterator[str]:
    pairs = [f"{_called(one.name)} {_mean(one.trained)} / {_mean(one.dispatched)}" for one in selection.measures]
    yield f"selection   trained / dispatched: {', '.join(pairs)}"
    for one in selection.dropped:
        facts = f"prompt tokens {_mean(one.prompt_tokens)}, completion tokens {_mean(one.completion_tokens)}"
        purpose = ": on purpose, algorithm.drop_no_signal" if one.on_purpose else ""
        yield f"  dropped ({harmless(one.reason)}) {one.count:,}{purpose}; {facts}, mean reward {_mean(one.reward)}"
    if selection.dropped:
        yield f"  trained against dropped, Mann-Whitney: {_tests(selection.measures)}"
        if any(one.on_purpose for one in selection.dropped):
            yield "  groups without signal are all wrong or all right: dropping them selects by difficulty"


def _called(name: str) -> str:
    return "difficulty (mean reward)" if name == "mean reward" else name


def _tests(measures: Sequence[Measure]) -> str:
    if all(one.z is None for one in measures):
        return f"too few groups for a test, which needs {MIN_GROUPS} of each"
    tested = [one for one in measures if one.z is not None]
    words = [f"{one.name} z {one.z:+.1f} (p {one.p:.2g})" for one in tested]
    odd = [one.name for one in tested if one.differs]
    verdict = f"beyond chance in {', '.join(odd)}" if odd else "no difference beyond chance"
    return f"{verdict}; {', '.join(words)}"


def _mean(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3g}"


def _ranges(rows: Sequence[str]) -> str:
    """Rows of one group behind each other as a range: `12.0-7`."""
    parts = []
    pairs = [row.split(".") for row in rows]
    for ticket, group in groupby(pairs, key=lambda pair: pair[0]):
        indices = [int(index) for _, index in group]
        is_range = len(indices) > 1 and indices == list(range(indices[0], indices[-1] + 1))
        shown = f"{indices[0]}-{indices[-1]}" if is_range else ",".join(map(str, indices))
        parts.append(f"{ticket}.{shown}")
    return " ".join(parts)
