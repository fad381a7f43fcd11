"""Errors that a user can act on."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Bad input: the message is one line that says the fact, what was expected and what to do.

    The command line prints it without a traceback and exits with 2.

    Example:
        >>> raise InputError("no such file: a.csv; expected a manifest with the columns image,label")
        Traceback (most recent call last):
        protopush.errors.InputError: no such file: a.csv; expected a manifest with the columns image,label
    """


class FailedElsewhere(InputError):
    """The work failed on another process, which says why in its own words."""


def listing(items: Sequence[object], limit: int = 10) -> str:
    """The items with commas between, cut after ``limit`` with a count of the rest.

    Example:
        >>> listing(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(str(item) for item in items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def first_line(cause: BaseException) -> str:
    """What an error says, cut to one line."""
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
