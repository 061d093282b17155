"""Text to tokens and back, by the model's own tokenizer and chat template.

Which tokens end the policy's turn, and which of them a demonstration should teach, the
tokenizer alone does not know: chat models often end a turn with another token than a text.
So three sources are asked, the surest first:

1. the chat template: a special token right after the assistant's words is how a turn ends;
2. `generation_config.json`, whose `eos_token_id` lists the tokens that end generation;
3. the tokenizer's end token, where there is no such list.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import IntArray
from asyncflow.engines.models import TextTokenizer, cause, load_tokenizer

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for what the policy said, where only what follows it is wanted."""


class ChatTemplate(Protocol):
    """The part of a Hugging Face tokenizer that renders conversations."""

    chat_template: str | None
    all_special_ids: list[int]

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as text."""
        ...


class TokenizerRenderer:
    """Renders with a tokenizer: by its chat template where it has one, else plain text."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._tokenizer: TextTokenizer = load_tokenizer(model)
        self._template = cast(ChatTemplate, self._tokenizer)
        self.is_chat = self._template.chat_template is not None
        stops = self._listed_stops(model)
        end = self._turn_end(stops)
        self._stops = tuple(dict.fromkeys([end, *stops]))
        self._end_text = self._tokenizer.decode([end])

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end the policy's turn, the usual one first."""
        return self._stops

    def prompt_ids(self, text: str) -> IntArray:
        """The first message, up to where the policy writes."""
        if not self.is_chat:
            return self._encode(text, special=True)
        return self._encode(self._render([{"role": "user", "content": text}]), special=False)

    def next_ids(self, text: str) -> IntArray:
        """A later message. Raises `ConfigError` where the template can't say how one follows an answer."""
        if not self.is_chat:
            return self._encode(text, special=False)
        rest = self._after_answer(text)
        if rest is None:
            raise ConfigError("this chat template does not show the assistant's words: multi-turn needs another one")
        ended = rest.lstrip()  # some templates put a space before the end
        rest = ended.removeprefix(self._end_text) if ended.startswith(self._end_text) else rest
        return self._encode(rest, special=False)

    def completion_ids(self, text: str) -> IntArray:
        """The policy's words and the token that ends its turn."""
        return np.append(self._encode(text, special=False), np.int32(self._stops[0]))

    def text(self, token_ids: IntArray) -> str:
        """What the policy said, special tokens left out."""
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def _listed_stops(self, model: str) -> list[int]:
        """The end tokens of the generation settings, the tokenizer's first if it is one of them; else only that."""
        end = self._tokenizer.eos_token_id
        try:
            listed = GenerationConfig.from_pretrained(model).eos_token_id
        except Exception as error:
            if not isinstance(error, OSError) or (Path(model) / GENERATION_CONFIG_NAME).exists():
                raise ConfigError(f"{GENERATION_CONFIG_NAME} of {model} can't be read: {cause(error)}") from error
            listed = None  # there are no such settings, which is usual for models that are not for chats
        if listed is None:
            return [end]
        stops = [listed] if isinstance(listed, int) else list(listed)
        return [stop for stop in stops if stop == end] + [stop for stop in stops if stop != end] or [end]

    def _turn_end(self, stops: Sequence[int]) -> int:
        """The token that ends a turn: the one in the chat template, else the first of `stops`."""
        try:
            rest = self._after_answer("?") if self.is_chat else None
        except ConfigError:  # it can't show a second turn: `next_ids` says so to whoever needs one
            rest = None
        following = self._encode((rest or "").lstrip(), special=False)[:1].tolist()
        special = [*stops, *self._template.all_special_ids]
        return following[0] if following and following[0] in special else stops[0]

    def _after_answer(self, text: str) -> str | None:
        """What the template puts after the assistant's words when the user says `text` next; None if it hides them."""
        begun, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
        # The first mark is ours: the text, which may hold others, comes after it.
        _, found, rest = self._render([begun, said, {"role": "user", "content": text}]).partition(MARK)
        return rest if found else None

    def _render(self, conversation: list[dict[str, str]]) -> str:
        """A conversation as text. A template is a program, so it may raise anything: then, a `ConfigError`."""
        try:
            return self._template.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except Exception as error:
            size = "one message" if len(conversation) == 1 else f"{len(conversation)} messages"
            raise ConfigError(
                f"the chat template of {self._model} can't render a conversation of {size}: {cause(error)}"
            ) from error

    def _encode(self, text: str, *, special: bool) -> IntArray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=special), np.int32)
