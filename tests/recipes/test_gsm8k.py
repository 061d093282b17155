"""GSM8K: the data as files, the references judged against themselves, and a model built on the spot."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from asyncflow.core.config import RunConfig, WarmupConfig
from asyncflow.core.errors import ConfigError
from asyncflow.recipes.answers import final_number
from asyncflow.recipes.gsm8k import SOLUTION, defaults, reward, task
from asyncflow.recipes.recipe import check_task, load_recipe

ROOT = Path(__file__).parent.parent.parent
DATA = Path(os.environ.get("ASYNCFLOW_TEST_GSM8K", ROOT.parent / "shared" / "data" / "gsm8k"))
REASON = "needs GSM8K: set ASYNCFLOW_TEST_GSM8K to a folder with its train.jsonl and test.jsonl"

NATALIA = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many together?",
    "answer": "In May <<48/2=24>>24.\nTogether <<48+24=72>>72.\n#### 72",
}
WENG = {"question": "Weng earns $1,200 a week. How much in two?", "answer": "2*1200 = <<2*1200=2400>>2400\n#### 2,400"}


def configure(data: Path | str, model: str = "tiny") -> RunConfig:
    return defaults().model_copy(update={"data": str(data), "model": model})


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text(json.dumps(NATALIA))
    (tmp_path / "test.jsonl").write_text(json.dumps(WENG))
    return tmp_path


def test_problems_solutions_and_demonstrations(data: Path) -> None:
    config = configure(data)
    made = task(config)
    check_task(made, config)
    (prompt,) = made.train
    assert prompt.text == f"Question: {NATALIA['question']}\nAnswer:\n"
    assert prompt.answer == "72"
    assert prompt.fields[SOLUTION] == "In May 24.\nTogether 72.\n#### 72"
    assert [shown.completion for shown in made.demonstrations] == [prompt.fields[SOLUTION]]
    assert made.held_out[0].answer == "2,400"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [("so #### 2400", 1.0), ("\\boxed{2{,}400}", 1.0), ("$2,400.00", 1.0), ("2401", 0.0), ("", 0.0)],
)
def test_reward(data: Path, completion: str, expected: float) -> None:
    made = task(configure(data))
    assert reward(made.held_out[0], completion) == expected


def test_a_real_model_is_asked_and_not_warmed_up(data: Path, tmp_path: Path) -> None:
    config = load_recipe("gsm8k").configure(words=[f"data={data}", "model=Qwen/Qwen2.5-0.5B-Instruct"])
    assert config.warmup.steps == 0
    assert config.sampling.max_tokens > defaults().sampling.max_tokens
    made = task(config)
    check_task(made, config)
    assert made.train[0].text.startswith(NATALIA["question"])
    assert made.train[0].text.endswith("that holds #### and the final number.")
    assert made.model(tmp_path / "unused") == config.model == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_warm_up_that_would_ruin_a_real_model_is_refused(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"leave out warmup\.steps"):
        task(configure(data, model="owner/model"))
    gentle = configure(data, model="owner/model").model_copy(
        update={"warmup": WarmupConfig(learning_rate=1e-5, steps=9)}
    )
    assert len(task(gentle).demonstrations) == 1


def test_other_columns_are_mapped_by_settings(tmp_path: Path) -> None:
    row = {"problem": NATALIA["question"], "solution": NATALIA["answer"]}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row))
    words = [f"data={tmp_path}", "columns.text=problem", "columns.answer=solution"]
    assert task(load_recipe("gsm8k").configure(words=words)).train[0].answer == "72"
    with pytest.raises(ConfigError, match="no column 'question' for text"):
        task(load_recipe("gsm8k").configure(words=words[:1]))


def test_a_misspelt_size_is_no_hub_name(data: Path) -> None:
    with pytest.raises(ConfigError, match=r"model=tinny is neither a folder nor a size.* Did you mean tiny\?"):
        task(configure(data, model="tinny"))


def test_data_is_needed_and_must_have_answers(data: Path) -> None:
    with pytest.raises(ConfigError, match="gsm8k needs data: data=FOLDER"):
        task(configure(""))
    (data / "test.jsonl").write_text(json.dumps({**WENG, "answer": "two thousand"}))
    with pytest.raises(ConfigError, match="the answer ends in no number: 'two thousand'"):
        task(configure(data))


def test_a_model_is_built_from_the_data(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs the extra: pip install 'asyncflow[torch]'")
    from asyncflow.engines.models import load_tokenizer

    folder = tmp_path / "model"
    folder.mkdir()
    made = task(configure(data))
    tokenizer = load_tokenizer(made.model(folder))
    text = made.train[0].text + made.train[0].fields[SOLUTION]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.skipif(not (DATA / "train.jsonl").is_file(), reason=REASON)
def test_every_reference_is_right_by_itself_and_wrong_when_changed() -> None:
    config = configure(DATA)
    made = task(config)
    check_task(made, config)
    assert (len(made.train), len(made.held_out)) == (7_473, 1_319)
    for prompt in [*made.train, *made.held_out]:
        number = final_number(prompt.answer)
        assert number is not None
        assert reward(prompt, prompt.fields[SOLUTION]) == 1.0, prompt
        assert reward(prompt, f"It is {number}.") == 1.0, prompt
        assert reward(prompt, f"{prompt.fields[SOLUTION]}1") == 0.0, prompt
        assert reward(replace(prompt, answer=str(number + 1)), prompt.fields[SOLUTION]) == 0.0, prompt
        assert "<<" not in prompt.fields[SOLUTION]
