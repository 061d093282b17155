"""Silence ends in giving up, at the moment that was promised; any answer in time prevents it."""

from __future__ import annotations

import asyncio

import pytest

from asyncflow.engines.rollout.pulse import Pulse
from asyncflow.plan.virtual import run_virtually

LIMIT_S = 60.0


async def given_up_at(*, answers: int, delay_s: float, until_s: float = 1000.0) -> float | None:
    """When it gave up on one that answers so many questions, each after a delay; None if it did not."""
    loop = asyncio.get_running_loop()
    ends: list[float] = []
    left = answers

    def ask() -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            loop.call_later(delay_s, pulse.hear)

    pulse = Pulse(LIMIT_S, ask, lambda: ends.append(loop.time()))
    pulse.begin()
    await asyncio.sleep(until_s)
    pulse.end()
    pulse.end()
    await asyncio.sleep(until_s)
    assert len(ends) <= 1
    return ends[0] if ends else None


@pytest.mark.parametrize(("answers", "end_s"), [(0, 15 + 60), (1, 30 + 60), (10, 165 + 60)])
def test_it_gives_up_a_limit_after_the_first_question_without_an_answer(answers: int, end_s: float) -> None:
    assert run_virtually(given_up_at(answers=answers, delay_s=1)) == end_s


@pytest.mark.parametrize("delay_s", [0, 14, 40, 59])
def test_slow_answers_are_answers(delay_s: float) -> None:
    assert run_virtually(given_up_at(answers=1_000_000, delay_s=delay_s)) is None


def test_one_that_ended_asks_nobody() -> None:
    assert run_virtually(given_up_at(answers=0, delay_s=0, until_s=70)) is None


def test_a_pause_of_both_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that slept for an hour: all timers are due at once, answers come a moment later."""

    async def sleep_through() -> bool:
        gave_up: list[bool] = []
        loop = asyncio.get_running_loop()
        pulse = Pulse(LIMIT_S, lambda: None, lambda: gave_up.append(True))
        pulse.begin()
        await asyncio.sleep(16)
        monkeypatch.setattr(loop._selector, "time_s", 3600.0)  # type: ignore[attr-defined]
        await asyncio.sleep(1)
        pulse.hear()
        await asyncio.sleep(44)
        pulse.end()
        return bool(gave_up)

    assert not run_virtually(sleep_through())
