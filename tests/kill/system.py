"""A whole system of processes on one log, a supervisor that kills them and starts them again, and an audit.

Server, two producers, a stage and a trainer, each a process. Each kill of a plan is either at a named
phase, where the process strikes itself or the server, or at a moment, when it is struck from outside.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from asyncflow.core.errors import QueueLostError
from asyncflow.data import records
from asyncflow.data.log import read_log
from asyncflow.data.queue import TransferQueue
from asyncflow.data.records import read_rows, read_tickets
from tests.kill import role, world
from tests.kill.world import Setting

ROLES = ("producer 1", "producer 2", "stage", "trainer")
SERVER = "server"
PROGRAM = str(Path(__file__).with_name("role.py"))
LIMIT_S = 20.0
PHASE_LIMIT_S = 1.0
"""How long a phase is waited for before the victim is struck from outside, wherever it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """`victim` dies `delay_s` from now, or where `role` comes to `phase`."""

    victim: str
    role: str = ""
    phase: str = ""
    delay_s: float = 0.0


def make_plan(seed: int, num_kills: int) -> list[Kill]:
    """Random kills: a third from outside at any moment, the others at phases, a fifth of which strike the server."""
    rng = np.random.default_rng([seed, 7])
    plan = []
    for _ in range(num_kills):
        chosen = str(rng.choice([*ROLES, "trainer"]))
        if rng.random() < 1 / 3:
            chosen = str(rng.choice([chosen, SERVER], p=[0.75, 0.25]))
            plan.append(Kill(victim=chosen, delay_s=float(rng.exponential(0.1))))
        else:
            phase = str(rng.choice(role.PHASES[chosen.split()[0]]))
            victim = str(rng.choice([chosen, SERVER], p=[0.8, 0.2]))
            plan.append(Kill(victim=victim, role=chosen, phase=phase))
    return plan


@dataclass(slots=True, kw_only=True)
class System:
    """The processes, from the outside."""

    setting: Setting
    folder: Path
    kills: Counter[str] = field(default_factory=Counter)
    is_finished: bool = False
    _children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _queue: TransferQueue | None = None

    def run(self, plan: Sequence[Kill] = ()) -> None:
        """From the beginning to the trainer's last step, with these kills on the way."""
        try:
            self._start_server()
            for kill in plan:
                if self._carry_out(kill):
                    break
            self._wait(lambda: self.is_finished, LIMIT_S)
            assert self.is_finished, f"it hangs after {dict(self.kills)}"
        finally:
            self._end()

    @property
    def num_kills(self) -> int:
        """All of them."""
        return self.kills.total()

    # -- kills -----------------------------------------------------------------------------------

    def _carry_out(self, kill: Kill) -> bool:
        """Whether the run is over."""
        if kill.phase == role.REPLAYING:  # there is something to take again only after another death
            self._carry_out(Kill(victim="trainer"))
            if self.is_finished:
                return True
        pid = self._pid(kill.victim)
        if kill.phase:
            victim = "server" if kill.victim == SERVER else "self"
            child = self._children[kill.role]
            assert child.stdin is not None
            try:
                child.stdin.write(f"{kill.phase} {victim}\n".encode())
                child.stdin.flush()
            except BrokenPipeError:
                pass
        is_over = self._wait(lambda: self._pid(kill.victim) != pid, PHASE_LIMIT_S if kill.phase else kill.delay_s)
        if self.is_finished:
            return True
        if not is_over:
            os.kill(pid, signal.SIGKILL)
            self._wait(lambda: self._pid(kill.victim) != pid, LIMIT_S)
            self.kills[f"{kill.victim}, at any moment"] += 1
        else:
            self.kills[f"{kill.victim}: {kill.role} {kill.phase}"] += 1
        return self.is_finished

    # -- processes -------------------------------------------------------------------------------

    def _pid(self, name: str) -> int:
        if name == SERVER:
            assert self._queue is not None
            return self._queue.server_pid
        return self._children[name].pid

    def _start_server(self) -> None:
        self._queue = TransferQueue.start(
            world.TASKS, trains="train", gate=self.setting.gate, log=self.folder / "ledger"
        )
        for name in ROLES:
            if name not in self._children:
                self._start(name)

    def _start(self, name: str) -> None:
        assert self._queue is not None
        setting = msgspec.json.encode(self.setting).decode()
        with (self.folder / f"{name}.err").open("ab") as told:
            self._children[name] = subprocess.Popen(
                [sys.executable, PROGRAM, name, self._queue.address, str(self.folder), setting],
                stdin=subprocess.PIPE,
                stderr=told,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            )

    def _wait(self, is_met: Callable[[], bool], limit_s: float) -> bool:
        """Start again whoever ends, until the condition is met; false when it was not in time."""
        end_s = time.monotonic() + limit_s
        while not self.is_finished and not is_met():
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            self._look(left_s)
        return True

    def _look(self, limit_s: float) -> None:
        """Wait for the end of a process, and see to it."""
        names = [SERVER, *self._children]
        descriptors = {os.pidfd_open(self._pid(name)): name for name in names}
        try:
            ended = select.select(list(descriptors), [], [], limit_s)[0]
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        for name in [descriptors[descriptor] for descriptor in ended]:
            if name == SERVER:
                self._server_ended()
            else:
                self._child_ended(name)

    def _server_ended(self) -> None:
        """All clients end with it; then everything begins again on the same log."""
        for name in list(self._children):
            self._child_ended(name, is_alone=False)
        self._close_server()
        if not self.is_finished:
            self._start_server()

    def _child_ended(self, name: str, *, is_alone: bool = True) -> None:
        child = self._children[name]
        status = child.wait(LIMIT_S)
        if name == "trainer" and status == 0:
            self.is_finished = True
        else:
            assert status in (role.LOST, -signal.SIGKILL), (name, status, (self.folder / f"{name}.err").read_text())
        assert child.stdin is not None
        child.stdin.close()
        del self._children[name]
        if is_alone and not self.is_finished and status == -signal.SIGKILL:
            self._start(name)
        elif is_alone and not self.is_finished:
            told = (self.folder / f"{name}.err").read_text()
            assert _ends(self._pid(SERVER), LIMIT_S), f"{name} lost a server that is there: {told}"
            self._server_ended()

    def _close_server(self) -> None:
        if self._queue is not None:
            try:
                self._queue.close()
            except QueueLostError:
                self._queue.close()

    def _end(self) -> None:
        for child in self._children.values():
            child.kill()
            child.wait(LIMIT_S)
            if child.stdin is not None:
                child.stdin.close()
        self._close_server()


