"""Tables as people save them: CSV or tab-separated, with or without a byte order mark, blanks around the values."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from protopush.errors import InputError, listing


def read_table(path: Path, required: Sequence[str], expected: str) -> list[dict[str, str]]:
    """The rows of a table; the separator is a tab where the first line has one, else a comma.

    Args:
        path: the file, in UTF-8.
        required: columns that it must have.
        expected: what the file should be, for the message where it is not.

    Raises:
        InputError: the file is missing, no table, empty, or lacks a column.
    """
    return list(rows_of(path, required, expected))


def rows_of(path: Path, required: Sequence[str], expected: str) -> Iterator[dict[str, str]]:
    """The same row by row, for tables of any length; what is wrong is raised where it is met."""
    if not path.is_file():
        raise InputError(f"no such file: {path}; expected {expected}")
    row = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            require_columns(path, columns, required)
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if key}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV file: {path} ({error}); expected {expected}, in UTF-8") from error
    if row is None:
        raise InputError(f"{path} has no rows; expected one line per image")


def require_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Name the column that lacks, and the one that was probably meant.

    Raises:
        InputError: a column lacks.
    """
    for column in required:
        if column not in columns:
            near = get_close_matches(column, columns, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}? rename it" if near else ""
            raise InputError(f"{path} has no column {column!r}; it has: {listing(columns) or 'nothing'}{hint}")


def numbering(labels: Iterable[str], classes: Sequence[str] | None, path: Path) -> dict[str, int]:
    """The label of each class name: its place in ``classes``, or among the sorted names where no model fixes them.

    Raises:
        InputError: a name that the model doesn't know.

    Example:
        >>> numbering(["nv", "mel", "nv"], None, Path("table.csv"))
        {'mel': 0, 'nv': 1}
    """
    found = sorted(set(labels))
    names = list(classes) if classes is not None else found
    unknown = [name for name in found if name not in names]
    if unknown:
        raise InputError(f"unknown labels in {path}: {listing(unknown)}; the model knows: {listing(names)}")
    return {name: number for number, name in enumerate(names)}
