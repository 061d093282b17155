"""Append-only files with one JSON object on each line.

A crash or a full disk may leave a torn line. It is never joined with the next one, and
readers pass over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from asyncflow.core.world import Disk

MAX_BUFFERED = 512


class JsonLines:
    """The writer of one file: buffers lines until `flush`, or until there are many."""

    def __init__(self, path: Path, disk: Disk, *, is_resumed: bool) -> None:
        self._path = path
        self._disk = disk
        self._lines: list[bytes] = []
        self._may_be_torn = is_resumed

    def add(self, values: Mapping[str, object]) -> int:
        """Add a line; its length in bytes. NaN and infinity become null, as JSON has neither."""
        line = msgspec.json.encode(values, enc_hook=_plain)
        self._lines.append(line)
        if len(self._lines) >= MAX_BUFFERED:
            self.flush()
        return len(line) + 1

    def flush(self) -> None:
        """Hand the buffered lines to the operating system. Lines that it does not take are lost."""
        if not self._lines:
            return
        data = b"".join(line + b"\n" for line in self._lines)
        self._lines.clear()
        torn, self._may_be_torn = self._may_be_torn, True
        self._disk.append(self._path, b"\n" + data if torn else data)
        self._may_be_torn = False


def read_json_lines(path: Path, disk: Disk) -> list[dict[str, object]]:
    """The objects of a file in their order; empty when there is no file."""
    try:
        lines = disk.read(path).split(b"\n")
    except FileNotFoundError:
        return []
    return [values for line in lines if (values := _decode(line)) is not None]


def _decode(line: bytes) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(line, type=dict[str, object])
    except msgspec.DecodeError:
        return None


def _plain(value: object) -> object:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is not a number, a text or a list of them")
