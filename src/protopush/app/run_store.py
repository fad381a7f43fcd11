"""A run as it is on disk now, and what people do with it; many may do so at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import Catalog
from protopush.data.sources import load_catalog
from protopush.errors import InputError, listing
from protopush.models.model_folder import Run
from protopush.runs.decisions import Decision, alone, load_decisions, state_of
from protopush.runs.review import Wish, forbid, keep
from protopush.runs.run import open_run
from protopush.runs.undo import undo


@dataclass
class Desk:
    """Reads the run anew when somebody, here or elsewhere, has changed it.

    Args:
        folder: the run's.
        data: where the training images are, where that isn't what the run says; keys as in :attr:`Run.data`.
        device: of the models.
        num_workers: processes that read images.

    Attributes:
        idle: set while nobody here is working out a decision; what can wait, waits for it.
        closing: set when the app ends; what works in the background stops then.
        background: threads that do so.
    """

    folder: Path
    data: dict[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    num_workers: int = 0
    idle: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)
    background: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._opening = threading.Lock()
        self._state: list[bytes] = []
        self._run: Run | None = None
        self._deciding = 0
        self.idle.set()

    def run(self) -> Run:
        """The run as it is now.

        Raises:
            InputError: it can't be opened.
        """
        with self._opening:
            state = state_of(self.folder)
            if self._run is None or state != self._state:
                self._run, self._state = self._open(), state
            return self._run

    def close(self, patience: float = 10.0) -> bool:
        """Stop what works in the background; whether nothing is at work any more, decisions neither."""
        self.closing.set()
        decided = self.idle.is_set()
        self.idle.set()
        for thread in self.background:
            thread.join(patience)
        return decided and not any(thread.is_alive() for thread in self.background)

    def decisions(self) -> list[Decision]:
        """All of them, the first first."""
        return load_decisions(self.folder)

    def catalog(self, run: Run) -> Catalog:
        """The training and validation images.

        Raises:
            InputError: they aren't where they were; the message says what to do.
        """
        data = run.data | self.data
        try:
            found = load_catalog(data["path"], data["source"], run.class_names, data.get("split_seed", 0))
        except InputError as error:
            raise self._unreachable(str(error)) from error
        needed = [sample for sample in found.samples if sample.split in ("train", "val")]
        missing = [sample.name for sample in needed if not sample.image.is_file()]
        if missing:
            raise self._unreachable(f"{len(missing)} of {len(needed)} are missing, such as {listing(missing, 2)}")
        return found

    def root(self, run: Run) -> Path:
        """The folder of the training images, as far as it is known."""
        try:
            return self.catalog(run).root
        except InputError:
            return run.root

    def images(self, run: Run, split: str) -> ImageDataset | None:
        """The images of a split; None where it has none."""
        catalog = self.catalog(run)
        if not any(sample.split == split for sample in catalog.samples):
            return None
        return ImageDataset(catalog.split(split), run.transform)

    def forbid(self, prototype: str, reason: str, who: str) -> Decision:
        """Forbid the patch that ``class:number`` stands for; the next best takes its place."""
        wish = Wish(prototype=prototype, reason=reason, who=who)
        return self._decide(
            lambda run: forbid(run, wish, run.data | self.data, self.device, self.num_workers), reason, who
        )

    def undo(self, number: int, reason: str, who: str) -> Decision:
        """Take a decision back."""
        return self._decide(
            lambda run: undo(run, number, run.data | self.data, self.device, reason, who, self.num_workers), reason, who
        )

    def keep(self, prototype: str, reason: str, who: str) -> Decision:
        """Record that a prototype is good as it is."""
        return self._decide(lambda run: keep(run, prototype, reason, who), reason, who, needs_images=False)

    def _decide(self, made: Callable[[Run], Decision], reason: str, who: str, needs_images: bool = True) -> Decision:
        if not who.strip():
            raise InputError("Please write your name: the record says who has decided.")
        if not reason.strip():
            raise InputError("Please write a reason: those who read the record later need it.")
        with self._opening:
            self._deciding += 1
            self.idle.clear()
        try:
            with alone(self.folder):
                run = self._open()
                if needs_images:
                    self.catalog(run)
                return made(run)
        finally:
            with self._opening:
                self._deciding -= 1
                if not self._deciding:
                    self.idle.set()

    def _open(self) -> Run:
        run = open_run(self.folder)
        run.model.to(self.device)
        return run

    def _unreachable(self, why: str) -> InputError:
        return InputError(
            f"The training images can't be found ({why}). To forbid or undo, stop the app and start it again with "
            "--data.path FOLDER (or MANIFEST.csv), where they are now. Nothing was changed."
        )
