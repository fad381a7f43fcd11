"""The run as it is on disk now, what people do with it, and what is computed about it in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import Catalog, DataConfig
from protopush.data.shards import is_file
from protopush.errors import InputError, listing
from protopush.explain.neighbours import Neighbours
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.runs.candidates import neighbours_of
from protopush.runs.decisions import Decision, alone, load_decisions, state_of
from protopush.runs.embeddings import embeddings_of, outputs_of
from protopush.runs.outcome import Care
from protopush.runs.review import Wish, forbid, keep
from protopush.runs.run import open_run
from protopush.runs.split_record import open_catalog
from protopush.runs.undo import undo

logger = logging.getLogger("protopush.training")


@dataclass
class RunStore:
    """A run that many people review at once; it is read again when somebody, here or elsewhere, has changed it.

    Attributes:
        data: where the training images are, where that isn't what the run says; keys as in :attr:`Run.data`.
        idle: set while no decision is being worked out here; what can wait, waits for it.
        closing: set when the app ends; background work, in the threads of ``background``, stops then.
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
        self._catalog: Catalog | None = None
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
        """Stop background work; whether nothing is at work any more, decisions neither."""
        self.closing.set()
        decided = self.idle.is_set()
        self.idle.set()
        for thread in self.background:
            thread.join(patience)
        return decided and not any(thread.is_alive() for thread in self.background)

    def decisions(self) -> list[Decision]:
        """All of them, first to last."""
        return load_decisions(self.folder)

    def catalog(self, run: Run) -> Catalog:
        """The training and validation images, listed once.

        Raises:
            InputError: they aren't where they were; the message says what to do.
        """
        if self._catalog is not None:
            return self._catalog
        data = run.data | self.data
        try:
            found = open_catalog(DataConfig(**data), run.class_names, run.folder)
            needed = [sample for sample in found.samples if sample.split in ("train", "val")]
            if missing := [sample.name for sample in needed if not is_file(sample.image)]:
                raise InputError(f"{len(missing)} of {len(needed)} are missing, such as {listing(missing, 2)}")
        except InputError as error:
            raise InputError(
                f"The training images can't be found ({error}). To forbid or undo, stop the app and start it again "
                "with --data.path FOLDER (or MANIFEST.csv), where they are now. Nothing was changed."
            ) from error
        self._catalog = found
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
        known = any(sample.split == split for sample in catalog.samples)
        return ImageDataset(catalog.split(split), run.transform) if known else None

    def forbid(self, prototype: str, reason: str, who: str) -> Decision:
        """Forbid the patch that ``class:number`` stands for; the next best takes its place."""
        wish = Wish(prototype=prototype, reason=reason, who=who)
        return self._decide(lambda run: forbid(run, wish, *self._where(run), catalog=self.catalog(run)), reason, who)

    def what_if(self, prototype: str) -> Decision:
        """What :meth:`forbid` would do; nothing is changed."""
        run, wish = self._open(), Wish(prototype=prototype, reason="what if")
        return forbid(run, wish, *self._where(run), Care(dry_run=True), self.catalog(run))

    def undo(self, number: int, reason: str, who: str) -> Decision:
        """Take a decision back."""

        def take_back(run: Run) -> Decision:
            data, device, workers = self._where(run)
            return undo(run, number, data, device, reason, who, workers, catalog=self.catalog(run))

        return self._decide(take_back, reason, who)

    def keep(self, prototype: str, reason: str, who: str) -> Decision:
        """Record that a prototype is good as it is."""
        return self._decide(lambda run: keep(run, prototype, reason, who), reason, who)

    def _where(self, run: Run) -> tuple[dict[str, Any], torch.device, int]:
        return run.data | self.data, self.device, self.num_workers

    def _decide(self, decide: Callable[[Run], Decision], reason: str, who: str) -> Decision:
        if not who.strip():
            raise InputError("Please write your name: the record says who has decided.")
        if not reason.strip():
            raise InputError("Please write a reason: those who read the record later need it.")
        with self._opening:
            self._deciding += 1
            self.idle.clear()
        try:
            with alone(self.folder):
                return decide(self._open())
        except InputError:
            self._catalog = None  # images may lie elsewhere now
            raise
        finally:
            with self._opening:
                self._deciding -= 1
                if not self._deciding:
                    self.idle.set()

    def _open(self) -> Run:
        run = open_run(self.folder)
        run.model.to(self.device)
        return run


