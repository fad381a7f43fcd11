"""Files that are either whole or not there, one at a time, and folders that change as a whole or not at all.

A file is written under a temporary name, then renamed. Files of a folder that change together lie in a folder of their
own, whose rename decides.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from protopush.errors import InputError


def default_cache_dir() -> Path:
    """``$PROTOPUSH_CACHE``, or ``protopush`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("PROTOPUSH_CACHE") or Path(base) / "protopush")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; when the block ends well, the file written there takes its place.

    Raises:
        InputError: the disk is full, or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}.tmp")  # names have an end: most often 255 bytes
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # a power cut after the rename must find a whole file
        temporary.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}); make room or choose another folder"
        ) from error
    finally:
        with suppress(NotADirectoryError):  # then the error above says so
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, then put the file in its place."""
    with atomic(path) as temporary:
        write(temporary)


def write_json(path: Path, values: Any) -> None:
    """Values as indented JSON in UTF-8; NaN is refused, since JSON has none."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # bytes of a file name that are no text: "\udce9" in JSON as well
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def read_json(path: Path) -> Any:
    """The values of a JSON file of a run; an InputError says if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"no such file: {path}; expected a run folder as `protopush train --out` writes it") from error
    except (OSError, ValueError) as error:
        raise InputError(f"damaged file: {path} ({error}); take it from a copy of the run") from error


def read_rows(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl``, a JSON object each; none where there is no such file.

    Raises:
        InputError: a line is damaged, mostly cut off, and it isn't to be skipped.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = [_row(line) for line in lines]
    if None in rows and not skip_damaged:
        raise InputError(f"damaged file: {path}, line {rows.index(None) + 1}; take it from a copy of the run")
    return [row for row in rows if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


READY = ".change"  # new files, all written: they take their places now, or when the folder is next opened
UNFINISHED = ".change-"  # new files, still being written: if that is cut off, they are nothing
OLD = 3600  # seconds after which nobody is still writing them


@contextmanager
def changing(folder: Path) -> Iterator[Path]:
    """An empty folder for the new versions of files in ``folder``; they take their places when the block ends well.

    One rename decides: before it nothing has changed, after it everything has, since whoever opens the folder next
    finishes what was cut off (:func:`finish_change`).

    Raises:
        InputError: the folder can't be written; it is as it was.
    """
    finish_change(folder)
    for left in folder.glob(f"{UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > OLD:
            shutil.rmtree(left, ignore_errors=True)
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        yield stage
        _to_disk(stage)
        stage.rename(folder / READY)
    except OSError as error:
        raise InputError(
            f"cannot write in {folder} ({error.strerror or error}); make room or ask for the right to; it is as it was"
        ) from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
    finish_change(folder)


def finish_change(folder: Path) -> None:
    """Put files into their places that a process had ready when it was cut off; most often there are none.

    Raises:
        InputError: the folder can't be written, or a link in it leads to another one, from which or to which nothing is
            moved: the folder may be anybody's.
    """
    ready = folder / READY
    if not ready.is_dir():
        return
    if ready.is_symlink():
        raise InputError(f"{ready} is a link; expected a folder that protopush wrote; remove it")
    try:
        for file in sorted(path for path in ready.rglob("*") if path.is_file()):
            target = folder / file.relative_to(ready)
            if not target.parent.resolve().is_relative_to(folder.resolve()):
                raise InputError(f"{target.parent} leads out of {folder}; expected a folder; remove the link")
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another process finishes it, too
                file.replace(target)
    except OSError as error:
        raise InputError(
            f"cannot finish a change of {folder} ({error.strerror or error}); make it writable and try again"
        ) from error
    for emptied in (*sorted((path for path in ready.rglob("*") if path.is_dir()), reverse=True), ready):
        with suppress(OSError):
            emptied.rmdir()


def _to_disk(stage: Path) -> None:
    """Not only handed to the system: a power cut after the rename must find whole files."""
    for file in (path for path in stage.rglob("*") if path.is_file()):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
