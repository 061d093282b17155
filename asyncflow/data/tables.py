"""Rows of a table on disk or on the hub, each with its place, for messages.

Read: JSON lines, Parquet and `datasets` (a saved folder or a hub name); the last two need
the extra `data`. Everything a user can get wrong raises `ConfigError` with a sentence that
says what was expected, what came and where.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import msgspec

from asyncflow.core.errors import ConfigError
from asyncflow.core.nearest import did_you_mean, nearest

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
MAX_PROBLEMS = 5
"""Malformed lines reported at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record. `place` says where it stands, such as `train.jsonl:12`."""

    place: str
    values: Mapping[str, object]


def read_rows(source: str, *, split: str, subset: str = "") -> Iterator[Row]:
    """The rows of a file, a folder or a hub data set; its name decides which it is."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        return _read_file(path)
    if _is_meant_as_path(source):
        raise ConfigError(f"{source}: no such file or folder{_nearest_file(path)}")
    return _read_hub(source, split, subset)


def not_among(name: str, present: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest one, and those there are.

    >>> not_among("promt", ["prompt", "answer"])
    '. Did you mean prompt? There are: answer, prompt'
    """
    names = sorted(present)
    return f".{did_you_mean(nearest(name, names))} There are: {', '.join(names)}" if names else ""


def _is_meant_as_path(source: str) -> bool:
    """Hub names are `name` or `owner/name`, without a file's ending."""
    is_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return is_like_path or source.endswith((*JSON_LINES, *PARQUET))


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return not_among(path.name, (file.name for file in path.parent.iterdir() if not file.name.startswith(".")))


def _read_folder(folder: Path, split: str) -> Iterator[Row]:
    for ending in (*JSON_LINES, *PARQUET):
        file = folder / f"{split}{ending}"
        if file.is_file():
            return _read_file(file)
    if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
        return _read_saved(folder, split)
    names = (file.name for file in folder.iterdir())
    raise ConfigError(
        f"{folder}: expected {split}.jsonl, {split}.parquet or a folder saved by datasets"
        + not_among(f"{split}.jsonl", names)
    )


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in PARQUET:
        return _read_parquet(path)
    if path.suffix in JSON_LINES:
        return iter(_read_json_lines(path))
    raise ConfigError(f"{path}: expected a file that ends in {', '.join((*JSON_LINES, *PARQUET))}")


def _read_json_lines(path: Path) -> list[Row]:
    """All rows, or all problems at once."""
    rows: list[Row] = []
    problems: list[str] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                rows.append(Row(place=f"{path}:{number}", values=_parse_line(line, is_first=number == 1)))
            except ValueError as error:
                problems.append(f"{path}:{number}: {error}")
                if len(problems) == MAX_PROBLEMS:
                    break
    if problems:
        raise ConfigError(*problems)
    return rows


def _parse_line(line: bytes, *, is_first: bool) -> Mapping[str, object]:
    """One JSON object. Raises `ValueError` with what is wrong."""
    if is_first and line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("this is UTF-16; expected UTF-8. Convert it: iconv -f UTF-16 -t UTF-8")
    try:
        text = line.decode("utf-8-sig" if is_first else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x})") from None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected one JSON object a line, such as {{...}}; this is {type(value).__name__}")
    return value


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = _import_extra("pyarrow.parquet", f"reading {path}")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a Parquet file that can be read: {error}") from error
    return (Row(place=f"{path}, row {index}", values=values) for index, values in enumerate(table.to_pylist(), start=1))


def _read_saved(folder: Path, split: str) -> Iterator[Row]:
    datasets = _import_extra("datasets", f"reading {folder}")
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: datasets cannot read it: {error}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ConfigError(f"{folder} has no split {split}{not_among(split, loaded)}")
        loaded = loaded[split]
    return (Row(place=f"{folder}, row {index}", values=values) for index, values in enumerate(loaded, start=1))


def _read_hub(name: str, split: str, subset: str) -> Iterator[Row]:
    datasets = _import_extra("datasets", f"{name} is no file here, so it would be a data set of the hub, and that")
    try:
        loaded = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the hub's client raises whatever its transport raises
        raise ConfigError(
            f"{name}: neither a file or folder here nor a data set of the hub with split {split}: {error}"
        ) from error
    return (Row(place=f"{name}, row {index}", values=values) for index, values in enumerate(loaded, start=1))


def _import_extra(module: str, purpose: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(f"{purpose} needs {package}: pip install 'asyncflow[data]'") from error