@dataclass(frozen=True)
class Use:
    """How often a prototype counts, on validation images."""

    strongest: int  # images of which it is the strongest evidence for what the model says
    predicted: int  # images that the model says its class of
    images: int  # all


@dataclass(frozen=True)
class _Found:
    """By class and slot, for the anchors of that time: neighbours, and uses where there are validation images."""

    anchors: list[Anchor | None]
    neighbours: list[list[Neighbours | None]]
    uses: list[list[Use]] | None


class UsageWorker:
    """Neighbours and use of the prototypes, computed when asked for, and again for what was replaced since."""

    def __init__(self, store: RunStore) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._found: _Found | None = None
        self._failed: tuple[list[Anchor | None], str] | None = None
        self._done, self._total = 0, 1

    def of(self, run: Run, row: int) -> tuple[Neighbours | None, Use | None, str]:
        """Neighbours and use of a prototype; None, with the reason in words, where they aren't known (yet)."""
        manager, anchors = run.head.proto_manager, run.head.proto_manager.anchors
        with self._lock:
            found, failed = self._found, self._failed
            if found is not None and found.anchors[row] == anchors[row]:
                c, k = manager.slot(row)
                return found.neighbours[c][k], found.uses[c][k] if found.uses else None, ""
            if failed is not None and failed[0] == anchors:
                return None, None, failed[1]
            if self._thread is None:
                self._done, self._total = 0, 1
                self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
                self.store.background[:] = [self._thread]
                self._thread.start()
            return None, None, f"Still searching through the images ({100 * self._done // self._total}% done)."

    def _work(self, run: Run) -> None:
        anchors = list(run.head.proto_manager.anchors)
        try:
            found, failed = self._search(run, anchors), None
        except InputError as error:
            found, failed = None, (anchors, str(error))
        except Exception:  # the page stays, no matter what happens here
            logger.exception("Neighbours of the prototypes were not found")
            found, failed = None, (anchors, "What else it is like could not be worked out; the log says why.")
        with self._lock:
            self._found, self._failed, self._thread = found or self._found, failed, None

    def _search(self, run: Run, anchors: list[Anchor | None]) -> _Found:
        train, val = self.store.images(run, "train"), self.store.images(run, "val")
        self._done, self._total = 0, max(1, len(train or ()) + len(val or ()))
        if train is None:
            raise InputError("The data have no training images.")
        neighbours = neighbours_of(run, train, self.store.device, advance=self._advance, keep=True)
        return _Found(anchors, neighbours, self._uses(run, val) if val is not None else None)

    def _uses(self, run: Run, val: ImageDataset) -> list[list[Use]]:
        mask = run.head.proto_manager.mask().cpu()
        strongest = torch.zeros(mask.shape, dtype=torch.int64)
        embeddings = embeddings_of(run, val, self.store.device, advance=self._advance)
        for output in outputs_of(embeddings, run.head, self.store.device):
            said = output.logits.argmax(dim=1).cpu()
            own = output.contributions.cpu()[torch.arange(len(said)), said].masked_fill(~mask[said], -torch.inf)
            strongest.index_put_((said, own.argmax(dim=1)), torch.ones_like(said), accumulate=True)
        # The strongest is one of the predicted class, so that a row counts the images of that answer.
        return [[Use(count, sum(counts), len(val)) for count in counts] for counts in strongest.tolist()]

    def _advance(self, images: int) -> None:
        self._done += images
        self.store.idle.wait()  # a decision is not slowed down
        if self.store.closing.is_set():
            raise InputError("The app is ending.")
