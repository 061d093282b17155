"""`asyncflow` that kills itself: `python tests/kill/doomed.py "PHASE N VICTIM" run …`.

The first time that the phase of version N comes, the victim gets SIGKILL: the run's own process (`self`),
or its rollout process (`rollout`). A phase is the moment after one call that changes what is computed, on
the disk, or served.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PHASES = (
    "accumulated",  # some gradients of the step that makes version N are there
    "applied",  # the optimizer step is taken; nobody knows
    "acknowledged",  # `Trained` is on the disk; no engine serves the weights
    "drafted",  # the checkpoint's files are written, and have no name
    "published",  # they have
    "saved",  # the log knows of it
    "thinned",  # the log was compacted up to version N
    "exported",  # the weights are readable; the gate does not know
    "live",  # the gate knows
    "replayed",  # the step was taken again from the log
)

VersionOf = Callable[[tuple[Any, ...], dict[str, Any], Any], int]


def phase_calls() -> dict[str, tuple[Any, str, VersionOf]]:
    """The call of each phase: whose it is, its name, and its version by its arguments and result."""
    from asyncflow.data.local_queue import LocalQueue
    from asyncflow.engines.train.torch_engine import TorchTrainEngine
    from asyncflow.recipes import session
    from asyncflow.workflow import checkpoint, replay

    return {
        "accumulated": (TorchTrainEngine, "accumulate", lambda args, kwargs, result: args[0].version.step + 1),
        "applied": (TorchTrainEngine, "apply", lambda args, kwargs, result: result.version.step),
        "acknowledged": (LocalQueue, "acknowledge", lambda args, kwargs, result: kwargs.get("step", 0)),
        "drafted": (TorchTrainEngine, "save", lambda args, kwargs, result: args[0].version.step),
        "published": (checkpoint, "publish", lambda args, kwargs, result: int(result.name[-6:])),
        "saved": (LocalQueue, "note_checkpoint", lambda args, kwargs, result: args[1]),
        "thinned": (session, "thin_out", lambda args, kwargs, result: args[1]),
        "exported": (TorchTrainEngine, "export_weights", lambda args, kwargs, result: args[0].version.step),
        "live": (LocalQueue, "advance", lambda args, kwargs, result: args[1].step),
        "replayed": (replay, "replay_step", lambda args, kwargs, result: result.version.step),
    }


def kill(victim: str) -> None:
    """SIGKILL for this process, or for its rollout process."""
    pid = os.getpid()
    if victim == "rollout":
        [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        pid = int(child)
    os.kill(pid, signal.SIGKILL)


def doom(phase: str, number: int, victim: str) -> None:
    """Make the phase deadly."""
    owner, name, version_of = phase_calls()[phase]
    call: Callable[..., Any] = getattr(owner, name)

    def passed(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        if version_of(args, kwargs, result) == number:
            kill(victim)
        return result

    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return passed(args, kwargs, await call(*args, **kwargs))

    def called(*args: Any, **kwargs: Any) -> Any:
        return passed(args, kwargs, call(*args, **kwargs))

    setattr(owner, name, awaited if inspect.iscoroutinefunction(call) else called)


def main() -> int:
    """Arm the phase and be `asyncflow`."""
    from asyncflow.cli.main import main as asyncflow

    if sys.argv[1]:
        phase, number, victim = sys.argv[1].split()
        doom(phase, int(number), victim)
    return asyncflow(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
