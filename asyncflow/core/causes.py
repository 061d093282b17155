"""The error behind an error: what a task group or a chain of raises began with."""

from __future__ import annotations

from asyncflow.core.errors import RolloutError


def first_cause(error: BaseException) -> BaseException:
    """The first error inside (nested) exception groups; the error itself where there is no group.

    A broken run outranks a failed rollout that was reported beside it.

    >>> first_cause(ExceptionGroup("two", [RolloutError("a"), OSError("b")]))
    OSError('b')
    """
    if not isinstance(error, BaseExceptionGroup):
        return error
    return min((first_cause(leaf) for leaf in error.exceptions), key=lambda leaf: isinstance(leaf, RolloutError))
