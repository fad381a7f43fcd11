"""Folder of a run: opened, or made ready for a new run."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from protopush.data.files import read_json
from protopush.data.images import sha256_of
from protopush.errors import InputError
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run, read_run


def open_run(folder: str | Path, backbone: nn.Module | None = None, check_weights: bool = True) -> Run:
    """Reopen a run folder.

    Args:
        folder: as ``protopush train --out`` wrote it.
        backbone: the module itself, where it is one of your own, which no name could build again.
        check_weights: refuse weights other than those that the run saved; False: for who reports what no longer holds.

    Raises:
        InputError: a file is missing or damaged, or of a newer format.
    """
    return read_run(folder, ProtoModel, backbone, check_weights)


def same_weights(folder: Path) -> bool:
    """Whether a run's weights are those that its ``config.json`` and ``prototypes.json`` were written for."""
    recorded = [read_json(folder / name).get("weights_sha256") for name in ("config.json", "prototypes.json")]
    return recorded == [sha256_of(folder / "model.safetensors")] * 2


def load(folder: str | Path, backbone: nn.Module | None = None) -> ProtoModel:
    """The model of a run folder, in eval mode, with ``class_names``.

    Args:
        folder: as ``protopush train --out`` wrote it.
        backbone: the module itself, where it is one of your own, which no name could build again.

    Raises:
        InputError: a file is missing or damaged.
    """
    return open_run(folder, backbone).model


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add one line to ``metrics.jsonl``."""
    try:
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {folder / 'metrics.jsonl'} ({error.strerror}); make room") from error


def fresh_folder(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds something, unless it is a run to be overwritten.

    Raises:
        InputError: the folder isn't empty, isn't a folder, or can't be written.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder for the run; choose another --out")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=there).close()  # what os.access says isn't always so
    except OSError as error:
        raise InputError(f"cannot write in {there} ({error.strerror}); choose another --out") from error
    if not out.is_dir() or not any(out.iterdir()):
        return
    is_run = any((out / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if not overwrite:
        if not is_run:
            raise InputError(f"{out} is not empty; choose another --out")
        if not (out / "config.json").is_file():
            raise InputError(f"{out} holds a run that was cut off; add --resume to go on with it, or --overwrite")
        raise InputError(f"{out} holds a run already; choose another --out, or add --overwrite")
    if not is_run:
        raise InputError(f"{out} is not empty and holds no run; nothing is deleted there; choose another --out")


def clear_folder(out: Path) -> None:
    """Make a folder that holds an empty ``metrics.jsonl`` alone of what :func:`fresh_folder` let pass.

    Cut off at any moment, it leaves what is still known as a run, but not as a whole one.

    Raises:
        InputError: the folder can't be written.
    """
    metrics = out / "metrics.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        metrics.touch()
        (out / "config.json").unlink(missing_ok=True)
        for entry in out.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry != metrics:
                entry.unlink()
        metrics.write_bytes(b"")
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); make room or choose another --out") from error
