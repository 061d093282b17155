"""Cores: training takes what rollout leaves, and all of them while rollout rests."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from asyncflow.core.config import RolloutConfig, RunConfig, TrainConfig
from asyncflow.engines.cores import Cores


@dataclass
class Engine:
    num_running: int = 0


def divide(
    cores: int, monkeypatch: pytest.MonkeyPatch, *, rollout: int = 0, train: int = 0, deterministic: bool = False
) -> Cores:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    roles = {"rollout": RolloutConfig(threads=rollout), "train": TrainConfig(threads=train)}
    return Cores.of(RunConfig.model_validate({**roles, "deterministic": deterministic}))


@pytest.mark.parametrize(("cores", "for_rollout", "left"), [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 4, 4), (64, 32, 32)])
def test_cores_are_halved_while_both_work(
    cores: int, for_rollout: int, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    division = divide(cores, monkeypatch)
    division.rollout = Engine(num_running=3)
    assert (division.rollout_threads, division.for_training()) == (for_rollout, left)


def test_training_takes_all_while_nothing_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    division = divide(8, monkeypatch)
    assert division.for_training() == 8  # before there is a rollout engine
    engine = Engine()
    division.rollout = engine
    seen = []
    for engine.num_running in (0, 1, 0):
        seen.append(division.for_training())
    assert seen == [8, 4, 8]


def test_numbers_that_are_given_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    division = divide(8, monkeypatch, rollout=3, train=2)
    assert (division.rollout_threads, division.for_training()) == (3, 2)
    division.rollout = Engine(num_running=1)
    assert division.for_training() == 2
    more = divide(2, monkeypatch, rollout=6)
    more.rollout = Engine(num_running=1)
    assert more.for_training() == 1


@pytest.mark.parametrize(("given", "taken"), [(0, 1), (3, 3)])
def test_a_deterministic_run_takes_the_same_number_on_any_machine(
    given: int, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores in (1, 2, 64):
        division = divide(cores, monkeypatch, rollout=given, train=given, deterministic=True)
        assert (division.rollout_threads, division.for_training()) == (taken, taken)
        division.rollout = Engine(num_running=1)
        assert division.for_training() == taken
