"""Text for terminals: model text made harmless, numbers made short, histories made small pictures."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = "▁▂▃▄▅▆▇█"
_ESCAPE = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")
_ASCII = str.maketrans({"→": "->", "·": "-", "━": "=", "╸": ">", "─": "-", "–": "-", "≤": "<=", "…": "...", "×": "x"})


def harmless(text: str) -> str:
    r"""Text that anybody may have written, as lines that can't steer a terminal.

    Control and format characters (terminal escapes, text direction) are removed, but for line
    ends.

    >>> harmless("one\ntwo \x1b[31mred\x9b2J")
    'one\ntwo red2J'
    """
    plain = _ESCAPE.sub("", text).replace("\t", " ")
    return "".join(letter for letter in plain if letter == "\n" or unicodedata.category(letter)[0] != "C")


def one_line(text: str, width: int) -> str:
    r"""Text that anybody may have written, on one line of at most `width` characters.

    Control and format characters (terminal escapes, text direction) are removed, line ends
    shown as `\n`. A long text loses its middle: what it ends with is mostly the answer.

    >>> one_line("one\ntwo \x1b[31mred", 40)
    'one\\ntwo red'
    """
    shown = harmless(text).replace("\n", "\\n")
    if len(shown) <= width:
        return shown
    tail = max(1, width // 3)
    return shown[: max(0, width - tail - 1)] + "…" + shown[-tail:]


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a row of blocks, the lowest of them the smallest block.

    Longer histories are averaged into `width` columns.

    >>> sparkline([0.0, 1.0, 2.0], 8)
    '▁▅█'
    """
    columns = [column for column in _columns(values, width) if math.isfinite(column)]
    if len(columns) < 2:
        return ""
    low, high = min(columns), max(columns)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[int((column - low) * scale + 0.5)] for column in columns)


def short_number(value: float) -> str:
    """A count or a rate with a unit of thousands: `21 k`.

    >>> short_number(950), short_number(21432), short_number(1_234_567)
    ('950', '21 k', '1.2 M')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:.{1 if abs(value) < 10 * size else 0}f}{unit}"
    return f"{value:.0f}"


def short_time(seconds: float) -> str:
    """A duration as on a clock.

    >>> short_time(84), short_time(3725)
    ('1:24', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def to_ascii(text: str) -> str:
    """The text for terminals that know nothing else; sparklines vanish."""
    bare = "".join(letter for letter in text.translate(_ASCII) if letter not in BLOCKS)
    return bare.encode("ascii", "replace").decode()


def _columns(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    parts = [values[start:end] for start, end in pairwise(edges)]
    return [sum(part) / len(part) for part in parts]
