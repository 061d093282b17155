"""Small language models built from a configuration, so that a laptop needs no download.

A model is a folder that `AutoModelForCausalLM.from_pretrained` and
`AutoTokenizer.from_pretrained` load: weights in safetensors, configuration, tokenizer.
Equal arguments give equal weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)
from transformers.utils import logging as hf_logging

from asyncflow.core.errors import ConfigError
from asyncflow.engines.bit_equal import aligned

END = "<eos>"
"""The token that ends a completion, in the models built here."""

PAD = "<pad>"
"""Fills batches of the fallback path and of other programs; never sampled by a trained policy."""

SAFE_WEIGHTS = (
    "Weights are read from safetensors only (model.safetensors or its parts), "
    "because other files of weights, such as pytorch_model.bin, can run code"
)

ATTENDS_TO_ALL = "full_attention"
WINDOWS: Mapping[str, str] = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
"""Kinds of attention that see a part of the sequence, and the setting that says how much."""

UNLIMITED = 1 << 30
"""The context of a model whose configuration names no limit."""


class TextTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that asyncflow uses."""

    @property
    def eos_token_id(self) -> int:
        """The token that ends a completion."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        ...

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        ...


def build_character_model(
    folder: Path,
    *,
    alphabet: str,
    layers: int,
    width: int,
    heads: int,
    intermediate: int,
    max_len: int,
    seed: int,
    tie_embeddings: bool = False,
) -> None:
    """Write a Llama with one token per character of `alphabet`, then `<eos>` and `<pad>`.

    Token i is `alphabet[i]`. Encoding a character outside the alphabet raises; nothing is
    dropped silently.
    """
    vocabulary = {token: index for index, token in enumerate([*alphabet, END, PAD])}
    if len(vocabulary) != len(alphabet) + 2:
        raise ConfigError(f"the alphabet {alphabet!r} names a character twice")
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_len,
        initializer_range=initial_std(width),
        tie_word_embeddings=tie_embeddings,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    _write_model(lambda: LlamaForCausalLM(config), folder, seed)
    _wrap(tokenizer, max_len).save_pretrained(folder)


def build_text_model(
    folder: Path,
    *,
    corpus: Iterable[str],
    vocab_size: int,
    layers: int,
    width: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    max_len: int,
    seed: int,
) -> None:
    """Write a Qwen2 with tied embeddings and a byte-level BPE tokenizer trained on `corpus`.

    The tokenizer splits text as Qwen2's does (every digit is a token) and can encode any
    text; decoding gives its NFC form. It has `vocab_size` tokens, or fewer when the corpus has
    no more merges to give; the model is made to its size.
    """
    if vocab_size < 258:
        raise ConfigError(f"vocab_size is {vocab_size}; a byte-level tokenizer has 256 bytes, {END} and {PAD}: 258")
    blank = Qwen2Tokenizer(unk_token=END, eos_token=END, pad_token=PAD, model_max_length=max_len)
    tokenizer = blank.train_new_from_iterator(corpus, vocab_size, show_progress=False)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_len,
        initializer_range=initial_std(width),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _write_model(lambda: Qwen2ForCausalLM(config), folder, seed)
    tokenizer.save_pretrained(folder)


def initial_std(width: int) -> float:
    """Standard deviation of the first weights: 0.7 / sqrt(width).

    Transformers' 0.02 suits widths near 1,200. At width 128 it left the quickstart's model
    at 8 % where 0.06 reaches 38 %, after the same 400 steps.

    >>> round(initial_std(128), 3)
    0.062
    """
    return 0.7 / sqrt(width)


def load_tokenizer(name: str) -> TextTokenizer:
    """The tokenizer of a model folder or hub name. Raises `ConfigError` where there is none to use."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} is a folder but not a model: it has no config.json")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~"))):
        raise ConfigError(f"{name} does not exist: expected the folder of a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # damaged files raise all kinds
        raise ConfigError(
            f"{name} is neither the folder nor the hub name of a model with a tokenizer: {cause(error)}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {name} has no end token, so no completion could ever end")
    return cast(TextTokenizer, tokenizer)


def check_weights(name: str) -> None:
    """Raise `ConfigError` where a model folder holds no weights, or a file of them is damaged or cut short.

    Reads their headers only. A hub name is not looked into.
    """
    folder = Path(name)
    files = sorted(folder.glob("*.safetensors"))
    if folder.is_dir() and not files:
        raise ConfigError(f"{name} is a folder without weights that can be used: {SAFE_WEIGHTS}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} can't be read: {error}. {SAFE_WEIGHTS}") from error


def open_weights(name: str, device: str, dtype: torch.dtype, *, attention: str | None = None) -> PreTrainedModel:
    """The causal language model of a folder or hub name, in evaluation mode; the one way in for weights.

    `attention` names an implementation; without one, transformers chooses. Raises `ConfigError`.
    """
    try:
        with progress_bars_hidden():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, attn_implementation=attention, use_safetensors=True
            )
        return aligned(model.to(device).eval())
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{name} can't be opened as a causal language model on {device}: {error}. {SAFE_WEIGHTS}"
        ) from error


def context_length(name: str) -> int:
    """Tokens of a sequence at most, prompt and completion together, of a model folder or hub name.

    Reads its configuration and no weights. Raises `ConfigError` where there is none, and for
    models that the built-in engines can't serve.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # damaged files raise all kinds
        raise ConfigError(f"{name} has no configuration that can be read: {cause(error)}") from error
    return context_of(config)


def context_of(config: PretrainedConfig) -> int:
    """A model's positions, or its attention window if that is shorter.

    Within its window, sliding or chunked attention is full attention, which the rollout
    engine's cache implements. Raises `ConfigError` for layers that are not attention.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [ATTENDS_TO_ALL])
    if unknown := kinds - {ATTENDS_TO_ALL} - WINDOWS.keys():
        raise ConfigError(f"the torch engine can't serve layers of kind {', '.join(sorted(unknown))}; use another one")
    limits = [getattr(text, "max_position_embeddings", None)]
    has_layer_types = getattr(text, "layer_types", None) is not None
    for kind, setting in WINDOWS.items():
        if kind in kinds or not has_layer_types:
            limits.append(getattr(text, setting, None))
    return min(limit for limit in (*limits, UNLIMITED) if limit)


def cause(error: Exception) -> str:
    """What a library said about a file; the kind of error too, without which many texts say nothing.

    >>> cause(KeyError("added_tokens"))
    "KeyError: 'added_tokens'"
    """
    return f"{type(error).__name__}: {error}"


@contextmanager
def progress_bars_hidden() -> Iterator[None]:
    """Keep transformers' progress bars out of the terminal, which belongs to the run's own lines."""
    were_enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_enabled:
            hf_logging.enable_progress_bar()


def _write_model(make: Callable[[], PreTrainedModel], folder: Path, seed: int) -> None:
    """Draw the first weights from the seed, whatever else draws, and save them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    with progress_bars_hidden():
        model.save_pretrained(folder)


def _wrap(tokenizer: Tokenizer, max_len: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_len,
        clean_up_tokenization_spaces=False,
    )
