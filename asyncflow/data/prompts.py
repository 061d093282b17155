"""Prompts in: the columns of a table, mapped to what asyncflow calls a prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec

from asyncflow.core.errors import ConfigError
from asyncflow.core.types import Prompt
from asyncflow.data.tables import Row, not_among, read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which column holds what. An empty name: there is none."""

    text: str
    answer: str
    id: str


def read_prompts(
    source: str,
    *,
    text: str = "prompt",
    answer: str = "answer",
    id: str = "",  # noqa: A002 - the name of the field it fills
    split: str = "train",
    subset: str = "",
    template: str = "{text}",
    limit: int | None = None,
) -> list[Prompt]:
    """The prompts of a JSON-lines or Parquet file, a folder, or a data set of the hub.

    `text`, `answer` and `id` name columns; an empty `answer` or `id` says that there is none,
    and ids are then made of the place in the table. `{text}` in the template becomes the
    text. All other columns are kept in `fields`, as text. `subset` is the hub's word for a
    data set's configuration. Raises `ConfigError`, before anything starts, for everything
    that can be wrong with the source.
    """
    if not source:
        raise ConfigError("no source of prompts was given")
    if "{text}" not in template:
        raise ConfigError(f"the template {template!r} does not contain {{text}}")
    rows = list(islice(read_rows(source, split=split, subset=subset), limit))
    if not rows:
        raise ConfigError(f"{source}: no prompts in it (split {split})")
    columns = Columns(text=text, answer=answer, id=id)
    _check_columns(rows, columns)
    stem = Path(source).stem
    made_id = stem if Path(source).is_file() else f"{stem}-{split}"
    prompts = [_to_prompt(row, columns, template, f"{made_id}-{index}") for index, row in enumerate(rows)]
    _check_ids(prompts, rows)
    return prompts


def _check_columns(rows: list[Row], columns: Columns) -> None:
    """Every column asked for stands in the first row; a later row that lacks one is found on its own."""
    present = rows[0].values
    problems = [
        f"{rows[0].place}: no column {name!r} for {role}{not_among(name, present)}"
        for role, name in (("text", columns.text), ("answer", columns.answer), ("id", columns.id))
        if (name or role == "text") and name not in present
    ]
    if problems:
        raise ConfigError(*problems)


def _to_prompt(row: Row, columns: Columns, template: str, made_id: str) -> Prompt:
    named = {columns.text, columns.answer, columns.id}
    text = _cell(row, columns.text)
    if not text.strip():
        raise ConfigError(f"{row.place}: column {columns.text!r} is empty")
    return Prompt(
        id=_cell(row, columns.id) if columns.id else made_id,
        text=template.replace("{text}", text),
        answer=_cell(row, columns.answer) if columns.answer else "",
        fields=_other_fields(row.values, named),
    )


def _cell(row: Row, column: str) -> str:
    """A value that must be there, as text."""
    value = row.values.get(column)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ConfigError(f"{row.place}: column {column!r} holds {_kind(value)}; expected text or a number")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a value of type {type(value).__name__}"


def _other_fields(values: Mapping[str, object], named: set[str]) -> dict[str, str]:
    return {name: _as_text(value) for name, value in values.items() if name not in named and value is not None}


def _as_text(value: object) -> str:
    """Text as it is, everything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def _check_ids(prompts: list[Prompt], rows: list[Row]) -> None:
    """An id names one prompt: the ledger and every report rely on it."""
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        places = [row.place for prompt, row in zip(prompts, rows, strict=True) if prompt.id == twice[0]]
        raise ConfigError(f"{len(twice)} ids are used twice, such as {twice[0]!r}: {', '.join(places[:3])}")
