"""The log's proof: every admitted ticket was trained once or dropped for a stated reason, within the bound.

One pass over the records with plain sets, which shares nothing with the `Ledger` that wrote them:
what a ticket may do next is written down here a second time, so that a fault in one is seen by
the other. **Invariant**: a log that breaks a rule gets a `Violation` that names ticket, step and
record; a log that can't be read raises `LogDamagedError`.

Payloads are read one by one and forgotten; of each group a few numbers stay.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import ColumnError, LogDamagedError, RunFolderError
from asyncflow.data import records
from asyncflow.data.audited import AuditedGroup, AuditedStep, Checked, Violation, by_ticket, groups_of, row_faults
from asyncflow.data.log import Place, read_log, read_payload
from asyncflow.data.records import AnyRecord, read_rows, read_tickets

MAX_VIOLATIONS = 1000

Payload: TypeAlias = Callable[[], NDArray[np.uint8] | None]
"""Reads the payload of a record; None where it was compacted away."""


@dataclass(slots=True, kw_only=True)
class LogAudit:
    """What the log shows. `groups` is by ticket, `steps` by version made, `dropped` in the order of dropping.

    `base` stands for what a log that begins in the middle of a run does not show.
    """

    groups: dict[int, AuditedGroup] = field(default_factory=dict)
    steps: dict[int, AuditedStep] = field(default_factory=dict)
    dropped: list[tuple[int, int]] = field(default_factory=list)
    served: dict[int, list[str]] = field(default_factory=dict)
    kept: dict[int, int] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    num_violations: int = 0
    checked: Checked = field(default_factory=Checked)
    base: records.Carried | None = None
    epoch: int = 0
    opened: records.Opened | None = None
    num_records: int = 0
    last_step: int = 0
    _returned: set[int] = field(default_factory=set)
    _settled: frozenset[int] = frozenset()
    _dropped_sorted: list[int] = field(default_factory=list)
    _num_dropped_before: int = 0
    _live: int | None = None
    _is_issuing: bool = False

    @property
    def carried(self) -> frozenset[int]:
        """Tickets that ended before the log begins."""
        return self._settled

    # -- the accounts, counted from the sets ---------------------------------------------------

    @property
    def submitted(self) -> int:
        """Tickets ever admitted; one that was issued again counts once."""
        return len(self.groups) + len(self._settled)

    @property
    def trained(self) -> int:
        """Tickets that were trained."""
        return sum(group.is_trained for group in self.groups.values()) + (self.base.trained if self.base else 0)

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        """Tickets that were dropped."""
        counts = Counter(group.reason for group in self.groups.values() if group.reason)
        counts.update(self.base.dropped if self.base else {})
        return dict(counts.most_common())

    @property
    def pending(self) -> list[int]:
        """Tickets that have not ended."""
        return sorted(ticket for ticket, group in self.groups.items() if not group.has_ended)

    @property
    def twice(self) -> list[int]:
        """Tickets that were trained more than once."""
        return sorted(ticket for ticket, group in self.groups.items() if len(group.steps) > 1)

    @property
    def lost(self) -> list[int]:
        """Tickets that nobody can end any more: the process that had them is gone, nobody issued them again."""
        if not self._is_issuing:  # who took the log over is still about to say what it issues again
            return []
        return [ticket for ticket in self.pending if self._is_stranded(ticket)]

    def _is_stranded(self, ticket: int) -> bool:
        group = self.groups[ticket]
        return not group.num_rows and group.epoch < self.epoch and ticket not in self._returned

    def fail(self, what: str, lsn: int, *, ticket: int | None = None, step: int | None = None) -> None:
        """Note a broken rule."""
        self.num_violations += 1
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(Violation(what=what, lsn=lsn, ticket=ticket, step=step))

    def add(self, lsn: int, record: AnyRecord, payload: Payload) -> None:
        """Take the next record. Raises `ValueError` or `ColumnError` for one that means nothing."""
        self.num_records += 1
        if self.epoch == 0 and not isinstance(record, records.Opened):
            self.fail("the log begins without a record of who opened it", lsn)
            self.epoch = -1
        match record:
            case records.Reissued(tickets=tickets):
                self._reissue(lsn, read_tickets(tickets).tolist())
            case records.Produced():
                self._produce(lsn, record, payload)
            case records.Written():
                self._write(lsn, record)
            case records.Trained():
                self._train(lsn, record)
            case records.Dropped(tickets=tickets, reason=reason):
                self._drop(lsn, read_tickets(tickets).tolist(), reason)
            case _:
                self._note(lsn, record)

    def _note(self, lsn: int, record: AnyRecord) -> None:
        """Records without rows. Leases are passed over: who had a group for how long changes no account."""
        match record:
            case records.Opened():
                self._open(lsn, record)
            case records.Admitted():
                self._admit(lsn, record)
            case records.Dispatched():
                self._dispatch(lsn, record)
            case records.Live():
                self._go_live(lsn, record)
            case records.Checkpointed(step=step):
                self._keep(lsn, step)

    def finish(self) -> None:
        """The log ends here."""
        for ticket in self.lost:
            what = (
                f"ticket {ticket} is lost: it was admitted, the process that had it is gone, and nobody issued it again"
            )
            self.fail(what, self.groups[ticket].lsn, ticket=ticket)

    def _open(self, lsn: int, record: records.Opened) -> None:
        if record.epoch <= self.epoch:
            self.fail(f"epoch {record.epoch} follows epoch {self.epoch}: an older process wrote on", lsn)
        if self.opened is None and record.carried is not None:
            self._carry(record.carried, record.epoch, lsn)
            self.last_step = record.restored_step
        elif record.restored_step > self.last_step:
            step = record.restored_step
            self.fail(f"the run went on from step {step}, but the log ends at step {self.last_step}", lsn, step=step)
        self.epoch, self.opened = record.epoch, record
        self._live, self._is_issuing = None, False

    def _carry(self, base: records.Carried, epoch: int, lsn: int) -> None:
        """A log that begins where a checkpoint left off: older tickets are as its ledger says."""
        self.base = base
        pending = read_tickets(base.pending).tolist()
        self._settled = frozenset(range(base.admitted)) - set(pending)
        self._dropped_sorted = read_tickets(base.dropped_since).tolist()
        self._num_dropped_before = sum(base.dropped.values()) - len(self._dropped_sorted)
        for ticket in pending:
            self.groups[ticket] = AuditedGroup(ticket=ticket, lsn=lsn, epoch=epoch - 1)
        self._returned.update(pending)

    def _admit(self, lsn: int, record: records.Admitted) -> None:
        self._is_issuing = True
        if record.live_step != (-1 if self._live is None else self._live):
            shown = "none" if self._live is None else str(self._live)
            what = f"ticket {record.first} was admitted under version {record.live_step}, but live was {shown}"
            self.fail(what, lsn, ticket=record.first)
        for ticket in range(record.first, record.first + record.count):
            self._check_gate(lsn, ticket, record.live_step)
            if ticket in self._returned:
                self._returned.discard(ticket)
                self.groups[ticket].issue_again(record.live_step, self.epoch)
                continue
            if ticket in self.groups or ticket in self._settled:
                self.fail(f"ticket {ticket} was admitted twice", lsn, ticket=ticket)
                continue
            if ticket != self.submitted:
                what = f"ticket {ticket} was admitted, though the next one was {self.submitted}"
                self.fail(what, lsn, ticket=ticket)
            group = AuditedGroup(ticket=ticket, lsn=lsn, epoch=self.epoch, live_step=record.live_step)
            self.groups[ticket] = group

    def _check_gate(self, lsn: int, ticket: int, live_step: int) -> None:
        opened = self.opened
        if opened is None or opened.groups_per_step == 0:
            return
        if live_step < 0:
            self.fail(f"ticket {ticket} was admitted before any weights were live", lsn, ticket=ticket)
        rank = ticket - self._num_dropped_before - bisect_left(self._dropped_sorted, ticket)
        horizon = min(live_step + 1 + opened.max_staleness, opened.steps) * opened.groups_per_step
        if rank >= horizon:
            what = (
                f"ticket {ticket} passed the gate too early: {rank} groups stood before it and the gate, at version "
                f"{live_step}, was open for {horizon}"
            )
            self.fail(what, lsn, ticket=ticket)

    def _reissue(self, lsn: int, tickets: list[int]) -> None:
        for ticket in tickets:
            group = self._known(lsn, ticket, "issued again")
            if group is None:
                continue
            if group.has_ended:
                self.fail(f"ticket {ticket} was issued again after it was {group.ending}", lsn, ticket=ticket)
                continue
            group.take_back()
            self._returned.add(ticket)

    def _dispatch(self, lsn: int, record: records.Dispatched) -> None:
        group = self._known(lsn, record.ticket, "dispatched")
        if group is None:
            return
        if group.prompt not in ("", record.prompt):
            what = f"ticket {record.ticket} was prompt {group.prompt} and became prompt {record.prompt}"
            self.fail(what, lsn, ticket=record.ticket)
        group.prompt, group.prompt_tokens = record.prompt, record.num_tokens

    def _produce(self, lsn: int, record: records.Produced, payload: Payload) -> None:
        if record.group_size < 1:
            self.fail(f"ticket {record.first} was produced with {record.group_size} rows", lsn, ticket=record.first)
        names = frozenset(spec.name for spec in record.columns)
        found = groups_of(record, payload())
        for place, ticket in enumerate(range(record.first, record.first + record.count)):
            group = self._known(lsn, ticket, "produced")
            if group is None:
                continue
            if group.has_ended or group.num_rows or ticket in self._returned or group.epoch != self.epoch:
                state = group.ending or ("produced already" if group.num_rows else "not admitted in this epoch")
                self.fail(f"the rows of ticket {ticket} came late: it was {state}", lsn, ticket=ticket)
                continue
            group.produce(record, names, found[place] if found else None)
            for what in group.sampling_faults(self.last_step):
                self.fail(what, lsn, ticket=ticket)

    def _write(self, lsn: int, record: records.Written) -> None:
        rows = read_rows(record.rows)
        for ticket, indices in by_ticket(rows):
            group = self._known(lsn, ticket, "written")
            if group is None:
                continue
            if group.has_ended or not group.num_rows:
                state = group.ending or "not there"
                self.fail(f"columns of ticket {ticket} were written when it was {state}", lsn, ticket=ticket)
                continue
            for name in (spec.name for spec in record.columns):
                for index in group.write(name, indices):
                    what = f"column {name} of row {index} of ticket {ticket} was written twice, or has no such row"
                    self.fail(what, lsn, ticket=ticket)

    def _train(self, lsn: int, record: records.Trained) -> None:
        step, tickets = record.step, read_tickets(record.tickets).tolist()
        opened = self.opened
        if step != self.last_step + 1:
            self.fail(f"step {step} follows step {self.last_step}", lsn, step=step)
        if opened is not None and opened.groups_per_step and len(tickets) != opened.groups_per_step:
            self.fail(f"step {step} has {len(tickets)} groups instead of {opened.groups_per_step}", lsn, step=step)
        if record.threads and len(record.threads) != len(record.batches) + 1:
            what = f"step {step} names {len(record.threads)} thread counts for {len(record.batches)} micro-batches"
            self.fail(what, lsn, step=step)
        bound = _bound(opened)
        self._check_rows(lsn, record, set(tickets))
        self.steps[step], self.last_step = AuditedStep(lsn=lsn, epoch=self.epoch, bound=bound), step
        for ticket in tickets:
            group = self._known(lsn, ticket, "trained", step)
            if group is None:
                continue
            if group.steps:
                what = f"ticket {ticket} was trained twice, in steps {group.steps[-1]} and {step}"
                self.fail(what, lsn, ticket=ticket, step=step)
            elif group.reason:
                what = f"ticket {ticket} was trained in step {step} after it was {group.ending}"
                self.fail(what, lsn, ticket=ticket, step=step)
            elif not group.num_rows:
                self.fail(f"ticket {ticket} was trained in step {step} without rows", lsn, ticket=ticket, step=step)
            else:
                self._check_ages(lsn, group, step, bound)
            group.steps = (*group.steps, step)
            group.forget()

    def _check_rows(self, lsn: int, record: records.Trained, tickets: set[int]) -> None:
        """All rows of the step's groups are in its micro-batches, each once, and no others."""
        if not record.batches and not (self.opened and self.opened.groups_per_step):
            return  # a queue whose users did not say what they trained on
        sizes = {ticket: self.groups[ticket].num_rows for ticket in tickets if ticket in self.groups}
        for ticket, what in row_faults(record.step, map(read_rows, record.batches), sizes):
            self.fail(what, lsn, ticket=ticket, step=record.step)

    def _check_ages(self, lsn: int, group: AuditedGroup, step: int, bound: int) -> None:
        if self.opened is None or self.opened.groups_per_step == 0:
            return
        self.steps[step].add(group)
        for what in self.checked.add(group, step, bound):
            self.fail(what, lsn, ticket=group.ticket, step=step)
        for version in (version for version, _ in group.versions or () if version not in self.served):
            what = f"ticket {group.ticket} of step {step} was sampled by version {version}, which was never live"
            self.fail(what, lsn, ticket=group.ticket, step=step)

    def _drop(self, lsn: int, tickets: list[int], reason: str) -> None:
        for ticket in tickets:
            group = self._known(lsn, ticket, "dropped")
            if group is None:
                continue
            if not reason:
                self.fail(f"ticket {ticket} was dropped without a reason", lsn, ticket=ticket)
            if group.has_ended:
                self.fail(f"ticket {ticket} was dropped ({reason}) after it was {group.ending}", lsn, ticket=ticket)
                continue
            group.reason = reason or "no reason stated"
            group.forget()
            self._returned.discard(ticket)
            self.dropped.append((lsn, ticket))
            insort(self._dropped_sorted, ticket)

    def _go_live(self, lsn: int, record: records.Live) -> None:
        if self._live is not None and record.step < self._live:
            self.fail(f"live weights went back from version {self._live} to {record.step}", lsn, step=record.step)
        if record.step > self.last_step:
            what = f"version {record.step} went live before its step was trained; the last was {self.last_step}"
            self.fail(what, lsn, step=record.step)
        self._live = record.step
        known = self.served.setdefault(record.step, [])
        if record.fingerprint not in known:
            known.append(record.fingerprint)

    def _keep(self, lsn: int, step: int) -> None:
        if step != self.last_step:
            self.fail(f"a checkpoint of step {step} was kept after step {self.last_step}", lsn, step=step)
        self.kept[step] = lsn

    def _known(self, lsn: int, ticket: int, what: str, step: int | None = None) -> AuditedGroup | None:
        group = self.groups.get(ticket)
        if group is None:
            where = f" in step {step}" if step is not None else ""
            self.fail(f"ticket {ticket} was {what}{where}, but never admitted", lsn, ticket=ticket, step=step)
        return group


