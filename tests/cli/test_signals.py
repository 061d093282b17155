"""SIGTERM does what Ctrl-C does, while a command runs and no longer."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from asyncflow.cli.main import interrupted_by_sigterm


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["terminal", "background"])
def _ctrl_c(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ctrl-C as a terminal has it, and as what a script starts in the background has it: ignored."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c")
def test_sigterm_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
