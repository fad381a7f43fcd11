"""Errors that a user can act on, and the ranges of numbers outside of which they are raised."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import inf
from typing import Annotated, Literal, get_args, get_origin, get_type_hints


class InputError(ValueError):
    """Bad input: the message is one line that says the fact, what was expected and what to do.

    The command line prints it without a traceback and exits with 2.

    Example:
        >>> raise InputError("no such file: a.csv; expected a manifest with the columns image,label")
        Traceback (most recent call last):
        protopush.errors.InputError: no such file: a.csv; expected a manifest with the columns image,label
    """

    def __str__(self) -> str:
        """The message alone: PyTorch puts the traceback of a process that reads images into what it raises again."""
        text = super().__str__()
        _, found, message = text.rpartition("InputError: ")
        return message.strip() if found and text.startswith("Caught ") else text


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


def did_you_mean(word: str, known: Iterable[str], otherwise: str, cutoff: float = 0.6) -> str:
    """The known word that is most like one that isn't known, as a question; ``otherwise`` where none is like it.

    Example:
        >>> did_you_mean("tran", ["train", "push"], "expected a command"), did_you_mean("x", ["push"], "expected push")
        ("did you mean 'train'?", 'expected push')
    """
    near = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {near[0]!r}?" if near else otherwise


def first_line(cause: BaseException) -> str:
    """What an error says, cut to one line."""
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``; with ``open``, the ends don't belong to it.

    Example:
        >>> 0.5 in Range(0, 1), float("nan") in Range(0, 1), str(Range(1))
        (True, False, 'at least 1')
    """

    least: float
    most: float = inf
    open: bool = False

    def __contains__(self, number: float) -> bool:
        return self.least < number < self.most if self.open else self.least <= number <= self.most

    def __str__(self) -> str:
        if self.most == inf:
            return f"more than {self.least:g}" if self.open else f"at least {self.least:g}"
        return f"{self.least:g} to {self.most:g}" + (", both excluded" if self.open else "")


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
PositiveOrZero = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
OpenShare = Annotated[float, Range(0, 1, open=True)]
Cosine = Annotated[float, Range(-1, 1)]


def check_fields(config: object, prefix: str = "") -> None:
    """Refuse a dataclass with a number outside its field's :class:`Range`, or a word that is none of its ``Literal``.

    Raises:
        InputError: the field, its value and what was expected.

    Example:
        >>> @dataclass
        ... class Options:
        ...     steps: Annotated[int, Range(1)] = 0
        >>> check_fields(Options(), "train.")
        Traceback (most recent call last):
        protopush.errors.InputError: train.steps is 0; expected at least 1
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise InputError(f"{prefix}{name} is {value!r}; expected one of: {listing(get_args(hint))}")
        for kind in (hint, *get_args(hint)):  # a range may be that of an optional number
            for limit in getattr(kind, "__metadata__", ()):
                if any(one not in limit for one in (value if isinstance(value, list) else [value]) if one is not None):
                    raise InputError(f"{prefix}{name} is {value}; expected {limit}")