def audit_log(folder: Path, tell: Callable[[int], None] | None = None) -> LogAudit:
    """Audit the log in a folder, which may be written meanwhile; `tell` hears the bytes of each record.

    Raises `LogDamagedError` when it can't be read.
    """

    def read() -> Iterator[tuple[int, bytes, Payload]]:
        for logged in read_log(folder):
            if tell is not None:
                tell(logged.place.offset + logged.place.length - logged.place.record)
            yield logged.lsn, logged.meta, partial(payload_of, logged.place)

    return audit_records(read(), f"the log in {folder}")


def audit_records(found: Iterable[tuple[int, bytes, Payload]], where: str = "the log") -> LogAudit:
    """Audit records: number, meta, and how to read the payload. Raises `LogDamagedError` when one means nothing."""
    audit = LogAudit()
    for lsn, meta, payload in found:
        try:
            audit.add(lsn, records.decode(meta), payload)
        except (msgspec.MsgspecError, ColumnError, ValueError) as error:
            raise LogDamagedError(f"record {lsn} of {where} can't be read: {error}") from error
    audit.finish()
    return audit


def payload_of(place: Place) -> NDArray[np.uint8] | None:
    """The payload; None where it was compacted away, perhaps since the record was read."""
    if place.is_compacted:
        return None
    try:
        return read_payload(place)
    except LogDamagedError:
        raise
    except RunFolderError:
        return None


def _bound(opened: records.Opened | None) -> int:
    """Versions a token may be old under the gate in force."""
    if opened is None or opened.groups_per_step == 0:
        return 0
    return opened.max_staleness + -(-max(0, opened.look_ahead - 1) // opened.groups_per_step)
