"""Run folder that is being written: made ready, its rows and checkpoint, and the trackers that mirror the rows."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from protopush.data.files import atomic
from protopush.data.manifest import Catalog
from protopush.distributed import broadcast_from_rank_zero, rank_and_size
from protopush.errors import InputError, first_line, listing
from protopush.models.stored_run import current_versions, version_change
from protopush.push.certificate import refuse_newer
from protopush.runs.split_record import write_split
from protopush.training.config import RunConfig
from protopush.training.tracking import Trackers

logger = logging.getLogger("protopush.training")

FORMAT = 1
FILE = Path("checkpoints") / "last.pt"

# A run goes on with another of these, where its images are the same files; with another of any other option it would be
# another run.
FREE = {
    *(f"data.{key}" for key in ("path", "source", "num_workers", "max_megapixels")),
    *(f"trainer.{key}" for key in ("device", "precision", "compile", "cache_dir", "track")),
}


def append_metrics(folder: Path, row: dict[str, Any]) -> None:
    """Add one line to ``metrics.jsonl``."""
    path = folder / "metrics.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); make room") from error


def fresh_folder(out: Path, overwrite: bool) -> None:
    """Refuse, in an InputError, what is no folder, can't be written, or isn't empty and no run to be overwritten."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; expected a folder for the run; choose another --out")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=there).close()  # what os.access says isn't always so
    except OSError as error:
        raise InputError(f"cannot write in {there} ({error.strerror}); choose another --out") from error
    if not out.is_dir() or not any(out.iterdir()):
        return
    whole, started = ((out / name).is_file() for name in ("config.json", "metrics.jsonl"))
    if not whole and not started:
        raise InputError(f"{out} is not empty and holds no run; nothing is deleted there; choose another --out")
    if not overwrite and not whole:
        raise InputError(f"{out} holds a run that was cut off; add --resume to go on with it, or --overwrite")
    if not overwrite:
        raise InputError(f"{out} holds a run already; choose another --out, or add --overwrite")


def clear_folder(out: Path) -> None:
    """Make a folder that holds an empty ``metrics.jsonl`` alone of what :func:`fresh_folder` let pass.

    Cut off at any moment, it leaves what is still known as a run, but not as a whole one.
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


class RunWriter:
    """Written by the first process alone; the others wait, so that a full disk ends them all.

    As a context manager it closes the trackers, which get the picture of the prototypes, or learn that the run failed.
    Nothing is written before :meth:`start` or :meth:`resume`.
    """

    def __init__(
        self, folder: Path, config: RunConfig, catalog: Catalog | None = None, hashes: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.config = config
        self.catalog, self.hashes = catalog, hashes or {}
        self.trackers = Trackers()

    def start(self) -> None:
        """An empty folder with ``config.yaml``, every option as it was resolved, and ``split.csv`` of the samples."""

        def write() -> None:
            clear_folder(self.folder)
            self._write_options()
            if self.catalog is not None:
                write_split(self.folder, self.catalog, self.hashes)

        broadcast_from_rank_zero(write)
        self._track(None)

    def resume(self, saved: Mapping[str, Any], restore: Callable[[Mapping[str, Any]], None]) -> None:
        """Restore a checkpoint, if it fits (else an InputError names the versions), and forget what came after it."""
        try:
            restore(saved)
        except (KeyError, RuntimeError, ValueError) as error:
            change = version_change(saved.get("versions", {})) or "take it from a copy"
            raise InputError(
                f"{self.folder / FILE} does not fit the model and optimizer of this run "
                f"({' '.join(str(error).split())[:300]}); {change}, or train again with --overwrite"
            ) from error

        def cut() -> None:
            os.truncate(self.folder / "metrics.jsonl", saved["metrics_bytes"])
            for left in self.folder.rglob(".*.tmp"):
                left.unlink(missing_ok=True)
            self._write_options()

        broadcast_from_rank_zero(cut)
        self._track(saved["epoch"])

    def _write_options(self) -> None:
        with atomic(self.folder / "config.yaml") as file:
            file.write_text(yaml.safe_dump(asdict(self.config), sort_keys=False), encoding="utf-8")

    def _track(self, resumed_at: int | None) -> None:
        if rank_and_size()[0] == 0:
            self.trackers = Trackers(self.config.trainer.track, self.folder, asdict(self.config), resumed_at)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``, and mirror it."""
        broadcast_from_rank_zero(lambda: append_metrics(self.folder, row))
        self.trackers.log(row)

    def checkpoint(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Keep what the run needs to go on after this epoch, counted from 1."""

        def save() -> None:
            length = (self.folder / "metrics.jsonl").stat().st_size
            save_checkpoint(self.folder, {"epoch": epoch, "metrics_bytes": length, **state})

        broadcast_from_rank_zero(save)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.trackers.picture("prototypes", self.folder / "prototypes.png")
        self.trackers.close(failed=kind is not None)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``checkpoints/last.pt``, for ``torch.load(weights_only=True)``; a full disk leaves the old one."""
    with atomic(folder / FILE) as file:
        try:
            with file.open("wb") as opened:  # through Python's file, so that a full disk is an OSError
                torch.save({"format": FORMAT, "versions": current_versions(), **state}, opened)
        except RuntimeError as error:
            raise OSError(first_line(error)) from error


def load_checkpoint(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The state to go on with, if the run was started with these options; None: it starts from the beginning."""
    file = folder / FILE
    if not file.is_file():
        return None
    if different := refuse_other_options(folder, config):
        logger.info("Going on with other options: %s", ", ".join(different))
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here
        raise InputError(
            f"damaged file: {file} ({first_line(error)}); take it from a copy, or train again with --overwrite"
        ) from error
    refuse_newer(state, FORMAT, str(file))
    return state


def refuse_other_options(folder: Path, config: RunConfig) -> list[str]:
    """Which of :data:`FREE` are others than those that a run was started with; any other option is an InputError."""
    file = folder / "config.yaml"
    try:
        given = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"cannot read {file} ({first_line(error)}); train again with --overwrite") from error
    before, now = _flat(asdict(RunConfig())) | given, _flat(asdict(config))  # older runs had fewer options
    differ = {key: f"{key} was {before[key]}, is {now[key]}" for key in now if before[key] != now[key]}
    if other := [words for key, words in differ.items() if key not in FREE]:
        raise InputError(
            f"the run in {folder} was started with other options ({listing(other, 5)}); give the same, or train again "
            "with --overwrite"
        )
    return list(differ.values())


def _flat(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