def _ends(pid: int, limit_s: float) -> bool:
    """Whether a process ends in time."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], limit_s)[0])
    finally:
        os.close(descriptor)


# -- the audit -----------------------------------------------------------------------------------


def check(setting: Setting, folder: Path) -> None:
    """Everything that must hold of the log of a finished run; shares nothing with the ledger that wrote it."""
    admitted: set[int] = set()
    produced: set[int] = set()
    reissued: set[int] = set()
    trained: Counter[int] = Counter()
    dropped: Counter[int] = Counter()
    steps: list[int] = []
    for logged in read_log(folder / "ledger"):
        match records.decode(logged.meta):
            case records.Admitted(first=first, count=count):
                assert count == 1
                assert first not in admitted or first in reissued
                admitted.add(first)
                reissued.discard(first)
            case records.Produced(first=first, group_size=size):
                assert size == setting.group_size
                assert first not in produced, "put twice"
                produced.add(first)
            case records.Reissued(tickets=tickets):
                again = set(read_tickets(tickets).tolist())
                assert not again & produced, "rows that were acknowledged are lost"
                reissued |= again
            case records.Dropped(tickets=tickets):
                dropped.update(read_tickets(tickets).tolist())
            case records.Trained(step=step, tickets=tickets, batches=batches):
                steps.append(step)
                names = read_tickets(tickets).tolist()
                trained.update(names)
                rows = Counter(
                    pair
                    for batch in map(read_rows, batches)
                    for pair in zip(batch.tickets.tolist(), batch.indices.tolist(), strict=True)
                )
                assert rows == Counter((ticket, index) for ticket in names for index in range(setting.group_size))
                assert len(names) == setting.groups_per_step
    assert steps == list(range(1, setting.steps + 1))
    assert set(trained.values()) <= {1}
    assert set(dropped.values()) <= {1}
    assert not set(trained) & set(dropped)
    assert set(trained) <= produced
    assert admitted == set(trained) | set(dropped)  # none is pending: the gate's horizon ends with the last step
    assert admitted == set(range(len(admitted)))
    for line in (folder / "acknowledged").read_text().splitlines():
        what, ticket = line.split()
        assert int(ticket) in (produced if what == "put" else dropped), f"{line} was acknowledged and is lost"


def final_bytes(folder: Path) -> bytes:
    """The weights and the optimizer's memory after the last step."""
    return (folder / "final.npy").read_bytes()
