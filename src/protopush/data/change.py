"""Files of a folder that change together: all of them or none, whatever happens in between."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from protopush.errors import InputError

READY = ".change"  # new files, all written: they take their places now, or when the folder is next opened
BEGUN = ".change-"  # new files, still being written: if that is cut off, they are nothing
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
    _remove_leftovers(folder)
    stage = None
    try:
        stage = Path(tempfile.mkdtemp(prefix=BEGUN, dir=folder))
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


def _remove_leftovers(folder: Path) -> None:
    for left in folder.glob(f"{BEGUN}*"):
        if time.time() - left.stat().st_mtime > OLD:
            shutil.rmtree(left, ignore_errors=True)
