"""The table of predictions cut off at any byte, in any number of parts, in every step: it ends with the same bytes."""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from protopush.errors import InputError
from protopush.predict.prediction import shown
from protopush.predict.resumable_csv import ResumableCsv


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def csv_bytes(rows: Iterable[Sequence[str]]) -> bytes:
    """Rows as RFC 4180 has them, in UTF-8."""
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8")


def growing(out: Path, count: int = 7, size: int = 2) -> tuple[ResumableCsv, list[list[str]]]:
    """A table of nasty names, and its rows."""
    names = [f'{i} "quoted", in\r\nlines\n{i}\udcff'[: 12 + 9 * (i % 4)] for i in range(count)]
    rows = [[shown(name), f"value {i}"] for i, name in enumerate(names)]
    return ResumableCsv(out, ["file", "value"], count, size, {"weights": "w"}), rows


def write(table: ResumableCsv, rows: list[list[str]], processes: int = 1, batches: int | None = None) -> int:
    """What the processes write of what is missing, each at most so many batches; how many rows."""
    written = 0
    _, missing = table.open()
    for process in range(processes):
        for batch in missing[process::processes][:batches]:
            part = [rows[row] for row in table.rows_of(batch)]
            table.append(process, batch, part)
            written += len(part)
    return written


def test_a_part_cut_off_at_any_byte_is_finished_to_the_same_bytes(tmp_path):
    out = tmp_path / "t.csv"
    table, rows = growing(out)
    table.start({"kept": 1})
    assert write(table, rows) == 7
    part = table.part(0).read_bytes()
    starts = [at for at in range(len(part)) if part.startswith(b"\n[", at)]
    ends = [*starts[1:], len(part)]
    assert len(ends) == 4
    for cut in range(len(part) + 1):
        table.start({"kept": 1})
        table.part(0).write_bytes(part[:cut])
        whole = sum(end <= cut for end in ends)  # batches
        assert table.open() == ({"kept": 1}, [0, 1, 2, 3][whole:])
        assert write(table, rows) == 7 - min(2 * whole, 7), cut
        table.finish()
        assert out.read_bytes() == csv_bytes([table.header, *rows])
        assert left(tmp_path) == {"t.csv"}
        out.unlink()


@pytest.mark.parametrize("damage", [
    bytes(50), b"\xff\xfe\r\n", b'\n[9, [["one", "more"]]]', b'\n[0, [["a", "b"]]]', b"\n[-1, []]", b"\n[0, 5]", b"\n5",
    b"\n{}", b'\n[1, [["a"], ["b", "c"]]]', b'\n["0", []]', b'\n[0.0, [["a", "b"], ["a", "b"]]]', b"\na,b\r\n",
    b"\n" + b"[" * 10**6,
])  # fmt: skip
@pytest.mark.parametrize("place", ["first", "last"])
def test_what_a_power_cut_may_leave_counts_as_nothing(tmp_path, damage, place):
    table, rows = growing(tmp_path / "t.csv")
    table.start({})
    write(table, rows, batches=3)
    part = table.part(0).read_bytes()
    table.part(0).write_bytes(damage + part if place == "first" else part + damage)
    assert write(table, rows) in (1, 3)  # a line that the damage sticks to is written again
    table.finish()
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])


@pytest.mark.parametrize("seed", range(8))
def test_any_number_of_processes_cut_off_any_number_of_times(tmp_path, seed):
    chance = random.Random(seed)
    table, rows = growing(tmp_path / "t.csv", count=chance.randint(1, 60), size=chance.randint(1, 4))
    table.start({})
    written = 0
    for _ in range(4):
        written += write(table, rows, chance.randint(1, 5), chance.randint(0, 3))
        for part in tmp_path.glob(".t.csv.part-*"):
            if chance.random() < 0.3:  # half a row
                with part.open("ab") as file:
                    file.write(b'\n[3, [["half')
    written += write(table, rows, chance.randint(1, 5))
    assert written == len(rows)  # nothing twice
    table.finish()
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])
    assert left(tmp_path) == {"t.csv"}


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("moment", ["merging", "merged", "in place", "cleaning", "cleaned in part"])
def test_cut_off_in_the_last_step(tmp_path, monkeypatch, processes, moment):
    table, rows = growing(tmp_path / "t.csv")
    table.start({"kept": 2})
    write(table, rows, processes)
    owner, name, before = {
        "merging": (os, "fsync", 0), "merged": (Path, "replace", 0), "in place": (Path, "replace", 1),
        "cleaning": (Path, "unlink", 1), "cleaned in part": (Path, "unlink", 2),
    }[moment]  # fmt: skip
    original, calls = getattr(owner, name), iter(range(100))

    def cut(*args, **options):
        if next(calls) >= before:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, name, cut)
    with pytest.raises(KeyboardInterrupt):
        table.finish()
    monkeypatch.undo()
    assert table.open() == ({"kept": 2}, [])  # nothing is computed again
    table.finish()
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])
    assert {name for name in left(tmp_path) if not name.endswith(".tmp")} == {"t.csv"}


def test_rows_that_are_gone_or_there_twice(tmp_path):
    table, rows = growing(tmp_path / "t.csv")
    table.start({})
    write(table, rows, 3)
    shutil.copy(table.part(1), table.part(7))  # two that wrote at once, where nothing could be locked
    table.part(0).unlink()
    with pytest.raises(InputError, match="are gone"):
        table.finish()
    assert write(table, rows) == 3
    table.finish()
    assert table.out.read_bytes() == csv_bytes([table.header, *rows])


def test_a_killed_process_lets_go_although_its_children_live(tmp_path):
    """As readers of images do, which find out only seconds later."""
    script = (
        "import os, sys, time; from pathlib import Path; from protopush.predict.resumable_csv import alone\n"
        "with alone(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: time.sleep(3); os._exit(0)\n"
        "    print(child, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", script, str(tmp_path / "t.csv")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as first:
        int(first.stdout.readline())
        first.send_signal(signal.SIGKILL)
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as second:
            child = int(second.stdout.readline())
            second.kill()
    os.kill(child, signal.SIGKILL)
