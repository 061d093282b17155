"""Prompts from files: what comes out, and what a user is told about everything that can be wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncflow.core.errors import ConfigError
from asyncflow.data.prompts import read_prompts

ROWS: list[dict[str, object]] = [
    {"prompt": "1+1=", "answer": "2", "level": 1},
    {"prompt": "2+2=", "answer": "4", "level": 2, "tags": ["a", "b"]},
]


def write_lines(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    return write_lines(tmp_path / "sums.jsonl", ROWS)


def problem(
    source: str,
    *,
    id: str = "",  # noqa: A002 - as `read_prompts` calls it
    split: str = "train",
    subset: str = "",
    template: str = "{text}",
) -> str:
    """The message for a source that can't be read."""
    with pytest.raises(ConfigError) as caught:
        read_prompts(source, id=id, split=split, subset=subset, template=template)
    return str(caught.value)


def test_columns_become_a_prompt(lines: str) -> None:
    first, second = read_prompts(lines)
    assert (first.id, first.text, first.answer, dict(first.fields)) == ("sums-0", "1+1=", "2", {"level": "1"})
    assert dict(second.fields) == {"level": "2", "tags": '["a","b"]'}


def test_columns_are_mapped(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "x.jsonl", [{"q": "six by seven", "n": 42, "key": "a1"}])
    (prompt,) = read_prompts(source, text="q", answer="n", id="key", template="Q: {text} {curly}\n")
    assert (prompt.id, prompt.text, prompt.answer) == ("a1", "Q: six by seven {curly}\n", "42")


def test_an_answer_is_not_needed(tmp_path: Path) -> None:
    (prompt,) = read_prompts(write_lines(tmp_path / "x.jsonl", [{"prompt": "go"}]), answer="")
    assert prompt.answer == ""


def test_limit(lines: str) -> None:
    assert [prompt.answer for prompt in read_prompts(lines, limit=1)] == ["2"]


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", ROWS)
    write_lines(tmp_path / "test.jsonl", ROWS[:1])
    ids = [prompt.id for split in ("train", "test") for prompt in read_prompts(str(tmp_path), split=split)]
    assert len(set(ids)) == 3


def test_blank_lines_and_a_byte_order_mark_are_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\r\n\r\n{"prompt": "c", "answer": "d"}')
    assert [prompt.text for prompt in read_prompts(str(path))] == ["a", "c"]


@given(texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": text}) + "\n" for text in texts))
    assert [prompt.text for prompt in read_prompts(str(path))] == texts


def test_a_missing_file_names_the_nearest(lines: str) -> None:
    message = problem(lines.replace("sums", "sum"))
    assert "no such file" in message
    assert "Did you mean sums.jsonl?" in message


def test_a_wrong_column_names_the_nearest_and_those_present(tmp_path: Path) -> None:
    message = problem(write_lines(tmp_path / "x.jsonl", [{"promt": "a", "reply": "b"}]))
    assert "x.jsonl:1: no column 'prompt' for text. Did you mean promt? There are: promt, reply" in message
    assert "no column 'answer' for answer" in message, "both mistakes are reported at once"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"prompt": "a", "answer": }', "x.jsonl:2: not JSON"),
        (b'["a"]', "x.jsonl:2: expected one JSON object a line"),
        (b'{"prompt": NaN, "answer": "a"}', "x.jsonl:2: not JSON"),
        (b'{"prompt": "\xff"}', "x.jsonl:2: byte 13 is not UTF-8 (0xff)"),
        (b"[" * 100_000, "x.jsonl:2: not JSON"),
        (b'{"answer": "a"}', "x.jsonl:2: column 'prompt' holds nothing"),
        (b'{"prompt": null, "answer": "a"}', "x.jsonl:2: column 'prompt' holds nothing"),
        (b'{"prompt": ["a"], "answer": "a"}', "x.jsonl:2: column 'prompt' holds a value of type list"),
        (b'{"prompt": "a", "answer": true}', "x.jsonl:2: column 'answer' holds a value of type bool"),
        (b'{"prompt": " ", "answer": "a"}', "x.jsonl:2: column 'prompt' is empty"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n' + line + b"\n")
    assert expected in problem(str(path))


def test_several_malformed_lines_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("oops\n" * 100)
    assert [line.split(":")[1] for line in problem(str(path)).splitlines()] == ["1", "2", "3", "4", "5"]


def test_utf_16_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-16")
    assert "this is UTF-16" in problem(str(path))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_set_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    assert "no prompts in it" in problem(str(path))


def test_ids_must_differ(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "a", "answer": "", "id": name} for name in ("k", "m", "k")]
    message = problem(write_lines(tmp_path / "x.jsonl", rows), id="id")
    assert "1 ids are used twice, such as 'k'" in message
    assert "x.jsonl:1" in message
    assert "x.jsonl:3" in message


def test_a_source_and_a_place_in_the_template_are_needed(lines: str) -> None:
    assert problem("") == "no source of prompts was given"
    assert "does not contain {text}" in problem(lines, template="Q:")


def test_an_unknown_ending_and_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,answer\n")
    assert "expected a file that ends in .jsonl" in problem(str(tmp_path / "x.csv"))
    assert "expected train.jsonl, train.parquet or a folder saved by datasets" in problem(str(tmp_path))


@pytest.mark.parametrize("source", ["~/none.jsonl", "./none", "/none/at/all", "a/b/c"])
def test_what_looks_like_a_path_is_not_looked_for_on_the_hub(source: str) -> None:
    assert "no such file or folder" in problem(source)


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [("pyarrow", "pyarrow.parquet", "x.parquet"), ("datasets", "datasets", "owner/name")],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str, source: str
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    message = problem(source)
    assert f"needs {package}: pip install 'asyncflow[data]'" in message


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra: pip install 'asyncflow[data]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "sums.parquet")
    first, second = read_prompts(str(tmp_path / "sums.parquet"))
    assert (first.text, first.answer, dict(first.fields)) == ("1+1=", "2", {"level": "1"})
    assert second.fields["level"] == "2"


def test_a_file_that_is_not_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs the extra: pip install 'asyncflow[data]'")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 torn")
    assert "x.parquet: not a Parquet file that can be read" in problem(str(tmp_path / "x.parquet"))


def test_a_folder_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install 'asyncflow[data]'")
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "dev": saved.select([0])}).save_to_disk(str(tmp_path / "many"))
    assert [prompt.answer for prompt in read_prompts(str(tmp_path / "one"))] == ["2", "4"]
    assert [prompt.answer for prompt in read_prompts(str(tmp_path / "many"), split="dev")] == ["2"]
    message = problem(str(tmp_path / "many"), split="tran")
    assert "has no split tran. Did you mean train? There are: dev, train" in message


def test_a_hub_name_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra: pip install 'asyncflow[data]'")
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> object:
        asked.append((name, subset, split))
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = problem("openai/gsm8k", split="test", subset="main")
    assert "openai/gsm8k: neither a file or folder here nor a data set of the hub with split test" in message
    assert asked == [("openai/gsm8k", "main", "test")]
