"""The table of predictions cut off at any byte, in any number of parts, in every step: it ends with the same bytes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from protopush.errors import InputError
from protopush.predict.inputs import Strings
from protopush.predict.prediction_rows import shown
from protopush.predict.resumable_csv import Growing, csv_bytes


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def growing(out: Path, count: int = 7, size: int = 2) -> tuple[Growing, list[list[str]]]:
    """A table of nasty names, and its rows."""
    names = Strings()
    for i in range(count):
        names.append(f'{i} "quoted", in\r\nlines\n{i}\udcff'[: 12 + 9 * (i % 4)])
    rows = [[shown(names[i]), f"value {i}"] for i in range(count)]
    return Growing(out, ["file", "value"], names, size, {"weights": "w"}), rows


def write(table: Growing, rows: list[list[str]], processes: int = 1, batches: int | None = None) -> int:
    """What the processes write, each at most so many batches; how many rows."""
    written = 0
    for share in table.plan(processes):
        todo = [(span, batch) for span in share for batch in range(span.first, span.last)]
        for span in share:
            with table.appending(span) as append:
                for _, batch in [pair for pair in todo[:batches] if pair[0] is span]:
                    part = rows[batch * table.size : (batch + 1) * table.size]
                    append(part)
                    written += len(part)
    return written


def test_a_table_cut_off_at_any_byte_is_finished_to_the_same_bytes(tmp_path):
    out = tmp_path / "t.csv"
    table, rows = growing(out)
    whole = csv_bytes([table.header, *rows])
    ends = [len(csv_bytes([table.header, *rows[:n]])) for n in range(8)]
    for cut in range(len(whole) + 1):
        table.begin({"kept": 1})
        table.part(0).write_bytes(whole[:cut])
        kept, done = table.open(), sum(end <= cut for end in ends) - 1  # whole rows
        assert kept == ({"kept": 1}, False)
        done = done if done == 7 else max(done, 0) // 2 * 2  # in whole batches
        assert write(table, rows) == 7 - done, cut
        table.finish({})
        assert out.read_bytes() == whole
        assert left(tmp_path) == {"t.csv"}
        out.unlink()


def test_what_a_power_cut_may_leave_is_cut_off(tmp_path):
    table, rows = growing(tmp_path / "t.csv")
    whole = csv_bytes([table.header, *rows])
    for damage in (whole[:100] + bytes(50), whole[:60] + b"\xff\xfe\r\n", whole + b"one,more\r\n", b"a,b\r\n" + whole):
        table.begin({})
        table.part(0).write_bytes(damage)
        write(table, rows)
        table.finish({})
        assert table.out.read_bytes() == whole


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_processes_cut_off_any_number_of_times(tmp_path, seed):
    chance = random.Random(seed)
    table, rows = growing(tmp_path / "t.csv", count=chance.randint(1, 60), size=chance.randint(1, 4))
    table.begin({})
    written = 0
    for _ in range(4):
        written += write(table, rows, chance.randint(1, 5), chance.randint(0, 3))
        for part in tmp_path.glob(".t.csv.part-*"):
            if chance.random() < 0.3:  # half a row
                with part.open("ab") as file:
                    file.write(b'"half')
    written += write(table, rows, chance.randint(1, 5))
    assert written == len(rows)  # nothing twice
    table.finish({})
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])
    assert left(tmp_path) == {"t.csv"}


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("moment", ["merging", "merged", "in place", "cleaning"])
def test_cut_off_in_the_last_step(tmp_path, monkeypatch, processes, moment):
    table, rows = growing(tmp_path / "t.csv")
    table.begin({"kept": 2})
    write(table, rows, processes)
    calls = {
        "merging": (shutil, "copyfileobj"), "merged": (Path, "replace"), "in place": (Path, "replace"),
        "cleaning": (Path, "unlink"),
    }  # fmt: skip
    owner, name = calls[moment]
    original = getattr(owner, name)

    def cut(*args, **options):
        if moment == "merging":
            args[1].write(b"half")
        if moment in ("in place", "cleaning"):
            original(*args, **options)
        raise KeyboardInterrupt

    if moment in ("merging", "merged", "cleaning"):
        monkeypatch.setattr(owner, name, cut)
    else:  # the first rename puts the side file in place
        renames = iter([original, cut])
        monkeypatch.setattr(owner, name, lambda *args: next(renames)(*args))
    if processes > 1 or moment != "merging":
        with pytest.raises(KeyboardInterrupt):
            table.finish({"kept": 2})
    monkeypatch.undo()
    begun = table.open() if (tmp_path / ".t.csv.belongs.json").exists() else None
    if begun is not None and not begun.whole:
        assert write(table, rows) == 0
        table.finish({})
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])
    table.out.rename(tmp_path / "kept.csv")
    assert {name for name in left(tmp_path) if not name.endswith(".tmp")} == {"kept.csv"}


def test_begun_twice_at_once_is_refused(tmp_path):
    table, rows = growing(tmp_path / "t.csv")
    table.begin({})
    write(table, rows, 3)
    table.part(1).write_bytes(csv_bytes(rows[2:]))
    with pytest.raises(InputError, match="overlap"):
        table.done()
    shutil.copy(table.part(0), tmp_path / "other")
    for part in tmp_path.glob(".t.csv.part-*"):
        part.unlink()
    with pytest.raises(InputError, match="are gone"):
        table.finish({})
