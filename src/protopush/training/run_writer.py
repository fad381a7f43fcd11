"""Run folder while the run goes on: its rows, its checkpoint, and the trackers that mirror the rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from protopush.data.files import write_atomic
from protopush.distributed import broadcast_from_rank_zero, rank_and_size
from protopush.errors import InputError, first_line, listing
from protopush.models.versions import current_versions, version_change
from protopush.push.certificate import refuse_newer
from protopush.runs.run import append_metrics, clear_folder
from protopush.training.config import RunConfig
from protopush.training.tracking import Trackers

FORMAT = 1
FILE = Path("checkpoints") / "last.pt"

# A run goes on with another of these; with another of any other option it would be another run.
FREE = {"data.num_workers", *(f"trainer.{key}" for key in ("device", "precision", "compile", "cache_dir", "track"))}


class RunWriter:
    """Written by the first process alone; the others wait, so that a full disk ends them all.

    As a context manager it closes the trackers, which get the picture of the prototypes, or learn that the run failed.

    Args:
        folder: of the run; nothing is written there before :meth:`start` or :meth:`resume`.
        config: of the run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self.trackers = Trackers()

    def start(self) -> None:
        """An empty folder with ``config.yaml``: every option as it was resolved."""
        text = yaml.safe_dump(asdict(self.config), sort_keys=False)
        file = self.folder / "config.yaml"
        broadcast_from_rank_zero(lambda: clear_folder(self.folder))
        broadcast_from_rank_zero(lambda: write_atomic(file, lambda path: path.write_text(text, encoding="utf-8")))
        self._track(None)

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Forget what was written after a checkpoint."""

        def cut() -> None:
            os.truncate(self.folder / "metrics.jsonl", saved["metrics_bytes"])
            for left in self.folder.rglob(".*.tmp"):
                left.unlink(missing_ok=True)

        broadcast_from_rank_zero(cut)
        self._track(saved["epoch"])

    def _track(self, resumed_at: int | None) -> None:
        if rank_and_size()[0] == 0:
            self.trackers = Trackers(self.config.trainer.track, self.folder, asdict(self.config), resumed_at)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``.

        Raises:
            InputError: it can't be written.
        """
        broadcast_from_rank_zero(lambda: append_metrics(self.folder, row))
        self.trackers.log(row)

    def checkpoint(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Keep what the run needs to go on after this epoch, counted from 1.

        Raises:
            InputError: there is no room; the last good one is still there.
        """

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
    """Write ``checkpoints/last.pt``, which ``torch.load(weights_only=True)`` reads.

    Raises:
        InputError: there is no room; the last good one is still there.
    """

    def write(file: Path) -> None:
        try:
            with file.open("wb") as opened:  # through Python's file, so that a full disk is an OSError
                torch.save({"format": FORMAT, "versions": current_versions(), **state}, opened)
        except RuntimeError as error:
            raise OSError(f"{first_line(error)}") from error

    write_atomic(folder / FILE, write)


def load_checkpoint(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The state to go on with, or None where the run must start from the beginning.

    Raises:
        InputError: the checkpoint is damaged, or the run was started with other options.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    refuse_other_options(folder, config)
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here
        raise InputError(
            f"damaged file: {file} ({first_line(error)}); take it from a copy, or train again with --overwrite"
        ) from error
    refuse_newer(state, FORMAT, str(file))
    return state


@contextmanager
def restoring(saved: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Restore the state of a checkpoint; where it does not fit, the versions between which it changed are named.

    Raises:
        InputError: it doesn't fit.
    """
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        change = version_change(saved.get("versions", {})) or "take it from a copy"
        raise InputError(
            f"{folder / FILE} does not fit the model and optimizer of this run ({' '.join(str(error).split())[:300]}); "
            f"{change}, or train again with --overwrite"
        ) from error


def refuse_other_options(folder: Path, config: RunConfig) -> None:
    """A run goes on with the options that it was started with.

    Raises:
        InputError: some are different, or ``config.yaml`` can't be read.
    """
    file = folder / "config.yaml"
    try:
        before = _options(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise InputError(f"cannot read {file} ({first_line(error)}); train again with --overwrite") from error
    now = _options(asdict(config))
    other = [f"{key} was {before.get(key)}, is {now[key]}" for key in now if before.get(key) != now[key]]
    if other:
        raise InputError(
            f"the run in {folder} was started with other options ({listing(other, 5)}); give the same, or train again "
            "with --overwrite"
        )


def _options(groups: dict[str, dict[str, Any]]) -> dict[str, Any]:
    flat = {f"{group}.{key}": value for group, values in groups.items() for key, value in values.items()}
    return {key: value for key, value in flat.items() if key not in FREE}
