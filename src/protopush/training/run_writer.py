"""The run folder while the run goes on: its lines, its checkpoint, and who looks on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from protopush.data.files import write_atomic
from protopush.distributed import broadcast_from_rank_zero, rank_and_size
from protopush.runs.run import append_metrics, clear_folder
from protopush.training.checkpoint import save_checkpoint
from protopush.training.config import RunConfig
from protopush.training.tracking import Trackers, open_trackers


class Journal:
    """Written by the first process alone; the others wait, so that a full disk ends them all.

    Args:
        folder: of the run; nothing is written there before :meth:`begin` or :meth:`go_on`.
        config: of the run.
    """

    def __init__(self, folder: Path, config: RunConfig) -> None:
        self.folder = folder
        self.config = config
        self.trackers: Trackers | None = None

    def begin(self) -> None:
        """An empty folder with ``config.yaml``: every option as it was resolved."""
        broadcast_from_rank_zero(lambda: clear_folder(self.folder))
        text = yaml.safe_dump(asdict(self.config), sort_keys=False)
        file = self.folder / "config.yaml"
        broadcast_from_rank_zero(
            lambda: write_atomic(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        )
        self._track(None)

    def go_on(self, saved: Mapping[str, Any]) -> None:
        """Forget what was written after a checkpoint."""
        broadcast_from_rank_zero(lambda: self._cut(saved["metrics_bytes"]))
        self._track(saved["epoch"])

    def _cut(self, length: int) -> None:
        os.truncate(self.folder / "metrics.jsonl", length)
        for left in self.folder.rglob(".*.tmp"):
            left.unlink(missing_ok=True)

    def _track(self, resumed_at: int | None) -> None:
        if rank_and_size()[0] == 0:
            self.trackers = open_trackers(self.config.trainer.track, self.folder, asdict(self.config), resumed_at)

    def write(self, row: dict[str, Any]) -> None:
        """Add a row to ``metrics.jsonl``.

        Raises:
            InputError: it can't be written.
        """
        broadcast_from_rank_zero(lambda: append_metrics(self.folder, row))
        if self.trackers is not None:
            self.trackers.log(row)

    def checkpoint(self, epoch: int, state: Mapping[str, Any]) -> None:
        """Keep what the run needs to go on after this epoch, counted from 1.

        Raises:
            InputError: there is no room; the last good one is still there.
        """
        broadcast_from_rank_zero(
            lambda: save_checkpoint(self.folder, {"epoch": epoch, "metrics_bytes": self._length(), **state})
        )

    def _length(self) -> int:
        return (self.folder / "metrics.jsonl").stat().st_size

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Nothing more comes; who looks on gets the picture of the prototypes, or learns that the run broke off."""
        if self.trackers is not None:
            if kind is None:
                self.trackers.picture("prototypes", self.folder / "prototypes.png")
            self.trackers.close(failed=kind is not None)
