from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from asyncflow.core.errors import ConfigError
from asyncflow.engines.models import (
    build_character_model,
    build_text_model,
    check_weights,
    context_length,
    load_tokenizer,
    open_weights,
)
from asyncflow.engines.rollout.model import open_model
from asyncflow.engines.train.source import load_model

TEXT_SIZES = {
    "vocab_size": 300, "layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "intermediate": 48, "max_len": 64
}  # fmt: skip


def build_characters(folder: Path, alphabet: str = "01+= \n", seed: int = 1) -> None:
    build_character_model(
        folder, alphabet=alphabet, layers=1, width=32, heads=4, intermediate=48, max_len=64, seed=seed
    )


def test_a_character_model_round_trips_and_puts_nothing_between_characters(tmp_path: Path) -> None:
    build_characters(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "1 +  10=\n"
    assert tokenizer.encode("01+") == [0, 1, 2]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, tokenizer.eos_token_id]) == "1<eos>"
    assert tokenizer.decode([1, tokenizer.eos_token_id], skip_special_tokens=True) == "1"
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 8


def test_a_character_outside_the_alphabet_raises(tmp_path: Path) -> None:
    build_characters(tmp_path)
    with pytest.raises(Exception, match="Missing"):
        load_tokenizer(str(tmp_path)).encode("7")


def test_an_alphabet_names_each_character_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        build_characters(tmp_path, alphabet="011")


def test_a_text_model_encodes_any_text(tmp_path: Path) -> None:
    build_text_model(tmp_path, corpus=["some words, some 12 numbers"] * 9, seed=1, **TEXT_SIZES)
    tokenizer = load_tokenizer(str(tmp_path))
    text = "  some wörds\t\n 12 – 漢字 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("some words")) < 10
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(tokenizer) == model.config.vocab_size
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.eos_token_id == model.config.eos_token_id


def test_a_text_model_needs_room_for_all_bytes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="258"):
        build_text_model(tmp_path, corpus=[], seed=1, **TEXT_SIZES | {"vocab_size": 100})


def test_weights_follow_the_seed_and_nothing_else(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        build_characters(tmp_path / name, seed=seed)
        torch.rand(1)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    torch.random.set_rng_state(before)


@pytest.mark.parametrize(("name", "problem"), [("/not/there", "does not exist"), ("./nor here", "does not exist")])
def test_a_missing_folder_is_named(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_tokenizer(name)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    build_characters(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(config.read_text().replace('"eos_token": "<eos>",', ""))
    with pytest.raises(ConfigError, match="no end token"):
        load_tokenizer(str(tmp_path))


OPENERS: list[Callable[[str], object]] = [
    lambda name: load_model(name, "cpu"),
    lambda name: open_model(name, "cpu", "float32"),
    check_weights,
]


@pytest.mark.parametrize("use", OPENERS, ids=["train", "rollout", "check"])
def test_weights_that_could_run_code_are_not_read(tmp_path: Path, use: Callable[[str], object]) -> None:
    """A whole model, so that transformers would read it, but saved by pickle."""
    build_characters(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    use(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="read from safetensors only"):
        use(str(tmp_path))


def test_damaged_weights_are_a_configuration_error(tmp_path: Path) -> None:
    build_characters(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="can't be opened"):
        open_weights(str(tmp_path), "cpu", torch.float32)


@pytest.mark.parametrize("keep", [0, 5, 200, -100])
def test_the_check_refuses_truncated_weights_and_names_the_file(tmp_path: Path, keep: int) -> None:
    build_characters(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=rf"{weights} can't be read.*safetensors only"):
        check_weights(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["", "{", "{}", "[]", "3", '"x"', "null"])
def test_damaged_files_are_a_configuration_error_or_harmless(tmp_path: Path, name: str, content: str) -> None:
    build_characters(tmp_path)
    (tmp_path / name).write_text(content)
    for use in (load_tokenizer, context_length):
        with suppress(ConfigError):
            use(str(tmp_path))


def test_a_damaged_tokenizer_and_configuration_say_their_cause(tmp_path: Path) -> None:
    build_characters(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"with a tokenizer: KeyError: '"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"no configuration that can be read: \w+Error: "):
        context_length(str(tmp_path))


def test_the_context_is_known_without_weights(tmp_path: Path) -> None:
    build_characters(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert context_length(str(tmp_path)) == 64


def test_a_window_bounds_the_context(tmp_path: Path) -> None:
    MistralConfig(max_position_embeddings=512, sliding_window=128).save_pretrained(tmp_path)
    assert context_length(str(tmp_path)) == 128


def test_a_folder_without_a_configuration_has_no_context(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration"):
        context_length(str(tmp_path))
