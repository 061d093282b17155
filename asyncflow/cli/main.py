"""The entry point: errors become messages and exit codes.

Exit codes: 0 done, 1 failed, 2 the command or the configuration is wrong, 3 a run broke a
promise (`audit`, `replay`), 130 interrupted, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from asyncflow.cli.app import app
from asyncflow.cli.output import show_error
from asyncflow.core.causes import first_cause
from asyncflow.core.errors import AsyncFlowError, ConfigError, InvariantError

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning would take the other roles' cores
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Set before anything imports torch or transformers, unless the user has set it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; its exit code. Errors that are not asyncflow's, or are its own bugs, are raised."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with interrupted_by_sigterm():
            app(args=arguments, prog_name="asyncflow")
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except (AsyncFlowError, ExceptionGroup) as error:
        cause = first_cause(error)
        if not isinstance(cause, AsyncFlowError) or isinstance(cause, InvariantError):
            raise
        show_error(cause)
        return 2 if isinstance(cause, ConfigError) else 1
    return 0


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Inside, the signal by which schedulers and `kill` ask a program to end does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Pass it on to whoever handles Ctrl-C: the event loop while one runs, which then ends its tasks."""
    if signal.getsignal(signal.SIGINT) in {signal.SIG_IGN, signal.SIG_DFL, None}:  # as under nohup and `&` of scripts
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)
