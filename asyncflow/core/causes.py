"""The error behind an error: what a task group began with, and what the disk said."""

from __future__ import annotations

import errno
import re

from asyncflow.core.errors import RolloutError

NO_SPACE = "no space is left on the disk: free some"


def first_cause(error: BaseException) -> BaseException:
    """The first error inside (nested) exception groups; the error itself where there is no group.

    A broken run outranks a failed rollout that was reported beside it.

    >>> first_cause(ExceptionGroup("two", [RolloutError("a"), OSError("b")]))
    OSError('b')
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    return min((first_cause(leaf) for leaf in error.exceptions), key=lambda leaf: isinstance(leaf, RolloutError))


def disk_reason(error: Exception) -> str:
    """Why the disk did not take or give a file, in words; empty for errors that are not the disk's.

    Libraries written in Rust raise errors of their own, which end in the system's number.

    >>> disk_reason(OSError(28, "No space left on device"))
    'no space is left on the disk: free some'
    >>> disk_reason(RuntimeError("I/O error: No space left on device (os error 28)"))
    'no space is left on the disk: free some'
    """
    foreign = re.search(r"([^:]*) \(os error (\d+)\)", str(error))
    number = error.errno if isinstance(error, OSError) else int(foreign[2]) if foreign else None
    if number in {errno.ENOSPC, errno.EDQUOT}:
        return NO_SPACE
    if isinstance(error, OSError):
        return str(error) or type(error).__name__
    return foreign[1].strip() if foreign else ""
