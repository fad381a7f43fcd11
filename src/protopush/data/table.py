"""Tables as people save them: any usual separator and encoding, headers as they come, files by what they are called.

What has one meaning only is read; anything else is refused in one line that says what is odd.
"""

from __future__ import annotations

import codecs
import csv
import logging
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from protopush.data.shards import is_file as _is_file
from protopush.data.walk import extensions, walk_images
from protopush.errors import InputError, did_you_mean, listing

logger = logging.getLogger("protopush.data")

SEPARATORS = (",", ";", "\t")
ABOVE = 10  # rows that may stand above the header: a title, notes, names of groups of columns
SAID = re.compile('"?sep=(.?)"?', re.IGNORECASE)
EXCEL = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
ByName = tuple[Mapping[str, Sequence[Path]], Mapping[str, Sequence[Path]]]
# Letters of Windows-1252 beyond ASCII. In other encodings their bytes come in longer runs (Cyrillic, Chinese), or among
# bytes that are no letters here.
WESTERN = re.compile("[À-ÖØ-öø-ÿŒœŠšŽžŸ’]{1,2}")


class Table:
    """A table, read row by row: separated by commas, semicolons or tabs, in UTF-8, UTF-16 or Windows-1252.

    Args:
        path: of the file.
        required: columns, known by their name in whatever case, with ``_``, ``-`` or blanks between words.
        expected: what the file should be, for the messages.
        optional: other columns that are known in the same way.

    Attributes:
        columns: as ``required`` and ``optional`` have them, others as they are.

    Raises:
        InputError: the file is missing, not what is ``expected``, or lacks a required column.
    """

    def __init__(self, path: Path, required: Sequence[str], expected: str, optional: Sequence[str] = ()) -> None:
        self.path, self.expected = path, expected
        if not _is_file(path):
            raise InputError(f"no such file: {path}; expected {expected}")
        self._encoding = _encoding_of(path, expected)
        tops = {separator: self._top(separator) for separator in self._separators()}
        known, found = (*required, *optional), list[tuple[int, str, int]]()
        for separator, top in tops.items():
            columns = ((_columns(record, known), number) for number, (_, record) in enumerate(top))
            at = next((number for names, number in columns if set(required) <= set(names)), None)
            if at is not None:
                found.append((len(top[at][1]), separator, at))
        if not found:
            next(self._records(next(iter(tops))), None)  # it may be no CSV file at all
            heads = [top[0][1] for top in tops.values() if top]
            require_columns(path, _columns(max(heads, key=len, default=[]), known), required)
        _, self._separator, self._above = max(found, key=lambda one: one[0])  # the first of equals
        above = [" ".join(record) for _, record in tops[self._separator][: self._above]]
        if above := [line for line in above if not SAID.fullmatch(line.strip())]:
            logger.warning("%s: left out above the header: %s", path, listing(above, 2))
        self._header = tops[self._separator][self._above][1]
        self.columns = _columns(self._header, known)
        if twice := [name for name in known if self.columns.count(name) > 1]:
            names = [head.strip() for head, name in zip(self._header, self.columns, strict=True) if name == twice[0]]
            raise InputError(f"{path} has several columns {twice[0]!r} ({listing(names)}); rename all but one")

    def rows(self, filled: Sequence[str] = ()) -> Iterator[dict[str, str]]:
        """The rows by column, without the blanks around a value; those that are empty are passed over.

        Args:
            filled: columns in which each row must have a value.

        Raises:
            InputError: there are no rows, one has more values than columns, or values are missing.
        """
        empty, lacking, found = list[int](), set[str](), False
        for line, record in islice(self._records(self._separator), self._above + 1, None):
            values = [value.strip() for value in record]
            if not any(values) or record == self._header:  # tables that were joined have their headers in between
                continue
            if any(values[len(self.columns) :]):
                raise InputError(
                    f"{self.path}, line {line} has {len(values)} values for {len(self.columns)} columns; expected one "
                    f"each; put quotes around a value that holds a {self._separator!r}"
                )
            values += [""] * (len(self.columns) - len(values))
            row, found = {name: value for name, value in zip(self.columns, values, strict=False) if name}, True
            if all(row[name] for name in filled):
                yield row
            else:
                empty.append(line)
                lacking.update(name for name in filled if not row[name])
        if not found:
            raise InputError(f"{self.path} has no rows; expected one line per image")
        if empty:
            words = " or no ".join(name for name in filled if name in lacking)
            raise InputError(f"{self.path}: no {words} in lines {listing(empty)}; fill them in or remove them")

    def _records(self, separator: str) -> Iterator[tuple[int, list[str]]]:
        """Each record with the number of its last line."""
        try:
            with self.path.open(newline="", encoding=self._encoding) as file:
                reader = csv.reader(file, delimiter=separator, skipinitialspace=True, strict=True)
                for record in reader:
                    if record:
                        yield reader.line_num, record
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError(f"not a CSV file: {self.path} ({error}); expected {self.expected}, in UTF-8") from error

    def _separators(self) -> Sequence[str]:
        """That of a first line ``sep=;``, as Excel has it, or all that are usual."""
        with self.path.open(encoding=self._encoding, errors="replace") as file:
            said = SAID.fullmatch(file.readline(100).strip(" \r\n"))
        return said[1] if said and said[1] else SEPARATORS

    def _top(self, separator: str) -> list[tuple[int, list[str]]]:
        top = []
        with suppress(InputError):  # of another separator, or below the header: then the rows say so
            for record in islice(self._records(separator), ABOVE):
                top.append(record)  # noqa: PERF402 - what came before an error counts
        return top


