"""The audit of a run: its log, and whether checkpoints and metrics say the same.

Reads only; the run may be going on. Checkpoints are listed before the log is read: what the log
says of a checkpoint is on the disk before it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from asyncflow.core.errors import RunFolderError
from asyncflow.core.world import World
from asyncflow.data.audit import LogAudit, audit_log
from asyncflow.data.audited import Violation
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.data.log_reader import list_segments
from asyncflow.observe.records import read_metrics
from asyncflow.observe.run_folder import read_config
from asyncflow.observe.selection import Selection, compare_selection
from asyncflow.workflow.checkpoint import read_ledger
from asyncflow.workflow.checkpoint_folder import checkpoint_step, damage, list_checkpoints

LEDGER = "ledger"
"""The folder of a run that holds its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAudit:
    """What was found: `violations` break a promise, `notes` are worth knowing.

    `verified` are the steps of the checkpoints whose hashes and accounts are right.
    """

    name: str
    log: LogAudit
    violations: tuple[Violation, ...]
    num_violations: int
    verified: tuple[int, ...]
    notes: tuple[str, ...]
    selection: Selection

    @property
    def is_ok(self) -> bool:
        """Whether every promise was kept."""
        return self.num_violations == 0


def log_bytes(folder: Path) -> int:
    """Bytes of a run's log. Raises `RunFolderError` where it has none."""
    home = folder / LEDGER
    segments = list_segments(home) if home.is_dir() else []
    if not segments:
        old = sorted(path.name for path in folder.glob(f"{LEDGER}.old-*"))
        aside = f"; {', '.join(old)} was set aside by a resume" if old else ""
        raise RunFolderError(f"{folder} has no log, so nothing can be proved: it ran with queue.log=off{aside}")
    return sum(path.stat().st_size for path in segments)


def audit_run(folder: Path, tell: Callable[[int], None] | None = None) -> RunAudit:
    """Audit a run; `tell` hears how many bytes of the log were read since the last time.

    Raises `LogDamagedError` when the log can't be read.
    """
    log_bytes(folder)
    checkpoints = list_checkpoints(folder / "checkpoints")
    log = audit_log(folder / LEDGER, tell)
    verified = []
    for checkpoint in checkpoints:
        faults = _checkpoint_faults(log, checkpoint)
        if faults is None:
            continue
        step = checkpoint_step(checkpoint) or 0
        for what in faults:
            log.fail(what, log.kept.get(step, 0), step=step)
        verified += [] if faults else [step]
    notes = [*_lineage(folder, log), *_check_metrics(folder, log), *_asides(folder)]
    return RunAudit(
        name=folder.resolve().name,
        log=log,
        violations=tuple(log.violations),
        num_violations=log.num_violations,
        verified=tuple(verified),
        notes=tuple(notes),
        selection=compare_selection(log.groups.values()),
    )


def _checkpoint_faults(log: LogAudit, checkpoint: Path) -> list[str] | None:
    """What is wrong with a checkpoint; None when a live run has removed it meanwhile."""
    try:
        faults = damage(checkpoint)
        if not faults:
            snapshot = read_ledger(checkpoint, World())
            faults = [
                f"{checkpoint.name}: {what}" for what in ledger_faults(log, checkpoint_step(checkpoint) or 0, snapshot)
            ]
    except RunFolderError as error:
        faults = [str(error)]
    return faults if checkpoint.is_dir() else None


