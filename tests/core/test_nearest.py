"""Suggestions, and causes inside groups of errors."""

from __future__ import annotations

from asyncflow.core.nearest import did_you_mean, nearest


def test_a_name_is_suggested_only_when_it_is_alike() -> None:
    names = ["gsm8k", "quickstart"]
    assert nearest("Quick-start", names) == "quickstart"
    assert nearest("poetry", names) is None
    assert nearest("anything", []) is None
    assert (did_you_mean("gsm8k"), did_you_mean(None)) == (" Did you mean gsm8k?", "")
