"""How a decision gets into a run: one at a time, with all files that it changes, or not at all."""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from protopush.data.change import changing
from protopush.errors import InputError
from protopush.review.decisions import FILE, Decision, add_decision
from protopush.training.run import Run, save_run

LOCK = ".lock"
PATIENCE = 3600.0  # seconds; a decision on a large data set takes minutes


@contextmanager
def alone(folder: Path, waiting: Callable[[], None] = lambda: None, patience: float = PATIENCE) -> Iterator[None]:
    """Be the only one who decides about a run, among all threads and processes; the others wait.

    The run must be opened inside: what was read before may be another's past. ``.lock`` stays in the folder, since
    removing it would let two in.

    Args:
        folder: the run's; one that holds no run isn't touched.
        waiting: called once if somebody else is deciding.
        patience: seconds to wait.

    Raises:
        InputError: somebody else is deciding all that time, or the folder can't be written.
    """
    if not (folder / "config.json").is_file():
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire(timeout=patience)
    except Timeout as error:
        raise InputError(f"another decision about {folder} is still being worked out; try again later") from error
    except OSError as error:
        raise InputError(f"cannot write in {folder} ({error.strerror or error}); ask for the right to") from error
    try:
        yield
    finally:
        lock.release()


def write_decision(run: Run, decision: Decision, state: list[bytes]) -> None:
    """Add a decision to the log, and write the run's files where prototypes were replaced.

    Args:
        run: as it is to be.
        decision: the next one.
        state: :func:`state_of` the folder before anything was worked out.

    Raises:
        InputError: somebody who held no lock has changed the run meanwhile; it is as that left it.
    """
    with changing(run.folder) as stage:
        if decision.replaced:
            if (run.folder / "prototypes").is_dir():  # pictures of images that are gone stay
                shutil.copytree(run.folder / "prototypes", stage / "prototypes")
            save_run(replace(run, folder=stage))
        add_decision(run.folder, stage, decision)
        if state_of(run.folder) != state:
            raise InputError(f"{run.folder} was changed by another process meanwhile; it is as that left it; try again")


def state_of(folder: Path) -> list[bytes]:
    """What every change of a run changes."""
    files = (folder / name for name in ("config.json", FILE))
    return [file.read_bytes() if file.is_file() else b"" for file in files]


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def login() -> str:
    """The user's login name."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's user may have no name
        return "unknown"
