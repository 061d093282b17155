"""The real main loop under a thousand drawn schedules: whatever happens, the promises hold.

Each seed draws the sizes of the run, the times of everything, the order of simultaneous
events, failures, drops, and for every fourth the moment at which the run is first cancelled
and begun again. Other tests draw crashes and the checkpoint from which a run is resumed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import numpy as np
import pytest

from asyncflow.core.config import (
    AlgorithmConfig,
    CheckpointConfig,
    EvaluateConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from asyncflow.core.errors import EngineLostError, FailureBudgetError
from asyncflow.core.types import Prompt
from asyncflow.data.gate import Gate
from asyncflow.engines.scripted import Script
from asyncflow.plan.simulate import Simulation, simulate
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Agent, Chat

NUM_SCHEDULES = 1000
PER_TEST = 50


def log_normal(mean: float, sigma: float) -> Callable[[np.random.Generator], float]:
    return lambda rng: float(mean * np.exp(sigma * rng.standard_normal() - sigma**2 / 2))


def draw_config(rng: np.random.Generator) -> RunConfig:
    time_limit_s = float(rng.choice([20.0, 1e3]))
    least_running = 20 if time_limit_s == 20.0 else 1  # or held-out answers spend all their time on waiting
    return RunConfig(
        seed=int(rng.integers(1_000_000)),
        steps=int(rng.integers(2, 6)),
        max_staleness=int(rng.integers(0, 4)),
        look_ahead=int(rng.choice([1, 1, 2, 7])),
        groups_per_step=int(rng.integers(1, 6)),
        group_size=int(rng.integers(2, 4)),
        rollout=RolloutConfig(max_running=int(rng.integers(least_running, 40)), time_limit_s=time_limit_s),
        train=TrainConfig(micro_batch_tokens=int(rng.choice([30, 100, 4096]))),
        algorithm=AlgorithmConfig(drop_no_signal=bool(rng.random() < 0.5), kl_coef=float(rng.choice([0.0, 0.1]))),
        evaluate=EvaluateConfig(every=int(rng.integers(0, 3)), num_prompts=8, final_num_prompts=8),
        checkpoint=CheckpointConfig(every=1),
    )


def draw_script(rng: np.random.Generator, *, failure_rate: float = 0.0, crash_rate: float = 0.0) -> Script:
    load_s = float(rng.choice([0.0, 0.1, 30.0]))  # weights that arrive at once, soon, and very late
    train_s = float(rng.choice([0.0, 0.01, 1.0]))
    return Script(
        completion_s=log_normal(float(rng.choice([0.1, 1.0])), float(rng.choice([0.0, 1.0, 2.0]))),
        accumulate_s=lambda draw, tokens: train_s * float(draw.random()) * tokens,
        logprobs_s=lambda draw, tokens: 0.3 * train_s * float(draw.random()) * tokens,
        apply_s=lambda draw: train_s,
        load_s=lambda draw: load_s * float(draw.random()),
        failure_rate=failure_rate,
        crash_rate=crash_rate,
    )


def draw_agent(rng: np.random.Generator, *, trouble: float = 0.0) -> Agent:
    """One or two turns; in a share `trouble` of conversations it raises, is cancelled from within, or hangs."""
    num_turns = int(rng.integers(1, 3))

    async def agent(prompt: Prompt, chat: Chat) -> float:
        for _ in range(num_turns):
            words = (await chat.respond("?")).split()
        fate = chat.world.rng(prompt.id, *words).random() / max(trouble, 1e-9)
        if int(prompt.id) < 6:  # most of the eight held out are easy: an evaluation without any answer ends the run
            fate = 1.0
        if fate < 0.4:
            raise KeyError("no such tool")
        if fate < 0.8:
            raise asyncio.CancelledError("a tool of the agent was cancelled")
        if fate < 1.0:
            await asyncio.Event().wait()
        return float(len(words) % 2)

    return agent


def check_promises(config: RunConfig, result: Simulation) -> None:
    """The bound holds, every ticket is accounted for, every trained group was whole and trained once."""
    counts = result.counts
    assert counts.admitted == counts.trained + sum(counts.dropped.values()) + counts.pending
    assert counts.trained == config.steps * config.groups_per_step
    gate = Gate(
        groups_per_step=config.groups_per_step,
        max_staleness=config.max_staleness,
        steps=config.steps,
        look_ahead=config.look_ahead,
    )
    assert result.staleness_max <= gate.bound
    check_rows(config, result.trained_rows)


def check_rows(config: RunConfig, rows: tuple[tuple[int, int, int], ...]) -> None:
    assert len({(ticket, index) for ticket, index, _ in rows}) == len(rows)
    siblings = Counter(ticket for ticket, _, _ in rows)
    assert set(siblings.values()) <= {config.group_size}
    groups_in_step = Counter(step for _, step in {(ticket, step) for ticket, _, step in rows})
    assert set(groups_in_step.values()) <= {config.groups_per_step}


@pytest.mark.parametrize("first", range(0, NUM_SCHEDULES, PER_TEST))
def test_promises_hold_under_drawn_schedules(first: int) -> None:
    for seed in range(first, first + PER_TEST):
        rng = np.random.default_rng(seed)
        config = draw_config(rng)
        config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"max_failures": 100_000})})
        failure_rate, trouble = float(rng.choice([0.0, 0.05, 0.15])), float(rng.choice([0.0, 0.02, 0.2]))
        script, agent = draw_script(rng, failure_rate=failure_rate), draw_agent(rng, trouble=trouble)
        if seed % 4 == 0:
            with suppress(TimeoutError):  # which may also come too late; no task is left either way
                simulate(config, script, agent=agent, seed=seed, interrupt_at_s=float(rng.exponential(3.0)))
        result = simulate(config, script, agent=agent, seed=seed)
        check_promises(config, result)
        assert not set(result.counts.dropped) - {"failed", "timeout", "no signal", "agent"}


def test_rollouts_that_always_fail_spend_the_budget_and_end_the_run() -> None:
    rng = np.random.default_rng(1)
    config = draw_config(rng).model_copy(update={"rollout": RolloutConfig(max_failures=5)})
    with pytest.raises(FailureBudgetError, match=r"of the last . groups failed.*scripted failure"):
        simulate(config, draw_script(rng, failure_rate=1.0), seed=1)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_a_crash_ends_the_run_with_its_cause_and_leaves_no_task(first: int) -> None:
    for seed in range(first, first + 50):
        rng = np.random.default_rng(seed)
        config = draw_config(rng)
        try:
            result = simulate(config, draw_script(rng, crash_rate=0.02), seed=seed)
        except EngineLostError:
            continue  # `run_virtually` itself refuses to leave tasks behind
        check_promises(config, result)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_a_run_resumed_from_any_checkpoint_trains_every_ticket_once(first: int) -> None:
    for seed in range(first, first + 50):
        rng = np.random.default_rng(seed)
        config, script = draw_config(rng), draw_script(rng)
        whole = simulate(config, script, seed=seed)
        snapshot = whole.snapshots[int(rng.integers(len(whole.snapshots)))]
        step = snapshot.trained // config.groups_per_step
        redrawn = draw_config(rng)  # a resume may change these, up or down
        config = config.model_copy(
            update={
                "steps": step + int(rng.integers(0, 5)),
                "max_staleness": redrawn.max_staleness,
                "look_ahead": redrawn.look_ahead,
            }
        )
        resumed = simulate(config, script, seed=seed + 1, snapshot=snapshot)
        check_promises(config, resumed)
        kept = tuple(row for row in whole.trained_rows if row[2] < step)
        check_rows(config, kept + resumed.trained_rows)


@pytest.mark.parametrize("seed", range(100))
def test_cancelling_a_run_at_any_moment_ends_every_task(seed: int) -> None:
    rng = np.random.default_rng(seed)
    config, script = draw_config(rng), draw_script(rng)
    try:
        result = simulate(config, script, seed=seed, interrupt_at_s=float(rng.exponential(3.0)))
    except TimeoutError:
        return  # `run_virtually` itself refuses to leave tasks behind
    check_promises(config, result)


@pytest.mark.parametrize("error", [None, TimeoutError("interrupted")])
def test_a_task_that_is_left_behind_is_an_error_however_the_run_ended(error: Exception | None) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        left = asyncio.Task(asyncio.Event().wait(), loop=loop, name="stray")
        await asyncio.sleep(1)
        assert not left.done()
        if error is not None:
            raise error

    with pytest.raises(RuntimeError, match=r"tasks left running: \['stray'\]"):
        run_virtually(main())


def test_equal_seeds_give_equal_runs() -> None:
    rng = np.random.default_rng(5)
    config, script = draw_config(rng), draw_script(rng)
    assert simulate(config, script, seed=9) == simulate(config, script, seed=9)
