"""What reinforcement learning puts together: here, what it keeps of a run that has nothing more to learn."""

from __future__ import annotations

import pytest

from asyncflow.algo.advantages import grpo
from asyncflow.algo.algorithms import Algorithm
from asyncflow.core.columns import ADVANTAGE, LOGPROBS, LOSS_MASK, TOKEN_IDS, VERSIONS
from asyncflow.core.config import AlgorithmConfig, CheckpointConfig, RunConfig
from asyncflow.core.errors import NoSignalError
from asyncflow.core.metrics import NullObserver
from asyncflow.core.types import Prompt
from asyncflow.core.world import MemoryDisk, World
from asyncflow.data.ledger import LedgerSnapshot
from asyncflow.engines.scripted import CountTokens, Script, ScriptedRenderer, ScriptedRollout, ScriptedTrainer
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Chat
from asyncflow.workflow.meter import Meter
from asyncflow.workflow.reinforce import Setup, reinforce
from asyncflow.workflow.stages import NO_SIGNAL, NO_SIGNAL_LIMIT


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
