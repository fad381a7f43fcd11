"""What prototypes are like and how often they count: worked out in the background, in one pass over the data."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from protopush.app.run_store import Desk
from protopush.backbones.create import Features
from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.errors import InputError
from protopush.explain.neighbours import Neighbours, find_neighbours
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOutput
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state

logger = logging.getLogger("protopush.training")


@dataclass(frozen=True)
class Use:
    """How often a prototype counts, on validation images.

    Attributes:
        strongest: images of which it is the strongest evidence for what the model says.
        predicted: images that the model says its class of.
        images: all.
    """

    strongest: int
    predicted: int
    images: int


@dataclass(frozen=True)
class Seen:
    """What was found for a run as it was.

    Attributes:
        anchors: by row, what the prototypes stood for.
        neighbours: by class and slot.
        uses: by class and slot; None without validation images.
    """

    anchors: list[Anchor | None]
    neighbours: list[list[Neighbours | None]]
    uses: list[list[Use]] | None


class Lookout:
    """Looks once somebody asks, and again for what was replaced since; one pass at a time."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen: Seen | None = None
        self._failed: tuple[list[Anchor | None], str] | None = None
        self._done, self._total = 0, 1

    def of(self, run: Run, row: int) -> tuple[Neighbours | None, Use | None, str]:
        """Neighbours and use of a prototype; None, with the reason in words, where they aren't known (yet)."""
        slots, anchor = run.head.proto_manager.max_prototypes, run.head.proto_manager.anchors[row]
        with self._lock:
            seen, failed = self._seen, self._failed
            if seen is not None and seen.anchors[row] == anchor:
                c, k = divmod(row, slots)
                return seen.neighbours[c][k], seen.uses[c][k] if seen.uses else None, ""
            if failed is not None and failed[0] == run.head.proto_manager.anchors:
                return None, None, failed[1]
            if self._thread is None:
                self._done, self._total = 0, 1
                self._thread = threading.Thread(target=self._work, args=(run,), daemon=True)
                self.desk.background[:] = [self._thread]
                self._thread.start()
            return None, None, f"Still looking through the images ({100 * self._done // self._total}% done)."

    def _work(self, run: Run) -> None:
        anchors = list(run.head.proto_manager.anchors)
        try:
            seen, failed = self._look(run, anchors), None
        except InputError as error:
            seen, failed = None, (anchors, str(error))
        except Exception:  # the page stays, whatever happens here
            logger.exception("Neighbours of the prototypes were not found")
            seen, failed = None, (anchors, "What else it is like could not be worked out; the log tells why.")
        with self._lock:
            self._seen, self._failed, self._thread = seen or self._seen, failed, None

    def _look(self, run: Run, anchors: list[Anchor | None]) -> Seen:
        train, val = self.desk.images(run, "train"), self.desk.images(run, "val")
        self._done, self._total = 0, max(1, len(train or ()) + len(val or ()))
        if train is None:
            raise InputError("The data have no training images.")
        found = find_neighbours(run.model, train, self.desk.device, advance=self._advance)
        return Seen(anchors, found, self._uses(run, val) if val is not None else None)

    def _uses(self, run: Run, val: ImageDataset) -> list[list[Use]]:
        device, manager = self.desk.device, run.head.proto_manager
        strongest = torch.zeros(manager.num_classes, manager.max_prototypes, dtype=torch.int64)
        predicted = torch.zeros(manager.num_classes, dtype=torch.int64)
        loader: DataLoader[Any] = DataLoader(val, batch_size=inference_batch_size(device))
        with preserve_state(run.model):
            for images, *_ in loader:
                features: Features = run.model.backbone(images.to(device))
                output: HeadOutput = run.head(features)
                said = output.logits.argmax(dim=1).cpu()
                unused = ~manager.mask()[said.to(manager.valid_mask.device)].cpu()
                own = output.contributions.cpu()[torch.arange(len(said)), said].masked_fill(unused, -torch.inf)
                strongest.index_put_((said, own.argmax(dim=1)), torch.ones_like(said), accumulate=True)
                predicted.index_put_((said,), torch.ones_like(said), accumulate=True)
                self._advance(len(images))
        return [
            [Use(count, total, len(val)) for count in counts]
            for counts, total in zip(strongest.tolist(), predicted.tolist(), strict=True)
        ]

    def _advance(self, images: int) -> None:
        self._done += images
        self.desk.idle.wait()  # a decision is not slowed down
        if self.desk.closing.is_set():
            raise InputError("The app is ending.")
