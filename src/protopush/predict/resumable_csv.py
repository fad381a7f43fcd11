"""Resumable CSV: each process appends whole batches of rows to a part of its own, and the parts make the table.

Beside ``table.csv`` lie ``.table.csv.belongs.json``, what the rows belong to, and ``.table.csv.part-N``, the batches of
process N, a line of JSON each. The invariant: a batch is finished if and only if a line with all of it can be parsed. A
line that was cut off never can be, so that after a kill nothing has to be repaired.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from protopush.data.files import read_json, write_json
from protopush.errors import InputError

FORMAT = 1
PATIENCE = 6.0  # seconds: readers of images that a killed process has forked end within five, and hold its lock so long


@dataclass(frozen=True)
class ResumableCsv:
    """A table that is being written.

    Attributes:
        out: its final place.
        header: its columns.
        count: its rows.
        size: rows of a batch; the last batch may have fewer.
        belongs: what decides the rows; rows that belong to anything else are refused.
    """

    out: Path
    header: Sequence[str]
    count: int
    size: int
    belongs: Mapping[str, Any]

    def rows_of(self, batch: int) -> range:
        """The rows of a batch, counted from 0."""
        return range(self.count)[batch * self.size : (batch + 1) * self.size]

    def open(self, overwrite: bool = False) -> tuple[dict[str, Any] | None, list[int]]:
        """What :meth:`start` kept, None where nothing is there and the place is free; and the batches still to write.

        Raises:
            InputError: the place is taken, or what is there belongs to something else.
        """
        if overwrite:
            self._remove_side_and_parts()
        elif self._side.is_file():
            return self._resumed()
        elif self._parts():
            raise InputError(
                f"{self.out} was started, but {self._side.name}, which says with what, is gone; expected both; add "
                "--overwrite to start again"
            )
        elif self.out.exists():
            raise InputError(f"{self.out} exists already; choose another --out, or add --overwrite to replace it")
        return None, list(self._batches)

    def _resumed(self) -> tuple[dict[str, Any], list[int]]:
        try:
            values = read_json(self._side)
            if values["format"] != FORMAT:
                raise ValueError(values["format"])
            before, kept = dict(values["belongs"]), dict(values["kept"])
        except (InputError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"damaged file: {self._side}; add --overwrite to start {self.out} again") from error
        for what, value in self.belongs.items():
            if before.get(what) != value:
                raise InputError(
                    f"{self.out} was started with other {what}: {before.get(what)}, and now {value}; expected the "
                    "same, or --overwrite to start again"
                )
        if values.get("in_place"):
            self._remove_side_and_parts()
            return kept, []
        finished = self._finished()
        return kept, [batch for batch in self._batches if batch not in finished]

    def start(self, kept: Mapping[str, Any]) -> None:
        """Keep what the rows belong to, and what else one must know to go on; rows may follow."""
        write_json(self._side, {"format": FORMAT, "belongs": dict(self.belongs), "kept": dict(kept)})

    def append(self, process: int, batch: int, rows: Iterable[Sequence[str]]) -> None:
        """Add a batch to the part of a process; it survives a kill from when this returns."""
        line = json.dumps([batch, list(rows)])
        with writing(self.out), self.part(process).open("a", encoding="utf-8") as file:
            file.write("\n" + line)  # the break comes first: it also ends a line that was cut off

    def finish(self) -> None:
        """Make the table of the parts, unless it is in its place already. Any step may be cut off and done again.

        Raises:
            InputError: rows are gone, or the disk is full.
        """
        if not self._side.is_file():
            return
        finished, whole = self._finished(), self._beside("whole")
        if len(finished) < len(self._batches):
            raise InputError(f"rows of {self.out} are gone; expected what was written; the same words write them again")
        with writing(self.out):
            with whole.open("w", newline="", encoding="utf-8") as file:
                table = csv.writer(file)
                table.writerow(self.header)
                for batch in self._batches:
                    part, start = finished[batch]
                    with part.open("rb") as lines:
                        lines.seek(start)
                        table.writerows(json.loads(lines.readline())[1])
                file.flush()
                os.fsync(file.fileno())  # a power cut after the rename must find a whole file
            whole.replace(self.out)
        write_json(self._side, read_json(self._side) | {"in_place": True})
        self._remove_side_and_parts()

    def _finished(self) -> dict[int, tuple[Path, int]]:
        """Where each finished batch lies: its part, and the byte at which its line begins."""
        found: dict[int, tuple[Path, int]] = {}
        for part in self._parts():
            with writing(self.out), part.open("rb") as lines:
                start = 0
                for line in lines:
                    if (batch := self._parsed(line)) is not None:
                        found[batch] = part, start
                    start += len(line)
        return found

    def _parsed(self, line: bytes) -> int | None:
        """The batch of a line; None where it isn't whole, or holds what a power cut has left."""
        try:
            batch, rows = json.loads(line)
            expected = [len(self.header)] * len(self.rows_of(batch))
            return batch if batch in self._batches and [len(row) for row in rows] == expected else None
        except (TypeError, ValueError, RecursionError):
            return None

    def part(self, process: int) -> Path:
        """The file of the batches of a process."""
        return self._beside(f"part-{process}")

    @property
    def _batches(self) -> range:
        return range(-(-self.count // self.size))

    @property
    def _side(self) -> Path:
        return self._beside("belongs.json")

    def _beside(self, what: str) -> Path:
        return self.out.with_name(f".{self.out.name}.{what}")

    def _parts(self) -> list[Path]:
        prefix = self._beside("part-").name  # no glob: the table's name may hold a * or a [
        return [path for path in self.out.parent.iterdir() if path.name.startswith(prefix)]

    def _remove_side_and_parts(self) -> None:
        """The side file last: as long as it is there, the rest is known to be left over."""
        with writing(self.out):
            for file in (*self._parts(), self._beside("whole"), self._side):
                file.unlink(missing_ok=True)


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
    file = out.with_name(f".{out.name}.lock")
    lock = FileLock(file)
    if out.is_dir():
        raise InputError(f"--out {out} is a folder; expected the CSV file to write")
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout as error:
            raise InputError(f"another process is writing {out}; wait for it, or choose another --out") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()
