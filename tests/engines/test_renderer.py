"""Rendering: turn by turn gives the tokens that the template gives for the whole conversation."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from asyncflow.core.errors import ConfigError
from asyncflow.engines.models import END, build_character_model, build_text_model
from asyncflow.engines.renderer import MARK, TokenizerRenderer

ALPHABET = "0123456789+=?[]uas\n "
LETTERS = {"user": "u", "assistant": "a", "system": "s"}
TEMPLATE = (
    "{% for message in messages %}{{ '[' + message.role[0] + ']' + message.content }}"
    "{% if message.role == 'assistant' %}{{ '<eos>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
)
CONVERSATION = [("1+1=?", "2"), ("2+2=?", "4"), ("", "7 7"), ("9", "")]


def build_characters(folder: Path) -> str:
    build_character_model(folder, alphabet=ALPHABET, layers=1, width=8, heads=1, intermediate=8, max_len=256, seed=1)
    return str(folder)


def add_template(folder: str, template: str = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture
def plain(tmp_path: Path) -> TokenizerRenderer:
    return TokenizerRenderer(build_characters(tmp_path))


def test_without_a_template_text_is_text(plain: TokenizerRenderer) -> None:
    end = len(ALPHABET)
    assert not plain.is_chat
    assert plain.stop_token_ids == (end,)
    assert plain.prompt_ids("1+2=").tolist() == [1, 10, 2, 11]
    assert plain.next_ids("3").tolist() == [3]
    assert plain.completion_ids("45").tolist() == [4, 5, end]
    assert {ids.dtype for ids in (plain.prompt_ids("1"), plain.next_ids("1"), plain.completion_ids("1"))} == {
        np.dtype(np.int32)
    }


def test_text_is_what_was_said_without_the_end(plain: TokenizerRenderer) -> None:
    assert plain.text(plain.completion_ids("4 5")) == "4 5"
    assert plain.text(plain.completion_ids("")) == ""
    assert plain.completion_ids("").tolist() == [len(ALPHABET)]


def build_words(folder: Path) -> str:
    """A byte-level tokenizer that merges letters."""
    corpus = ["[u]1+1=?\n[a]2", "[u]one and one\n[a]two", "one and one is two, and two is one and one"] * 20
    build_text_model(
        folder,
        corpus=corpus,
        vocab_size=300,
        layers=1,
        width=8,
        heads=1,
        kv_heads=1,
        intermediate=8,
        max_len=256,
        seed=1,
    )
    return str(folder)


@pytest.mark.parametrize("build", [build_characters, build_words])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 4])
def test_turn_by_turn_gives_the_tokens_of_the_whole_conversation(tmp_path: Path, build: object, num_turns: int) -> None:
    folder = build_characters(tmp_path) if build is build_characters else build_words(tmp_path)
    tokenizer = add_template(folder)
    renderer = TokenizerRenderer(folder)
    assert renderer.is_chat
    turns = CONVERSATION[:num_turns]
    ids = renderer.prompt_ids(turns[0][0])
    for (_, said), (told, _) in pairwise(turns):
        ids = np.concatenate([ids, renderer.completion_ids(said), renderer.next_ids(told)])
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False)


def test_a_message_may_hold_the_mark(tmp_path: Path) -> None:
    folder = build_words(tmp_path)
    tokenizer = add_template(folder)
    told = f"what is {MARK} in {MARK}?"
    decoded = tokenizer.decode(TokenizerRenderer(folder).next_ids(told))
    assert decoded == f"\n[u]{told}\n[a]"


def test_a_template_that_hides_the_answer_has_no_second_turn(tmp_path: Path) -> None:
    folder = build_characters(tmp_path)
    add_template(folder, "{{ messages[-1].content }}")
    renderer = TokenizerRenderer(folder)
    assert renderer.prompt_ids("1").tolist() == [1]
    with pytest.raises(ConfigError, match="does not show the assistant's words"):
        renderer.next_ids("2")


@pytest.mark.parametrize("template", ["{{ 1 // 0 }}", "{% for", "{{ messages[0] + 1 }}", "{{ raise_exception('no') }}"])
def test_a_template_that_raises_is_a_configuration_error(tmp_path: Path, template: str) -> None:
    folder = build_characters(tmp_path)
    add_template(folder, template)
    with pytest.raises(ConfigError, match=rf"the chat template of {folder} can't render .*Error: "):
        TokenizerRenderer(folder).prompt_ids("1")


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_damaged_generation_settings_are_a_configuration_error(tmp_path: Path, content: str) -> None:
    folder = build_characters(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"generation_config.json of {folder} can't be read: "):
        TokenizerRenderer(folder)


def test_a_template_that_shows_one_turn_only_has_no_second(tmp_path: Path) -> None:
    folder = build_characters(tmp_path)
    add_template(folder, "{{ messages[0].content }}{{ 1 // (3 - messages | length) if messages | length > 1 }}")
    renderer = TokenizerRenderer(folder)
    assert renderer.prompt_ids("1").tolist() == [1]
    with pytest.raises(ConfigError, match="can't render a conversation of 3 messages: ZeroDivisionError"):
        renderer.next_ids("2")


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    folder = build_characters(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="has no end token, so no completion could ever end"):
        TokenizerRenderer(folder)


def test_the_end_is_the_token_that_models_built_here_end_with(plain: TokenizerRenderer) -> None:
    assert plain.prompt_ids(END).tolist() == [*plain.stop_token_ids]


def turns_with(end: str) -> str:
    """A template whose turns end in this text, whoever speaks."""
    return (
        "{% for message in messages %}{{ '[' + message.role[0] + ']' + message.content + '"
        + end
        + "\n' }}{% endfor %}{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
    )


def build_chat(folder: Path, *, template: str | None, listed: int | list[int] | None) -> tuple[str, int, int]:
    """A model with two end tokens: its folder, the tokenizer's end of a text, and the end of a turn."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(build_words(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    if listed is not None:
        GenerationConfig(eos_token_id=listed).save_pretrained(folder)
    return str(folder), tokenizer.eos_token_id, len(tokenizer) - 1


