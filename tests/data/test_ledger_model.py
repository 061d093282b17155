"""The ledger's arrays against `LedgerModel`, step by step, in whatever order things can happen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from asyncflow.core.errors import ColumnError, LeaseLostError, LedgerError
from asyncflow.data import window
from asyncflow.data.gate import Gate
from asyncflow.data.ledger import Ledger, Offer, QueueTask, State
from asyncflow.data.tickets import Tickets, as_array
from tests.data.ledger_model import LedgerModel

GATE = Gate(groups_per_step=2, max_staleness=2, steps=40, look_ahead=2)
COLUMNS = ("a", "b", "c")
INDEPENDENT = (
    QueueTask(name="first", needs=("a",)),
    QueueTask(name="second", needs=("a", "b")),
    QueueTask(name="third", needs=("c",)),
)
TRAINING = (
    QueueTask(name="train", needs=("a", "b"), trains=True),
    QueueTask(name="score", needs=("a",)),
    QueueTask(name="late", needs=("c", "b")),
)
SOME_COLUMNS = st.just(set(COLUMNS)) | st.sets(st.sampled_from(COLUMNS), min_size=1)
MIN_STEPS = 10_000

num_steps = 0


def array(numbers: list[int]) -> Tickets:
    """Consecutive ones as a range, as the queue has them."""
    if numbers and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return range(numbers[0], numbers[-1] + 1)
    return np.array(numbers, np.int64)


def some(data: st.DataObject, numbers: list[int], at_most: int = 8) -> list[int]:
    """A few of these, each once, in any order; old and young alike."""
    return data.draw(st.lists(st.sampled_from(numbers), unique=True, min_size=1, max_size=at_most)) if numbers else []


class LedgerMachine(RuleBasedStateMachine):
    """A queue without a gate whose tasks are all alike."""

    tasks: tuple[QueueTask, ...] = INDEPENDENT
    gate: Gate | None = None

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.tasks, self.gate)
        self.model = LedgerModel(self.tasks, self.gate)
        self.may_stand_twice = False

    # -- producers ---------------------------------------------------------------------------

    @precondition(lambda self: self.gate is None)
    @rule(count=st.integers(1, 6), size=st.integers(1, 3), columns=SOME_COLUMNS)
    def put(self, count: int, size: int, columns: set[str]) -> None:
        """A put without a ticket: issued and produced at once."""
        first = self.ledger.issue(count)
        assert first == self.model.issue(count)
        self.ledger.produce(first, count, size, sorted(columns))
        self.model.produce(range(first, first + count), size, columns)

    @rule(count=st.integers(1, 6))
    def admit(self, count: int) -> None:
        for _ in range(count):
            assert self.ledger.may_admit() == self.model.may_admit()
            if self.model.may_admit():
                assert self.ledger.admit() == self.model.admit()
            else:
                with pytest.raises(LedgerError, match="refused"):
                    self.ledger.admit()

    @rule(
        data=st.data(),
        size=st.integers(1, 3),
        columns=SOME_COLUMNS,
        all_=st.booleans(),
    )
    def produce(self, data: st.DataObject, size: int, columns: set[str], all_: bool) -> None:
        admitted = self.model.of_state(State.ADMITTED)
        for number in admitted if all_ else some(data, admitted):
            self.ledger.produce(number, 1, size, sorted(columns))
            self.model.produce([number], size, columns)

    @rule(data=st.data(), column=st.sampled_from(COLUMNS), all_=st.booleans())
    def write(self, data: st.DataObject, column: str, all_: bool) -> None:
        """Of several groups, some or all rows that lack the column."""
        lacking = [n for n in self.model.of_state(State.PRODUCED) if self.model.missing(n, column)]
        numbers = lacking if all_ else some(data, lacking)
        rows = {}
        for number in numbers:
            missing = self.model.missing(number, column)
            rows[number] = missing if all_ else missing[: data.draw(st.integers(1, len(missing)))]
        if numbers:
            self.ledger.write(np.array(numbers), np.array([len(rows[number]) for number in numbers]), column)
            for number in numbers:
                self.model.write(number, rows[number], column)

    @rule(data=st.data(), column=st.sampled_from(COLUMNS))
    def write_twice(self, data: st.DataObject, column: str) -> None:
        whole = [n for n in self.model.of_state(State.PRODUCED) if not self.model.missing(n, column)]
        if numbers := some(data, whole):
            with pytest.raises(ColumnError, match="written once"):
                self.ledger.write(np.array(numbers), np.array([1] * len(numbers)), column)

    # -- the end of tickets ------------------------------------------------------------------

    @rule(data=st.data(), reason=st.sampled_from(("failed", "late")), also_trained=st.booleans())
    def drop(self, data: st.DataObject, reason: str, also_trained: bool) -> None:
        numbers = some(data, self.model.pending(), 2)
        training = next((task.name for task in self.tasks if task.trains), "")
        held = {*self.model.offered(training, Offer.LEASED)} if training else set()
        if not also_trained and held & {*numbers}:
            with pytest.raises(LedgerError, match="being trained"):
                self.ledger.drop(array(numbers), reason)
        elif numbers:
            self.ledger.drop(array(numbers), reason, also_trained=also_trained)
            self.model.drop(numbers, reason)

    @rule(data=st.data())
    def drop_what_has_ended(self, data: st.DataObject) -> None:
        if numbers := some(data, self.model.of_state(State.DROPPED) + self.model.of_state(State.TRAINED)):
            with pytest.raises(LedgerError, match="not pending"):
                self.ledger.drop(array(numbers), "again")

    @rule(data=st.data())
    def readmit(self, data: st.DataObject) -> None:
        if numbers := some(data, self.model.pending(), 2):
            self.ledger.readmit(array(numbers))
            self.model.readmit(numbers)
            self.may_stand_twice = True

    # -- consumers ---------------------------------------------------------------------------

    @rule(data=st.data(), wanted=st.integers(1, 9))
    def take(self, data: st.DataObject, wanted: int) -> None:
        task = data.draw(st.sampled_from(self.tasks))
        is_in_order = self.gate is not None and task.trains
        if is_in_order:  # a step takes so many and no more
            wanted = min(wanted, GATE.groups_per_step - len(self.model.offered(task.name, Offer.LEASED)))
        if wanted:
            self._take(task, wanted, is_in_order)

    def _take(self, task: QueueTask, wanted: int, is_in_order: bool) -> None:
        expected = self.model.may_be_taken(task.name)[:wanted]
        taken = as_array(self.ledger.take(task.name, wanted)).tolist()
        if self.may_stand_twice and not is_in_order:  # what was issued again may come at its first turn
            assert len({*taken}) == len(taken) == len(expected)
            assert {*taken} <= {*self.model.may_be_taken(task.name)}
        else:
            assert taken == expected
        self.model.take(task.name, taken)
        if self.gate is not None and task.trains:
            assert all(self.model.step - self.model.tickets[n].live_step <= self.gate.bound for n in taken)

    @rule(data=st.data(), is_lost=st.booleans())
    def release(self, data: st.DataObject, is_lost: bool) -> None:
        """Of a lease that names groups dropped since, too."""
        task = data.draw(st.sampled_from(self.tasks)).name
        held = some(data, self.model.offered(task, Offer.LEASED))
        gone = some(data, self.model.of_state(State.DROPPED))
        back = self.ledger.release(task, array(held + gone), is_lost=is_lost)
        assert back.tolist() == held
        assert not is_lost or self.ledger.is_redelivered(back).all()
        self.model.release(task, held)

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.tasks)).name
        if self.gate is not None and self.model.tasks[task].trains:
            return
        held = some(data, self.model.offered(task, Offer.LEASED))
        self._acknowledge(task, held, some(data, self.model.of_state(State.DROPPED)))

    @rule(which=st.just({0, 1, 2}) | st.sets(st.integers(0, 2), min_size=1))
    def take_and_acknowledge_everything(self, which: set[int]) -> None:
        """By every task or some, so that tickets end and are forgotten."""
        for task in [self.tasks[place] for place in sorted(which)]:
            if self.gate is None or not task.trains:
                self._take(task, 99, is_in_order=False)
                self._acknowledge(task.name, self.model.offered(task.name, Offer.LEASED), [])
            elif wanted := GATE.groups_per_step - len(self.model.offered(task.name, Offer.LEASED)):
                self._take(task, wanted, is_in_order=True)

    def _acknowledge(self, task: str, held: list[int], gone: list[int]) -> None:
        live, free = self.ledger.acknowledge(task, array(held + gone))
        assert as_array(live).tolist() == held
        assert as_array(free).tolist() == self.model.acknowledge(task, held)

    @precondition(lambda self: self.gate is not None)
    @rule()
    def step(self) -> None:
        """The trainer acknowledges whole steps."""
        held = self.model.offered("train", Offer.LEASED)
        if len(held) == GATE.groups_per_step:
            self._acknowledge("train", held, [])
            self.model.step += 1
            self.ledger.train_step = self.model.step

    @rule(data=st.data())
    def acknowledge_what_is_not_leased(self, data: st.DataObject) -> None:
        task = data.draw(st.sampled_from(self.tasks)).name
        foreign = [n for n in self.model.pending() if self.model.tickets[n].offers.get(task) != Offer.LEASED]
        if foreign:
            held = some(data, self.model.offered(task, Offer.LEASED))
            with pytest.raises(LeaseLostError, match="not leased to it"):
                self.ledger.acknowledge(task, array([*held, data.draw(st.sampled_from(foreign))]))

    # -- weights and restarts ----------------------------------------------------------------

    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        low = max(self.model.live_step, 0) if self.model.live_step >= 0 else self.model.step
        self.model.live_step = data.draw(st.integers(low, self.model.step)) if self.gate else low
        self.ledger.advance(self.model.live_step)

    @precondition(lambda self: len(self.model.tickets) > 30)
    @rule()
    def restart(self) -> None:
        self.ledger = Ledger(self.tasks, self.gate, self.ledger.snapshot())
        self.ledger.train_step = self.model.step
        self.model.restart()
        self.may_stand_twice = False

    # -- what always holds -------------------------------------------------------------------

    @invariant()
    def accounts_agree(self) -> None:
        global num_steps
        num_steps += 1
        self.ledger.check()
        assert self.ledger.counts() == self.model.counts()
        assert self.ledger.oldest == self.model.oldest()
        assert self.ledger.num_admitted == len(self.model.tickets)
        pending = self.model.pending()
        assert self.ledger.pending().tolist() == pending
        assert [self.ledger.rank(n) for n in [*pending, len(self.model.tickets)]] == [
            self.model.rank(n) for n in [*pending, len(self.model.tickets)]
        ]
        states = [ticket.state for ticket in self.model.tickets]
        found = self.ledger.state_of(np.arange(len(states)))
        assert all(a == b or n < self.ledger.oldest for n, (a, b) in enumerate(zip(states, found, strict=True)))

    @invariant()
    def offers_agree(self) -> None:
        pending = array(self.model.pending())
        for name in self.model.tasks:
            offers = [self.model.tickets[n].offers.get(name, Offer.INCOMPLETE) for n in pending]
            assert self.ledger.offered(name, pending).tolist() == offers
            assert self.ledger.num_ready(name) == len(self.model.lines[name])
            assert self.ledger.num_incomplete(name) == self.model.num_left(name, Offer.INCOMPLETE)
            assert self.ledger.num_left(name) == self.model.num_left(name, Offer.LEASED)
        assert self.ledger.left_over().tolist() == self.model.left_over()


class TrainingMachine(LedgerMachine):
    """One task trains; no gate, so it takes groups as they come."""

    tasks = TRAINING


class GatedMachine(LedgerMachine):
    """Under the gate: tickets are reserved, and the task that trains gets them by rank, a step at a time."""

    tasks = TRAINING
    gate = GATE


def test_the_ledger_does_what_its_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """With windows so small that they move and grow all the time."""
    global num_steps
    num_steps = 0
    monkeypatch.setattr(window, "FIRST_CAPACITY", 4)
    for machine in (LedgerMachine, TrainingMachine, GatedMachine):
        run_state_machine_as_test(machine, settings=settings(stateful_step_count=45))
    assert num_steps >= MIN_STEPS
