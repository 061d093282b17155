"""Text to tokens and back, by the model's own tokenizer and chat template."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import IntArray
from asyncflow.engines.models import TextTokenizer, load_tokenizer

MARK = "\N{OBJECT REPLACEMENT CHARACTER}"
"""Stands for what the policy said, where only what follows it is wanted."""


class ChatTemplate(Protocol):
    """The part of a Hugging Face tokenizer that renders conversations."""

    chat_template: str | None
    eos_token: str

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        """The conversation as text."""
        ...


class TokenizerRenderer:
    """Renders with a tokenizer: by its chat template where it has one, else plain text."""

    def __init__(self, model: str) -> None:
        self._tokenizer: TextTokenizer = load_tokenizer(model)
        self._template = cast(ChatTemplate, self._tokenizer)
        self.is_chat = self._template.chat_template is not None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The end token."""
        return (self._tokenizer.eos_token_id,)

    def prompt_ids(self, text: str) -> IntArray:
        """The first message, up to where the policy writes."""
        if not self.is_chat:
            return self._encode(text, special=True)
        return self._encode(self._render([{"role": "user", "content": text}]), special=False)

    def next_ids(self, text: str) -> IntArray:
        """A later message. Raises `ConfigError` where the template can't say how one follows an answer."""
        if not self.is_chat:
            return self._encode(text, special=False)
        begun, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}
        # The first mark is ours: the text, which may hold others, comes after it.
        _, found, rest = self._render([begun, said, {"role": "user", "content": text}]).partition(MARK)
        if not found:
            raise ConfigError("this chat template does not show the assistant's words: multi-turn needs another one")
        return self._encode(rest.removeprefix(self._template.eos_token), special=False)

    def completion_ids(self, text: str) -> IntArray:
        """The policy's words and the end token."""
        return np.append(self._encode(text, special=False), np.int32(self._tokenizer.eos_token_id))

    def text(self, token_ids: IntArray) -> str:
        """What the policy said, special tokens left out."""
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)

    def _render(self, conversation: list[dict[str, str]]) -> str:
        return self._template.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)

    def _encode(self, text: str, *, special: bool) -> IntArray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=special), np.int32)
