"""The table while it grows: rows in parts beside it, whose whole rows count after a kill at any moment.

Beside ``table.csv`` lie ``.table.csv.belongs.json``, what the rows belong to, and ``.table.csv.part-N``, the rows from
batch N on; part 0 begins with the header. Each process appends to parts of its own. When all batches are there, the
parts become one file, it takes the name ``table.csv``, and what lay beside it is removed.
"""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from protopush.data.files import read_json, write_json
from protopush.errors import InputError
from protopush.predict.inputs import Strings
from protopush.predict.prediction_rows import shown

FORMAT = 1


class Span(NamedTuple):
    """Batches ``first`` to ``last``, the latter not included, of the part that begins with batch ``part``."""

    part: int
    first: int
    last: int


class Begun(NamedTuple):
    """A table that was begun before: what was kept for going on, and whether only its last step is left."""

    kept: dict[str, Any]
    whole: bool


@dataclass(frozen=True)
class Growing:
    """A table that is being written.

    Attributes:
        out: its final place.
        header: its columns.
        names: a file for each row.
        size: rows of a batch; the last batch may have fewer.
        belongs: what decides the rows; rows that belong to anything else are refused.
    """

    out: Path
    header: Sequence[str]
    names: Strings
    size: int
    belongs: Mapping[str, Any]

    @property
    def batches(self) -> int:
        """How many there are in all."""
        return -(-len(self.names) // self.size)

    def part(self, batch: int) -> Path:
        """The file of the rows from a batch on."""
        return self._beside(f"part-{batch}")

    def open(self, overwrite: bool = False) -> Begun | None:
        """What is there of the table; None where nothing is, and the place is free.

        Raises:
            InputError: the place is taken, or what was begun there belongs to something else.
        """
        side = self._beside("belongs.json")
        if overwrite:
            with writing(self.out):
                for file in (side, *self._parts().values(), self._beside("whole")):
                    file.unlink(missing_ok=True)
            return None
        if side.is_file():
            return self._begun(side)
        if self._parts():
            raise InputError(
                f"{self.out} was begun, but {side.name}, which tells with what, is gone; expected both; add "
                "--overwrite to begin anew"
            )
        if self.out.exists():
            raise InputError(f"{self.out} exists already; choose another --out, or add --overwrite to replace it")
        return None

    def _begun(self, side: Path) -> Begun:
        try:
            values = read_json(side)
            if values["format"] != FORMAT:
                raise ValueError(values["format"])
            before, begun = dict(values["belongs"]), Begun(dict(values["kept"]), "merged" in values)
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"damaged file: {side}; add --overwrite to begin {self.out} anew") from error
        for what, value in self.belongs.items():
            if before.get(what) != value:
                raise InputError(
                    f"{self.out} was begun with other {what}: {before.get(what)}, and now {value}; expected the same, "
                    "or --overwrite to begin anew"
                )
        if begun.whole:
            self._take_place(values["merged"])
        return begun

    def begin(self, kept: Mapping[str, Any]) -> None:
        """Keep what the rows belong to, and whatever else one must know to go on; rows may follow."""
        self._write_side(kept)

    def plan(self, processes: int) -> list[list[Span]]:
        """The batches that are not there yet, for each process a consecutive share, each span in a part to append to.

        What follows the last whole batch of a part is cut off first.
        """
        done = self.done()
        last = [0, *(span.last for span in done)]
        gaps = zip(last, [*(span.first for span in done), self.batches], strict=True)
        part = {span.last: span.part for span in done}
        missing = [(first, to) for first, to in gaps if first < to]
        count, shares = sum(to - first for first, to in missing), list[list[Span]]()
        for process in range(processes):
            start, end = (count * number // processes for number in (process, process + 1))
            share, before = list[Span](), 0
            for first, to in missing:
                here, there = max(first, first + start - before), min(to, first + end - before)
                if here < there:
                    share.append(Span(part.get(here, here), here, there))
                before += to - first
            shares.append(share)
        return shares

    def done(self) -> list[Span]:
        """The batches that are there, in order, after what follows the last whole batch of each part was cut off."""
        with writing(self.out):
            spans = [self._cut(first, file) for first, file in sorted((self._parts() | {0: self.part(0)}).items())]
        for one, other in pairwise(spans):
            if other.first < one.last:
                raise InputError(f"the parts of {self.out} overlap; add --overwrite to begin anew")
        return [span for span in spans if span.first < span.last]

    def _cut(self, first: int, file: Path) -> Span:
        """Leave the whole batches of a part: its rows must be those of the files that are to be there."""
        rows = read_rows(file) if file.is_file() else iter(())
        row, keep, batches = first * self.size, 0, 0
        if first == 0:
            header, keep = next(rows, ([], 0))
            if header != list(self.header):
                file.write_bytes(csv_bytes([self.header]))
                return Span(0, 0, 0)
        for values, end in rows:
            if row == len(self.names) or len(values) != len(self.header) or values[0] != shown(self.names[row]):
                break
            row += 1
            if row % self.size == 0 or row == len(self.names):
                keep, batches = end, batches + 1
        os.truncate(file, keep) if keep else file.unlink()
        return Span(first, first, first + batches)

    @contextmanager
    def appending(self, span: Span) -> Iterator[Callable[[Iterable[Sequence[str]]], None]]:
        """A function that appends rows; they survive a kill from when it returns."""
        with writing(self.out):
            file = self.part(span.part).open("ab", buffering=0)

        def append(rows: Iterable[Sequence[str]]) -> None:
            with writing(self.out):
                rest = memoryview(csv_bytes(rows))
                while rest:  # unbuffered, a full disk takes a part of it before it refuses
                    rest = rest[file.write(rest) :]

        with file:
            yield append

    def finish(self, kept: Mapping[str, Any]) -> None:
        """Make one file of the parts, and give it its name.

        Raises:
            InputError: rows lack, or the disk is full.
        """
        done = self.done()
        ends = [0, *(span.last for span in done)]
        if ends != [*(span.first for span in done), self.batches]:
            raise InputError(f"rows of {self.out} are gone; expected what was written; the same words write them again")
        merged = len(done) > 1
        with writing(self.out):
            whole = self._beside("whole") if merged else self.part(0)
            with whole.open("wb" if merged else "rb+") as file:
                for span in done if merged else ():
                    with self.part(span.part).open("rb") as part:
                        shutil.copyfileobj(part, file)
                file.flush()
                os.fsync(file.fileno())  # a power cut after the rename must find a whole file
        self._write_side(kept, merged=merged)
        self._take_place(merged)

    def _take_place(self, merged: bool) -> None:
        """The last step, which may be done twice."""
        whole = self._beside("whole") if merged else self.part(0)
        with writing(self.out):
            if whole.exists():
                whole.replace(self.out)
            for file in (*self._parts().values(), self._beside("belongs.json")):
                file.unlink(missing_ok=True)

    def _write_side(self, kept: Mapping[str, Any], **more: Any) -> None:
        values = {"format": FORMAT, "belongs": dict(self.belongs), "kept": dict(kept), **more}
        write_json(self._beside("belongs.json"), values)

    def _beside(self, what: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{what}")

    def _parts(self) -> dict[int, Path]:
        prefix = self._beside("part-").name
        found = (path for path in self.out.parent.iterdir() if path.name.startswith(prefix))
        return {int(path.name[len(prefix) :]): path for path in found if path.name[len(prefix) :].isdecimal()}


def read_rows(file: Path) -> Iterator[tuple[list[str], int]]:
    """The whole rows of a CSV file, each with the offset of its end in bytes; a row that is cut off is left out."""
    end = 0

    def lines() -> Iterator[str]:
        nonlocal end
        with file.open("rb") as opened:
            for line in opened:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield line.decode("utf-8")

    try:
        for row in csv.reader(lines(), strict=True):
            yield row, end
    except (csv.Error, UnicodeDecodeError):  # it ends within quotes, or holds what a power cut has left
        return


def csv_bytes(rows: Iterable[Sequence[str]]) -> bytes:
    """Rows as RFC 4180 has them, in UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8")


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """One line where the disk is full or the folder can't be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {out} ({error.strerror or error}); make room and start the same again, which goes on where "
            "it stopped, or choose another --out"
        ) from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Make the folder, and see that nobody else writes this table; a process that is killed lets go of it.

    Raises:
        InputError: another process writes it, it is a folder, or its folder can't be written.
    """
    lock = out.with_name(f".{out.name}.lock")
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected the CSV file to write")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("wb")
    with file:
        if not _locked(file.fileno()):
            raise InputError(f"another process is writing {out}; wait for it, or choose another --out")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _locked(file: int) -> bool:
    """Lock a file for this process alone: those that it forks (readers of images) don't hold it after a kill."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # a file system that can't lock is no reason to refuse
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
