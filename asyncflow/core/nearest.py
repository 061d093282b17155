"""The name somebody probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LIKENESS = 0.6
"""Below this likeness (0 to 1), a suggestion would puzzle more than it helps."""


def likeness(one: str, other: str) -> float:
    """How alike two names are, from 0 to 1, whatever their case and hyphens."""
    return SequenceMatcher(None, _plain(one), _plain(other)).ratio()


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like `word`, or None when no name is alike.

    >>> nearest("quikstart", ["gsm8k", "quickstart"])
    'quickstart'
    """
    best = max(names, key=lambda name: likeness(word, name), default=None)
    return best if best is not None and likeness(word, best) >= LIKENESS else None


def did_you_mean(name: str | None) -> str:
    """A sentence to put behind an error, with a space before it; empty without a name."""
    return f" Did you mean {name}?" if name else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
