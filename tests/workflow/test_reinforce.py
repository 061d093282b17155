"""What reinforcement learning puts together: here, what it keeps of a run that has nothing more to learn."""

from __future__ import annotations

from pathlib import Path

import pytest

from asyncflow.algo.advantages import grpo
from asyncflow.algo.algorithms import Algorithm
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, TOKEN_IDS, VERSIONS
from asyncflow.core.config import AlgorithmConfig, CheckpointConfig, RunConfig
from asyncflow.core.errors import FailureBudgetError, NoSignalError
from asyncflow.core.metrics import NullObserver
from asyncflow.core.types import Prompt
from asyncflow.core.world import MemoryDisk, World
from asyncflow.data.history import History, read_history
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.engines.scripted import CountTokens, Script, ScriptedRenderer, ScriptedRollout, ScriptedTrainer
from asyncflow.plan.simulate import COLUMNS, answer_once
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Chat
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.reinforce import Setup, make_gate, make_tasks, reinforce
from asyncflow.workflow.stages import NO_SIGNAL, NO_SIGNAL_LIMIT
from tests.data.simulated_log import CONFIG, SCRIPT, simulated, write


def saved_until_learnt(num_signals: int, every: int) -> list[tuple[int, LedgerSnapshot]]:
    """The checkpoints of a run of 2 groups a step whose first so many groups have a signal, and no other."""
    world = World(seed=1, disk=MemoryDisk(), is_real=False)
    saved: list[tuple[int, LedgerSnapshot]] = []
    answers: list[int] = []

    async def agent(prompt: Prompt, chat: Chat) -> float:
        await chat.respond(prompt.text)
        if prompt.id == "held out":
            return 1.0
        answers.append(1)
        return float(len(answers) % 2 == 0 or len(answers) > 2 * num_signals)

    async def save(step: int, ledger: LedgerSnapshot) -> int:
        saved.append((step, ledger))
        return step

    script = Script(completion_s=lambda rng: 1.0, num_tokens=lambda rng: 1)
    setup = Setup(
        world=world,
        trainer=ScriptedTrainer(world=world, script=script),
        rollout=ScriptedRollout(world=world, script=script, slots=2),  # siblings answer in pairs
        renderer=ScriptedRenderer(),
        agent=agent,
        algorithm=Algorithm(
            columns=(TOKEN_IDS, LOSS_MASK, LOGPROBS, VERSIONS, ADVANTAGE), loss=CountTokens(), advantages=grpo
        ),
        prompts=[Prompt(id=str(i), text="?") for i in range(9)],
        held_out=[Prompt(id="held out", text="?")],
        meter=Meter(NullObserver()),
        save=save,
    )
    config = RunConfig(
        steps=50,
        max_staleness=0,
        groups_per_step=2,
        group_size=2,
        algorithm=AlgorithmConfig(drop_no_signal=True),
        checkpoint=CheckpointConfig(every=every),
    )
    with pytest.raises(NoSignalError):
        run_virtually(reinforce(config, setup))
    return saved


def test_the_last_step_is_kept_when_there_is_nothing_more_to_learn() -> None:
    saved = saved_until_learnt(num_signals=7, every=2)
    assert [step for step, _ in saved] == [2, 3]
    ledger = saved[-1][1]
    assert (ledger.trained, ledger.dropped) == (6, {NO_SIGNAL: NO_SIGNAL_LIMIT - 1})


def test_a_step_that_has_its_checkpoint_is_not_saved_again() -> None:
    assert [step for step, _ in saved_until_learnt(num_signals=4, every=2)] == [2]
    assert saved_until_learnt(num_signals=0, every=0) == []


def setup_of(
    config: RunConfig, script: Script, history: History | None = None, step: int = 0
) -> tuple[Setup, list[int]]:  # type: ignore[type-arg]
    """A scripted run, and the steps of the checkpoints that it makes."""
    world = World(seed=1, disk=MemoryDisk(), is_real=False)
    saved: list[int] = []

    async def save(step: int, ledger: LedgerSnapshot) -> int:
        assert ledger.trained == step * config.groups_per_step
        saved.append(step)
        return 0

    setup = Setup(
        world=world,
        trainer=ScriptedTrainer(world=world, script=script, step=step),
        rollout=ScriptedRollout(world=world, script=script),
        renderer=ScriptedRenderer(),
        agent=answer_once,
        algorithm=Algorithm(columns=COLUMNS, loss=CountTokens(), advantages=grpo),
        prompts=[Prompt(id=str(i), text=f"prompt {i:03d}") for i in range(1000)],
        held_out=[Prompt(id="held out", text="?")],
        meter=Meter(NullObserver()),
        save=save,
        history=history,
    )
    return setup, saved


@pytest.mark.parametrize(("steps", "saved"), [(6, [6]), (8, [6, 8]), (7, [6, 7])])
def test_a_run_that_ended_before_the_checkpoint_of_its_last_step_saves_what_it_took_again(
    tmp_path: Path, steps: int, saved: list[int]
) -> None:
    folder = write(tmp_path / "ledger", simulated()[0])  # 6 steps; a checkpoint after every second
    config = CONFIG.model_copy(update={"steps": steps})
    history = read_history(folder, make_tasks(config, COLUMNS), make_gate(config))
    setup, found = setup_of(config, SCRIPT, history, step=4)
    run_virtually(reinforce(config, setup))
    assert found == saved


def test_a_resume_with_nothing_to_take_again_saves_nothing_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "ledger", simulated()[0])
    history = read_history(folder, make_tasks(CONFIG, COLUMNS), make_gate(CONFIG))
    setup, found = setup_of(CONFIG, SCRIPT, history, step=6)
    run_virtually(reinforce(CONFIG, setup))
    assert found == []


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_rollout_that_takes_too_long_ends_a_deterministic_run_only(deterministic: bool) -> None:
    config = RunConfig(steps=1, groups_per_step=2, group_size=2, deterministic=deterministic)
    slow = Script(completion_s=lambda rng: 700.0 if rng.random() < 0.2 else 1.0)
    setup, saved = setup_of(config, slow)
    if deterministic:
        with pytest.raises(
            FailureBudgetError, match=r"took over rollout.time_limit_s = 600 .* raise rollout.time_limit_s"
        ):
            run_virtually(reinforce(config, setup))
    else:
        assert run_virtually(reinforce(config, setup)).dropped["timeout"] > 0
        assert saved == [1]
