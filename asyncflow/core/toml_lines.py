"""On which line of a TOML file each key stands, for error messages.

The standard reader gives values without places. This finds the keys again by their lines; a
key inside an inline table has the line of the table.
"""

from __future__ import annotations

import re

_KEY = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_KEY}(?:\s*\.\s*{_KEY})*"
_TABLE = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]")
_ASSIGNMENT = re.compile(rf"\s*({_DOTTED})\s*=(.*)")


def key_lines(text: str) -> dict[str, int]:
    r"""The line, from 1, of every dotted key and table of a valid TOML text.

    >>> key_lines("steps = 3\n[train]\nlearning_rate = 0.1")
    {'steps': 1, 'train': 2, 'train.learning_rate': 3}
    """
    lines: dict[str, int] = {}
    table = ""
    quotes = ""
    for number, line in enumerate(text.splitlines(), 1):
        if quotes:
            quotes = "" if quotes in line else quotes
        elif match := _TABLE.match(line):
            table = _plain(match[1])
            lines.setdefault(table, number)
        elif match := _ASSIGNMENT.match(line):
            lines.setdefault(f"{table}.{_plain(match[1])}".lstrip("."), number)
            quotes = _opened(match[2])
    return lines


def line_of(name: str, lines: dict[str, int]) -> int:
    """The line of a dotted name, or of the closest table around it; 1 where none is known."""
    while name and name not in lines:
        name = name.rpartition(".")[0]
    return lines.get(name, 1)


def _plain(key: str) -> str:
    return re.sub(r"""["'\s]""", "", key)


def _opened(value: str) -> str:
    """The triple quote that a value opens and does not close on its own line; else empty."""
    return next((quote for quote in ('"""', "'''") if value.count(quote) == 1), "")