def ledger_faults(log: LogAudit, step: int, snapshot: LedgerSnapshot) -> Iterator[str]:
    """Where a checkpoint's ledger and the log's accounts at that step differ."""
    if step != _first_step(log) and step not in log.steps:
        if step > _first_step(log):
            yield f"it is of step {step}, but the log ends at step {log.last_step}"
        return  # the log begins later
    trained = {ticket for ticket, group in log.groups.items() if group.steps and group.steps[0] <= step}
    gone = set(range(snapshot.admitted)) - set(snapshot.pending) - trained - log.carried
    by_then = {ticket for _, ticket in log.dropped[: len(gone)]}
    if both := trained & set(snapshot.pending):
        yield f"ticket {min(both)} is pending in its ledger.json, but the log trained it by step {step}"
    if odd := gone ^ by_then:
        yield f"ticket {min(odd)} is dropped in only one of the log and its ledger.json"
        return
    reasons = Counter(log.groups[ticket].reason for ticket in by_then)
    reasons.update(log.base.dropped if log.base else {})
    if dict(reasons) != dict(snapshot.dropped):
        yield f"its ledger.json counts dropped groups as {dict(snapshot.dropped)}, the log as {dict(reasons)}"
    num_trained = len(trained) + (log.base.trained if log.base else 0)
    if num_trained != snapshot.trained:
        yield f"its ledger.json counts {snapshot.trained} trained groups, the log {num_trained}"
    if not _were_at_once(log, step, snapshot.admitted, len(gone)):
        yield f"at no moment of step {step} were {snapshot.admitted} groups admitted and {len(gone)} dropped in the log"


def _first_step(log: LogAudit) -> int:
    """The version that the log begins with."""
    return min(log.steps, default=log.last_step + 1) - 1


def _were_at_once(log: LogAudit, step: int, admitted: int, num_dropped: int) -> bool:
    """Whether there is a record after which the log holds just so many of each, before the next step."""
    spans = []
    last, following = log.groups.get(admitted - 1), log.groups.get(admitted)
    spans.append((last.lsn if last else 0, following.lsn if following else inf))
    drops = [lsn for lsn, _ in log.dropped[max(0, num_dropped - 1) : num_dropped + 1]]
    before = drops[:1] if num_dropped else [0]
    after = drops[1:] if num_dropped else drops[:1]
    spans.append((before[0], after[0] if after else inf))
    spans.append(
        (log.steps[step].lsn if step in log.steps else 0, log.steps[step + 1].lsn if step + 1 in log.steps else inf)
    )
    return max(start for start, _ in spans) < min(end for _, end in spans)


def _lineage(folder: Path, log: LogAudit) -> Iterator[str]:
    """Weights that were taken again with other bits: a fault only where the run promised equal ones."""
    odd = [step for step, prints in log.served.items() if len(set(filter(None, prints))) > 1]
    deterministic = read_config(folder).deterministic
    for step in odd:
        what = f"the weights of step {step} were taken again with other bits after a resume"
        if deterministic:
            log.fail(f"{what}, in a deterministic run", log.steps[step].lsn if step in log.steps else 0, step=step)
        else:
            yield f"{what}: a new lineage, as deterministic=false allows"


def _check_metrics(folder: Path, log: LogAudit) -> Sequence[str]:
    """Compare the accounts in metrics.jsonl with the log's; notes about steps whose tokens only metrics know."""
    num_trained: Counter[int] = Counter(group.steps[0] for group in log.groups.values() if group.steps)
    total = log.base.trained if log.base else 0
    until = {}
    for step in sorted(log.steps):
        until[step] = total = total + num_trained[step]
    witnessed = []
    for metric in read_metrics(folder):
        step = int(metric.values.get("step", -1))
        if metric.kind != "step" or step not in log.steps:
            continue
        audited = log.steps[step]
        said, age = int(metric.values.get("trained", -1)), int(metric.values.get("staleness_max", -1))
        if said != until[step]:
            what = f"metrics.jsonl counts {said} trained groups after step {step}, the log {until[step]}"
            log.fail(what, audited.lsn, step=step)
        if audited.is_whole and audited.oldest_version is not None and age != step - 1 - audited.oldest_version:
            what = f"metrics.jsonl says that step {step} trained on tokens up to {age} versions old, the log "
            log.fail(f"{what}{step - 1 - audited.oldest_version}", audited.lsn, step=step)
        if not audited.is_whole:
            witnessed.append(age)
    if not witnessed:
        return []
    return [f"metrics.jsonl says at most {max(witnessed)} for the {len(witnessed)} steps whose rows are not whole"]


def _asides(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob(f"{LEDGER}.old-*")):
        yield f"{path.name} is an earlier log that a resume set aside; it was not audited"
