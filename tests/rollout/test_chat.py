"""The chat keeps an exact record: tokens once, in order, with who sampled them and under which weights."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.types import NOT_SAMPLED, Completion, FinishReason, Prompt, SamplingParams
from asyncflow.core.world import MemoryDisk, World, derive_seed
from asyncflow.engines.scripted import END_TOKEN, ScriptedRenderer
from asyncflow.plan.virtual import run_virtually
from asyncflow.rollout.chat import Chat
from tests.rollout.engines import TellingEngine, say

PROMPT = Prompt(id="p", text="ask")
PARAMS = SamplingParams(max_tokens=8, temperature=0.7, seed=5)


def new_chat(*completions: Completion) -> tuple[Chat, TellingEngine]:
    engine = TellingEngine(list(completions))
    world = World(disk=MemoryDisk(), is_real=False)
    return Chat(engine, ScriptedRenderer(), PARAMS, session="4.1", world=world), engine


@st.composite
def turns(draw: st.DrawFn) -> list[tuple[str, Completion]]:
    """What is told and what is said, turn by turn, with weights that change in mid-completion."""
    drawn = []
    for _ in range(draw(st.integers(1, 5))):
        counts = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
        spans = [(draw(st.integers(0, 9)), count) for count in counts]
        tokens = draw(st.lists(st.integers(0, 99), min_size=sum(counts), max_size=sum(counts)))
        drawn.append((draw(st.text(alphabet="ab?", max_size=4)), say(*tokens, versions=spans)))
    return drawn


@given(turns())
def test_every_prompt_begins_with_all_tokens_before_it(drawn: list[tuple[str, Completion]]) -> None:
    chat, engine = new_chat(*(completion for _, completion in drawn))

    async def converse() -> None:
        for text, _ in drawn:
            await chat.respond(text)

    run_virtually(converse())
    record: list[int] = []
    for (text, completion), call in zip(drawn, engine.calls, strict=True):
        record += [ord(character) for character in text]
        assert call.token_ids.tolist() == record
        assert call.token_ids.dtype == np.int32
        record += completion.token_ids.tolist()
    assert chat.trajectory(PROMPT, 1.0).token_ids.tolist() == record


@given(turns())
def test_columns_are_aligned_with_the_tokens(drawn: list[tuple[str, Completion]]) -> None:
    chat, _ = new_chat(*(completion for _, completion in drawn))

    async def converse() -> None:
        for text, _ in drawn:
            await chat.respond(text)

    run_virtually(converse())
    mask: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for text, said in drawn:
        told = len(text)
        mask += [False] * told + [True] * len(said.token_ids)
        logprobs += [0.0] * told + said.logprobs.tolist()
        versions += [NOT_SAMPLED] * told + [span.step for span in said.versions for _ in range(span.num_tokens)]
    trajectory = chat.trajectory(PROMPT, -0.5)
    assert trajectory.loss_mask.tolist() == mask
    assert trajectory.logprobs.tolist() == logprobs
    assert trajectory.versions.tolist() == versions
    assert (trajectory.reward, trajectory.num_turns) == (-0.5, len(drawn))


async def test_every_turn_has_a_seed_of_its_own_and_the_session_of_the_conversation() -> None:
    chat, engine = new_chat()
    for text in ("one", "two", "three"):
        await chat.respond(text)
    assert [call.params.seed for call in engine.calls] == [derive_seed(5, turn) for turn in range(3)]
    assert len({call.params.seed for call in engine.calls}) == 3
    assert {call.session for call in engine.calls} == {"4.1"}
    assert {call.params.temperature for call in engine.calls} == {0.7}


async def test_text_and_finish_reason_of_the_record() -> None:
    chat, _ = new_chat(say(5, 6, 0), say(7, 8, reason=FinishReason.LENGTH))
    assert (chat.num_turns, chat.was_cut) == (0, False)
    assert await chat.respond("a") == "5 6"  # without the end token
    assert (chat.num_turns, chat.was_cut) == (1, False)
    assert await chat.respond("b") == "7 8"
    assert (chat.num_turns, chat.was_cut) == (2, True)
    trajectory = chat.trajectory(PROMPT, 0.0)
    assert trajectory.completion_text == "5 6\n7 8"
    assert trajectory.prompt_text == "ask"
    assert trajectory.finish_reason is FinishReason.LENGTH


async def test_a_turn_that_was_cut_gets_the_end_token_that_it_lacks_as_told() -> None:
    """The renderer's next message begins where the policy ended its turn; a cut turn has no end."""
    chat, engine = new_chat(say(5, 6, reason=FinishReason.LENGTH, versions=[(3, 2)]), say(7, 0), say(8, 0))
    for text in ("a", "b", "c"):
        await chat.respond(text)
    a, b, c = (ord(text) for text in "abc")
    assert engine.calls[1].token_ids.tolist() == [a, 5, 6, END_TOKEN, b]
    assert engine.calls[2].token_ids.tolist() == [a, 5, 6, END_TOKEN, b, 7, END_TOKEN, c]  # the second ended itself
    trajectory = chat.trajectory(PROMPT, 0.0)
    assert trajectory.loss_mask.tolist() == [False, True, True, False, False, True, True, False, True, True]
    assert trajectory.versions.tolist()[:5] == [NOT_SAMPLED, 3, 3, NOT_SAMPLED, NOT_SAMPLED]
    assert trajectory.logprobs[3] == 0.0
