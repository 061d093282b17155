"""One process of the kill tests: `python tests/kill/role.py ROLE ADDRESS FOLDER SETTING`.

A line `PHASE VICTIM` on its standard input makes the next pass of that phase deadly: for this
process (`self`), or for the queue's server (`server`). It ends with `LOST` when the server is gone.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from asyncflow.core.errors import QueueLostError
from asyncflow.core.types import Ragged, Rows
from asyncflow.data.batch import Batch
from asyncflow.data.history import History, read_history
from asyncflow.data.queue import TransferQueue
from tests.kill import world
from tests.kill.world import Floats, Setting

LOST = 3
"""Exit status of a process whose server is gone."""

ASKED = "reserve or get sent, granted, reply not read"
IDLE, GOT, WORKING, READY, SENT, DONE = "idle", "got", "working", "ready", "sent, reply not read", "done"
REPLAYING = "replaying"
WRITTEN, DROPPING = "write sent, reply not read", "drop sent, reply not read"
PHASES = {
    "producer": (IDLE, ASKED, GOT, WORKING, READY, SENT, DONE, DROPPING),
    "stage": (IDLE, ASKED, GOT, WORKING, WRITTEN, READY, SENT, DONE, DROPPING),
    "trainer": (
        *(IDLE, ASKED, GOT, WORKING, READY, SENT, DONE),
        *("before settling", "exported", "live", "drafted", "published", REPLAYING),
    ),
}


class Doom:
    """Knows where this process, or the server, is to die."""

    def __init__(self, queue: TransferQueue) -> None:
        self._queue = queue
        self._phase = self._victim = ""

    def at(self, phase: str) -> None:
        """A phase passes."""
        if self._is_due(phase):
            self._strike()

    def before_reply(self, phase: str) -> None:
        """The next message is to be sent, and its answer not to be read: not waited for, or, of `ASKED`, there."""
        if not self._is_due(phase):
            return
        owner, name = (socket, "recv_fds") if phase == ASKED else (socket.socket, "sendall")
        call: Callable[..., Any] = getattr(owner, name)

        def struck(*arguments: Any) -> Any:
            setattr(owner, name, call)
            if phase == ASKED:
                self._strike()
                return call(*arguments)
            call(*arguments)
            return self._strike()

        setattr(owner, name, struck)

    def _is_due(self, phase: str) -> bool:
        while select.select([0], [], [], 0)[0] and (line := os.read(0, 1 << 12).decode()):
            self._phase, _, self._victim = line.strip().rpartition(" ")
        return phase == self._phase

    def _strike(self) -> None:
        self._phase = ""
        os.kill(self._queue.server_pid if self._victim == "server" else os.getpid(), signal.SIGKILL)


def produce(setting: Setting, queue: TransferQueue, folder: Path, doom: Doom) -> None:
    """Roll out for ever. What the queue has acknowledged is noted in a file."""
    with (folder / "acknowledged").open("ab", buffering=0) as notes:
        while True:
            doom.at(IDLE)
            doom.before_reply(ASKED)
            ticket = queue.reserve()
            assert ticket is not None
            doom.at(GOT)
            live = world.load(world.live_path(folder))
            if world.is_unanswered(setting, ticket):
                doom.before_reply(DROPPING)
                queue.drop([ticket], world.NO_ANSWER)
                notes.write(b"dropped %d\n" % ticket)
                continue
            columns = world.roll_out(setting, ticket, live.step, live.weights)
            doom.at(WORKING)
            doom.at(READY)
            doom.before_reply(SENT)
            queue.put(columns, ticket=ticket)
            notes.write(b"put %d\n" % ticket)
            doom.at(DONE)


def write_advantages(setting: Setting, queue: TransferQueue, doom: Doom) -> None:
    """Write the column for ever, and drop groups without signal."""
    size = setting.group_size
    while True:
        doom.at(IDLE)
        doom.before_reply(ASKED)
        batch = queue.get("advantages", max_rows=4 * size, group_size=size)
        assert batch is not None
        doom.at(GOT)
        rewards = batch["reward"].values.astype(np.float64).reshape(-1, size)
        has_signal = np.ptp(rewards, axis=1) > 0
        tickets = batch.rows.tickets[::size]
        if not has_signal.all():
            doom.before_reply(DROPPING)
            queue.drop(tickets[~has_signal], world.NO_SIGNAL)
        doom.at(WORKING)
        if has_signal.any():
            values = np.concatenate([world.advantages(group) for group in rewards[has_signal]])
            doom.before_reply(WRITTEN)
            queue.write(batch.rows[np.repeat(has_signal, size)], {"advantage": values}, missing_ok=True)
        doom.at(READY)
        doom.before_reply(SENT)
        queue.acknowledge(batch)
        doom.at(DONE)


class Training:
    """The trainer: from its checkpoint over the steps that the log holds after it, and on."""

    def __init__(self, setting: Setting, queue: TransferQueue, folder: Path, doom: Doom) -> None:
        self._setting = setting
        self._queue = queue
        self._folder = folder
        self._doom = doom
        found = world.checkpoints(folder)
        self._trainer = world.load(found[-1]) if found else world.begin(setting)

    def run(self) -> None:
        """To the last step."""
        self._queue.settled()  # so that all that a trainer before this one sent is in the log
        self._catch_up(read_history(self._folder / "ledger", world.QUEUE_TASKS, self._setting.gate))
        while self._trainer.step < self._setting.steps:
            self._publish()
            self._step()
            if self._trainer.step % self._setting.save_every == 0:
                self._queue.settled()
                self._save(world.checkpoint_path(self._folder, self._trainer.step))
        self._publish()
        self._save(self._folder / "final.npy")

    def _catch_up(self, history: History) -> None:
        last_live = max(history.live, default=-1)
        for step in range(self._trainer.step, history.last_step + 1):
            if step > self._trainer.step:
                groups = [
                    _group(batch.rows, batch.columns)
                    for batch in history.micro_batches(step, ("features", "versions", "advantage"))
                ]
                self._trainer = world.take_step(self._trainer, groups)
                self._doom.at(REPLAYING)
            if step == last_live and step < history.last_step:
                self._publish()

    def _publish(self) -> None:
        """Lock-step: what is begun under some weights is whole before the next are live."""
        self._doom.at("before settling")
        self._queue.settled()
        world.save(self._trainer, world.live_path(self._folder)).replace(world.live_path(self._folder))
        self._doom.at("exported")
        self._queue.advance(self._trainer.step)
        self._doom.at("live")

    def _step(self) -> None:
        setting, queue, doom, step = self._setting, self._queue, self._doom, self._trainer.step
        queue.begin_step(step)
        doom.at(IDLE)
        doom.before_reply(ASKED)
        rows = setting.rows_per_step
        batch = queue.get("train", max_rows=rows, at_least=rows, group_size=setting.group_size)
        assert batch is not None
        assert len(batch) == rows
        doom.at(GOT)
        self._check_ages(batch)
        parts = [np.flatnonzero(batch.rows.tickets == ticket) for ticket in np.unique(batch.rows.tickets)]
        made = world.take_step(self._trainer, [_group(batch.rows, batch.columns, places) for places in parts])
        doom.at(WORKING)
        doom.at(READY)
        doom.before_reply(SENT)
        queue.acknowledge(batch, step=step + 1, batches=[batch.rows[places] for places in parts])
        self._trainer = made
        doom.at(DONE)

    def _check_ages(self, batch: Batch) -> None:
        ages = self._trainer.step - batch["versions"].values.astype(np.int64)
        assert ages.min() >= 0, ages
        assert ages.max() <= self._setting.gate.bound, ages

    def _save(self, path: Path) -> None:
        draft = world.save(self._trainer, path)
        self._doom.at("drafted")
        draft.replace(path)
        self._doom.at("published")
        for old in world.checkpoints(self._folder)[:-2]:
            old.unlink()


def _group(
    rows: Rows, columns: Mapping[str, Ragged], places: NDArray[np.intp] | None = None
) -> tuple[list[Floats], Floats]:
    """Features and advantages of one group, by sibling."""
    places = np.arange(len(rows)) if places is None else places
    places = places[np.argsort(rows.indices[places])]
    features = columns["features"].rows()
    return [features[place].astype(np.float64) for place in places.tolist()], columns["advantage"].values[
        places
    ].astype(np.float64)


def main(role: str, address: str, folder: Path, setting: Setting) -> None:
    """Connect, and be what the role says."""
    with TransferQueue.connect(address, arena_bytes=1 << 22) as queue:
        doom = Doom(queue)
        if role.startswith("producer"):
            produce(setting, queue, folder, doom)
        elif role == "stage":
            write_advantages(setting, queue, doom)
        else:
            Training(setting, queue, folder, doom).run()


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), msgspec.json.decode(sys.argv[4], type=Setting))
    except QueueLostError as error:
        print(error, file=sys.stderr)
        sys.exit(LOST)