EOS, TURN, OTHER = -1, -2, 5
"""Places in the tests' lists; the first two stand for the ids that `build_chat` gives."""


@pytest.mark.parametrize(
    ("template", "listed", "expected"),
    [
        (None, None, [EOS]),
        (None, EOS, [EOS]),
        (None, [OTHER, EOS], [EOS, OTHER]),
        (None, [OTHER, TURN], [OTHER, TURN]),
        (None, [], [EOS]),
        (turns_with("<turn>"), [EOS, TURN], [TURN, EOS]),
        (turns_with("<turn>"), TURN, [TURN]),
        (turns_with(" <turn>"), [EOS, OTHER, TURN], [TURN, EOS, OTHER]),
        (turns_with("<turn>"), None, [TURN, EOS]),
        (turns_with("<eos>"), None, [EOS]),
        (turns_with(""), [TURN, EOS], [EOS, TURN]),
        ("{{ messages[-1].content }}", [TURN], [TURN]),
        ("{% if messages[2] %}{{ messages[2].content.no.such }}{% endif %}", [TURN], [TURN]),
    ],
)
def test_a_turn_ends_as_the_model_was_taught(
    tmp_path: Path, template: str | None, listed: int | list[int] | None, expected: list[int]
) -> None:
    _, eos, turn = build_chat(tmp_path / "ids", template=None, listed=None)
    known = {EOS: eos, TURN: turn}
    ids = [known.get(one, one) for one in listed] if isinstance(listed, list) else known.get(listed or 0)
    folder, _, _ = build_chat(tmp_path / "model", template=template, listed=ids)
    renderer = TokenizerRenderer(folder)
    assert renderer.stop_token_ids == tuple(known.get(one, one) for one in expected)
    said = renderer.completion_ids("two")
    assert said[-1] == renderer.stop_token_ids[0]
    assert renderer.text(said[:-1]) == "two"


@pytest.mark.parametrize("end", ["<turn>", " <turn>"])
def test_what_follows_an_answer_does_not_end_its_turn_again(tmp_path: Path, end: str) -> None:
    folder, _, turn = build_chat(tmp_path, template=turns_with(end), listed=None)
    renderer, tokenizer = TokenizerRenderer(folder), AutoTokenizer.from_pretrained(folder)
    ids = np.concatenate([renderer.prompt_ids("one"), renderer.completion_ids("two"), renderer.next_ids("and")])
    assert tokenizer.decode(ids) == f"[u]one{end}\n[a]two<turn>\n[u]and{end}\n[a]"
    assert ids.tolist().count(turn) == 3