def read_table(
    path: Path, required: Sequence[str], expected: str, optional: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The rows of a :class:`Table`, all at once, with a value in each required column."""
    return list(Table(path, required, expected, optional).rows(required))


def require_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Refuse a table in an InputError that names the column that lacks, and the one that was probably meant."""
    for column in required:
        if column not in columns:
            hint = did_you_mean(column, columns, "", cutoff=0.5)
            known = f"{listing(columns) or 'nothing'}{hint and f'; {hint} rename it'}"
            raise InputError(f"{path} has no column {column!r}; it has: {known}")


def is_one(value: str) -> bool | None:
    """Whether a class of a table with a column for each is the image's; None: the value is neither 0 nor 1."""
    try:
        return {0.0: False, 1.0: True}.get(float(value))
    except ValueError:
        return None


def labelled(rows: Iterable[dict[str, str]], classes: Sequence[str], path: Path) -> Iterator[dict[str, str]]:
    """The rows with a ``label``: the one of the columns ``classes`` that is 1.

    Raises:
        InputError: a value is neither 0 nor 1, or rows have none or several ones; these are named.
    """
    wrong = []
    for row in rows:
        ones = {name: is_one(row[name]) for name in classes}
        if None in ones.values():
            value = next(row[name] for name, one in ones.items() if one is None)
            raise InputError(f"{path} has the value {value!r}; expected 0.0 or 1.0 for each class")
        if sum(map(bool, ones.values())) == 1:
            yield row | {"label": next(name for name, one in ones.items() if one)}
        else:
            wrong.append(row["image"])
    if wrong:
        raise InputError(
            f"{path}: not exactly one class in the rows of {listing(wrong)}; expected one 1.0, and 0.0 for the others"
        )


def plain(text: str) -> str:
    """A name as it is compared: composed (see :func:`composed`) and without blanks around it."""
    return composed(text).strip()


def composed(text: str) -> str:
    """Text with each letter as one sign (NFC), where others have a letter and an accent (NFD, as macOS writes names).

    Example:
        >>> composed("Na\u0308vus") == "N\u00e4vus"
        True
    """
    return unicodedata.normalize("NFC", text)


class NamedFiles:
    """Files that a table names, relative to its folder.

    Backslashes are slashes. Where there is no such file, it is the one of the same letters in another Unicode form, or
    with an image's ending after the name; of a name without folders, anywhere below. It must be one file alone.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._near = root, "" if root == Path() else str(root)
        self._known: dict[Path, ByName] = {}
        self._below: ByName | None = None

    def find(self, name: str) -> str:
        """The file; where there is none, the path where it was expected.

        Raises:
            InputError: there are several.
        """
        near = os.path.join(self._near, name)  # noqa: PTH118 - a million of them
        if _is_file(near):
            return near
        path = self.root / name.replace("\\", "/")
        if "\\" in name and _is_file(path):
            return str(path)
        folder = self._folder(path.parent)
        found = _called(path.name, self._in(folder)) if folder else []
        if not found and path.parent == self.root:
            self._below = self._below or _by_name(map(Path, walk_images(self.root)))
            found = _called(path.name, self._below)
        if len(found) > 1:
            places = [os.path.relpath(file, self.root) for file in found]
            raise InputError(f"{name!r} may be any of: {listing(places, 3)}; expected one; name it with its folder")
        return str(found[0] if found else path)

    def _folder(self, path: Path) -> Path | None:
        if os.path.isdir(path) or path.parent == path:  # noqa: PTH112 - as in _is_file
            return path
        above = self._folder(path.parent)
        named = [one for one in self._in(above)[0].get(plain(path.name), ()) if one.is_dir()] if above else []
        return named[0] if len(named) == 1 else None

    def _in(self, folder: Path) -> ByName:
        if folder not in self._known:
            self._known[folder] = _by_name(sorted(folder.iterdir()))
        return self._known[folder]


def _by_name(files: Iterable[Path]) -> ByName:
    """Paths by their name, and images by their name without the ending."""
    whole, without = defaultdict[str, list[Path]](list), defaultdict[str, list[Path]](list)
    for file in files:
        whole[plain(file.name)].append(file)
        if file.suffix.lower() in extensions():
            without[plain(file.stem)].append(file)
    return whole, without


def _called(name: str, files: ByName) -> list[Path]:
    whole, without = files
    return list(filter(_is_file, whole.get(plain(name), ()))) or list(without.get(plain(name), ()))


def spreadsheet_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: with an apostrophe before it where one would.

    Example:
        >>> spreadsheet_cell("=1+1"), spreadsheet_cell("nevus"), cell_text(spreadsheet_cell("=1+1"))
        ("'=1+1", 'nevus', '=1+1')
    """
    return f"'{text}" if _computed(text) else text


def cell_text(cell: str) -> str:
    """What :func:`spreadsheet_cell` was given."""
    return cell[1:] if cell.startswith("'") and _computed(cell) else cell


def _computed(text: str) -> bool:
    """Whether it begins, after apostrophes and blanks, as a formula does."""
    return text.lstrip("'").lstrip()[:1] in ("=", "+", "-", "@") or text.lstrip("'")[:1] in ("\t", "\r")


def _columns(header: Sequence[str], known: Collection[str]) -> list[str]:
    folded = {_folded(name): name for name in known}
    return [folded.get(_folded(name), name.strip()) for name in header]


def _folded(name: str) -> str:
    return "_".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _encoding_of(path: Path, expected: str) -> str:
    """UTF-16 by its first bytes, UTF-8 where all of the file is, Windows-1252 where that is beyond doubt."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as file:
        start = file.read(4)
        if start in EXCEL:
            raise InputError(f"{path} is an Excel file; expected {expected}; save it as 'CSV UTF-8'")
        if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return "utf-16"
        if b"\0" in start[:2]:
            return "utf-16-le" if start[0] else "utf-16-be"
        file.seek(0)
        try:
            while block := file.read(1 << 20):
                decoder.decode(block)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return _western(path, expected)
    return "utf-8-sig"


def _western(path: Path, expected: str) -> str:
    data = path.read_bytes()
    text = data.decode("cp1252", "replace")
    runs = list(re.finditer(r"[^\x00-\x7f]+", text))
    for run in runs:
        around = text[max(run.start() - 1, 0) : run.start()] + text[run.end() : run.end() + 1]
        if not WESTERN.fullmatch(run[0]) or not re.search("[A-Za-z]", around):
            line = text.count("\n", 0, run.start()) + 1
            raise InputError(
                f"{path} is not UTF-8, and it is not known what else (line {line}: {data[run.start() : run.end()]!r}); "
                f"expected {expected}, in UTF-8; in Excel, save it as 'CSV UTF-8'"
            )
    first = text[text.rfind("\n", 0, runs[0].start()) + 1 :].splitlines()[0].strip()
    logger.warning("%s is not UTF-8: it is read as Windows-1252, such as %r", path, first)
    return "cp1252"
