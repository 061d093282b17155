"""What goes into a run, held fast: paths from any folder, the same prompts after a resume, lengths that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.ports import Renderer
from asyncflow.core.types import IntArray, Prompt
from asyncflow.recipes.recipe import Recipe, Task

MAX_BYTES_TOKENIZED = 4_000_000
"""Texts are measured until so many bytes, the longest first: a few seconds for any tokenizer."""


def with_absolute_paths(config: RunConfig, recipe: Recipe) -> RunConfig:
    """The same settings, whose `data` and `model` mean the same in any working folder.

    What is not there as a file or folder is a hub name, and the recipe's own word for its model
    (`tiny`) stays that word whatever lies around.
    """
    changed = {}
    own = recipe.defaults().model
    if config.data and Path(config.data).exists():
        changed["data"] = str(Path(config.data).absolute())
    if (config.model != own or "/" in own) and Path(config.model).is_dir():
        changed["model"] = str(Path(config.model).absolute())
    return config.model_copy(update=changed)


def prompts_fingerprint(task: Task) -> str:
    """A hash of the ids, texts and answers of all prompts, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompts in (task.train, task.held_out):
        for prompt in prompts:
            for part in (prompt.id, prompt.text, prompt.answer):
                data = part.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        digest.update(b"end")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """How many tokens something of a prompt has."""

    prompt: str
    tokens: int


def check_lengths(task: Task, renderer: Renderer, context: int, config: RunConfig) -> list[str]:
    """Measure prompts and demonstrations against a model's context; one warning for each thing that is tight.

    Raises `ConfigError` for prompts that leave no room for an answer, and demonstrations that
    do not fit. A token stands for at least a byte, so texts that are short enough need no
    tokenizer; of the others, the longest `MAX_BYTES_TOKENIZED` are measured.
    """
    prompts = [*task.train, *task.held_out]
    shortest = min(prompts, key=lambda prompt: len(prompt.text))
    around = len(_tokens(renderer.prompt_ids, shortest.text, shortest))  # at least what a chat template adds
    wanted = config.sampling.max_tokens
    asked = _lengths(
        ((prompt, (prompt.text, "")) for prompt in prompts), renderer, longer_than=context - wanted - around
    )
    shown = _lengths(
        ((one.prompt, (one.prompt.text, one.completion)) for one in task.demonstrations if config.warmup.steps),
        renderer,
        longer_than=context - around - 1,
    )
    full = [length for length in asked if length.tokens >= context]
    outgrown = [length for length in shown if length.tokens > context]
    problems = [
        *_told(full, len(prompts), f"prompts leave no room for an answer in the model's context of {context} tokens"),
        *_told(outgrown, len(task.demonstrations), f"demonstrations exceed the model's context of {context} tokens"),
    ]
    if problems:
        raise ConfigError(*(f"{problem}. Leave them out, or choose another model" for problem in problems))
    tight = [length for length in asked if length.tokens + wanted > context]
    room = f"prompts leave less than sampling.max_tokens={wanted} in the model's context of {context} tokens"
    return [f"{problem}: their answers end early" for problem in _told(tight, len(prompts), room)]


def _told(lengths: Sequence[Length], total: int, what: str) -> Iterator[str]:
    if lengths:
        worst = max(lengths, key=lambda length: length.tokens)
        yield f"{len(lengths):,} of {total:,} {what}, such as {worst.prompt!r} with {worst.tokens:,}"


def _lengths(texts: Iterable[tuple[Prompt, tuple[str, str]]], renderer: Renderer, *, longer_than: int) -> list[Length]:
    """Tokens of (prompt, completion) pairs, of those which may have more than so many."""
    sized = [(len((asked + said).encode("utf-8", "replace")), prompt, asked, said) for prompt, (asked, said) in texts]
    measured, left = [], MAX_BYTES_TOKENIZED
    for size, prompt, asked, said in sorted(sized, key=lambda one: -one[0]):
        if size <= longer_than or left <= 0:
            break
        left -= size
        tokens = len(_tokens(renderer.prompt_ids, asked, prompt))
        tokens += len(_tokens(renderer.completion_ids, said, prompt)) if said else 0
        measured.append(Length(prompt=prompt.id, tokens=tokens))
    return measured


def _tokens(encode: Callable[[str], IntArray], text: str, prompt: Prompt) -> IntArray:
    try:
        return encode(text)
    except Exception as error:
        raise ConfigError(f"prompt {prompt.id!r}: the model's tokenizer can't take its text: {error}") from error
