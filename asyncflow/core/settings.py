"""From a recipe's defaults, a TOML file and `a.b=v` words to a validated `RunConfig`.

All mistakes are reported at once, each with its place, what was expected and what came.
Later sources win: defaults, then the file, then the words in their order. `to_toml` writes
the result as a file that loads again to an equal configuration.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pydantic import ValidationError

from asyncflow.core.config import RunConfig
from asyncflow.core.errors import ConfigError
from asyncflow.core.nearest import did_you_mean
from asyncflow.core.setting_list import Setting, Value, expected, fields, list_settings, nearest_setting, read_value
from asyncflow.core.toml_lines import key_lines, line_of

COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """A value that somebody wrote, and where."""

    name: str
    raw: object
    place: str
    is_word: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A mistake: where, in which setting, and what to do."""

    place: str
    name: str
    sentence: str


def resolve(defaults: RunConfig, *, file: Path | None = None, words: Sequence[str] = ()) -> RunConfig:
    """The defaults, overridden by the file, overridden by the words.

    Raises `ConfigError` with every problem of all of them.
    """
    problems: list[Problem] = []
    given = [*(_read_file(file, problems) if file else []), *_read_words(words, problems)]
    values: dict[str, Value] = {}
    places: dict[str, str] = {}
    for entry in given:
        places[entry.name] = entry.place
        try:
            values[entry.name] = _check(entry)
        except ConfigError as error:
            problems.append(Problem(place=entry.place, name=entry.name, sentence=str(error)))
    try:
        config = RunConfig.model_validate(_nest({**_flat(defaults), **values}))
    except ValidationError as error:
        raise _config_error([*problems, *_rules_broken(error, places)]) from None
    if problems:
        raise _config_error(problems)
    return config


def read_toml(file: Path) -> dict[str, object]:
    """The tables of a TOML file. Raises `ConfigError` where it is missing or is not TOML."""
    return _parse(_text(file), file)


def to_toml(config: RunConfig) -> str:
    """The configuration as a TOML file: every setting, with what it does and accepts."""
    blocks = ["# Every setting of a run of asyncflow. Runs again with: asyncflow run THIS_FILE\n"]
    for section, settings in groupby(list_settings(config), key=lambda setting: setting.section):
        rows = [(f"{one.key} = {toml_value(one.default)}", _comment(one)) for one in settings]
        width = min(36, max(len(assignment) for assignment, _ in rows))
        head = [f"[{section}]"] if section else []
        blocks.append("\n".join([*head, *(f"{left:<{width}}  # {right}" for left, right in rows)]) + "\n")
    return "\n".join(blocks)


def _comment(setting: Setting) -> str:
    return setting.description if setting.expected == "text" else f"{setting.description} ({setting.expected})"


def toml_value(value: Value) -> str:
    """A value as TOML writes it.

    >>> toml_value((0.9, 0.99)), toml_value("tiny"), toml_value(True)
    ('[0.9, 0.99]', '"tiny"', 'true')
    """
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(part) for part in value) + "]"
    if isinstance(value, float):
        return repr(value)
    # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_file(file: Path, problems: list[Problem]) -> list[Given]:
    try:
        text = _text(file)
        tables = _parse(text, file)
    except ConfigError as error:
        problems.append(Problem(place=str(file), name="", sentence=str(error).removeprefix(f"{file}: ")))
        return []
    lines = key_lines(text)
    return [
        Given(name=name, raw=raw, place=f"{file}:{line_of(name, lines)}", is_word=False)
        for name, raw in _leaves(tables, "")
    ]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None


def _parse(text: str, file: Path) -> dict[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: is not valid TOML: {error}") from None


def _leaves(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        name = prefix + key
        is_table = isinstance(value, dict) and name not in fields()
        if isinstance(value, dict) and is_table and (value or _is_section(name)):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _read_words(words: Sequence[str], problems: list[Problem]) -> Iterator[Given]:
    for word in words:
        name, equals, raw = word.partition("=")
        if equals and name and not name.startswith("-"):
            yield Given(name=name.strip(), raw=raw, place=COMMAND_LINE, is_word=True)
        else:
            problems.append(Problem(place=COMMAND_LINE, name=word, sentence=_teach(name)))


def _teach(name: str) -> str:
    plain = name.lstrip("-")
    meant = plain if plain in fields() else nearest_setting(plain, fields())
    example = f"{meant or 'train.learning_rate'}=VALUE"
    if plain != name:
        return f"is not an option. Settings are written without dashes: {example}"
    return f"has no '='. Settings are written NAME=VALUE, as in {example}"


def _check(entry: Given) -> Value:
    """The typed value of an entry. Raises `ConfigError` with one sentence."""
    if entry.name not in fields():
        raise ConfigError(_unknown(entry.name))
    field = fields()[entry.name]
    try:
        return read_value(field, entry.raw, strict=not entry.is_word)
    except ValidationError:
        raise ConfigError(f"{_shown(entry.raw)} is not {expected(field)}") from None


def _unknown(name: str) -> str:
    if _is_section(name):
        inside = [other for other in fields() if other.startswith(f"{name}.")]
        return f"is a table of settings, not one setting. It holds {', '.join(inside)}"
    return "unknown setting." + (did_you_mean(nearest_setting(name, fields())) or " List them: asyncflow settings")


def _is_section(name: str) -> bool:
    return any(other.startswith(f"{name}.") for other in fields())


def _shown(raw: object) -> str:
    if isinstance(raw, dict):
        return "a table"
    text = json.dumps(raw, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _rules_broken(error: ValidationError, places: Mapping[str, str]) -> Iterator[Problem]:
    """Rules over several settings; the place is that of the setting which the rule begins with."""
    for detail in error.errors(include_url=False):
        sentence = detail["msg"].removeprefix("Value error, ")
        name = sentence.split(" ", 1)[0]
        is_named = name in fields()
        yield Problem(
            place=places.get(name, "defaults"),
            name=name if is_named else "",
            sentence=sentence.removeprefix(name).strip() if is_named else sentence,
        )


def _config_error(problems: Sequence[Problem]) -> ConfigError:
    """The problems as aligned rows: place, name, sentence; those of the file first."""
    problems = sorted(problems, key=lambda problem: problem.place == COMMAND_LINE)
    place = max(len(problem.place) for problem in problems)
    name = max(len(problem.name) for problem in problems)
    return ConfigError(*(f"{one.place:<{place}}   {one.name:<{name}}   {one.sentence}".rstrip() for one in problems))


def _flat(config: RunConfig) -> dict[str, Value]:
    return {setting.name: setting.default for setting in list_settings(config)}


def _nest(values: Mapping[str, Value]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for name, value in values.items():
        *sections, key = name.split(".")
        table = tree
        for section in sections:
            inner = table.setdefault(section, {})
            table = inner if isinstance(inner, dict) else {}
        table[key] = value
    return tree
