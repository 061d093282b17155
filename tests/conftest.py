"""What every test runs under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Nothing in the tests asserts a time, so an example has no deadline; the same examples every
# time, but for the soak, which looks for new ones.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("soak", deadline=None, max_examples=5_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Tests reach no network: the hub's client is told so before anything imports it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

EXTRAS = {"torch": "torch", "transformers": "torch", "safetensors": "torch", "pyarrow": "data", "datasets": "data"}
"""Packages that only an extra brings, and the extra."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test that reaches for a package of an extra that is not installed is skipped, and says so.

    It hides no mistake: which modules may import such a package is what `test_layers.py` checks.
    """
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        pytest.skip(f"needs {error.name}: pip install 'asyncflow[{EXTRAS[error.name]}]'")
