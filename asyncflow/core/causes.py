"""The error behind an error: what a task group or a chain of raises began with."""

from __future__ import annotations


def first_cause(error: BaseException) -> BaseException:
    """The first error inside (nested) exception groups; the error itself where there is no group.

    >>> first_cause(ExceptionGroup("two", [ValueError("a"), OSError("b")]))
    ValueError('a')
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
