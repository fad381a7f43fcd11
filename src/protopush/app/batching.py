"""Batches of images that are there at the same time, whoever sent them: one thread puts them through the model."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from protopush.data.regions import Regions
from protopush.models.model import ProtoModel
from protopush.nn.head import HeadOutput
from protopush.preserve_state import preserve_state


class Seen(NamedTuple):
    """What the model says of one image, on the CPU: an output for a batch of 1, and the regions of its patches."""

    output: HeadOutput
    regions: Regions


class Full(Exception):
    """More images wait than may."""


class Batcher:
    """A model in a thread of its own, and the images that wait for it.

    An image that comes alone goes through the model at once. While others are on their way (:meth:`reserve`) it waits
    for them, though never for longer than ``max_wait``.

    Args:
        model: on ``device``; in eval mode until :meth:`close`.
        max_batch: images of one forward pass.
        max_wait: seconds.
        most: images that may be on their way at once.

    Attributes:
        failed: whether the last forward pass raised an error.
    """

    def __init__(self, model: ProtoModel, device: torch.device, max_batch: int, max_wait: float, most: int) -> None:
        self.model, self.device = model, device
        self.max_batch, self.max_wait, self.most = max_batch, max_wait, most
        self.failed = False
        self._reserved = 0
        self._waiting: queue.SimpleQueue[tuple[Tensor, Future[Seen]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @contextmanager
    def reserve(self, images: int) -> Iterator[None]:
        """Places for so many images, from before they are decoded until they are answered; one thread asks for all.

        Raises:
            Full: there are not so many.
        """
        if self._reserved + images > self.most:
            raise Full
        self._reserved += images
        try:
            yield
        finally:
            self._reserved -= images

    def submit(self, pixels: Tensor) -> Future[Seen]:
        """What the model will have said of an image (3, H, W)."""
        future: Future[Seen] = Future()
        self._waiting.put((pixels, future))
        return future

    @property
    def ready(self) -> bool:
        """Whether the thread is there and the model works."""
        return self._thread.is_alive() and not self.failed

    def close(self, patience: float) -> bool:
        """End the thread after all that waits; whether it has ended."""
        self._waiting.put(None)
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _work(self) -> None:
        with preserve_state(self.model):
            open_ = True
            while open_:
                batch, open_ = self._next()
                alive = [one for one in batch if one[1].set_running_or_notify_cancel()]  # others have gone
                if alive:
                    self._run(alive)

    def _next(self) -> tuple[list[tuple[Tensor, Future[Seen]]], bool]:
        """The images of the next forward pass, and whether more may come after them."""
        first = self._waiting.get()
        if first is None:
            return [], False
        batch, until = [first], time.monotonic() + self.max_wait
        while len(batch) < self.max_batch:
            patience = until - time.monotonic() if self._reserved > len(batch) else 0.0
            try:
                more = self._waiting.get(timeout=max(patience, 0.0))
            except queue.Empty:
                break
            if more is None:
                return batch, False
            batch.append(more)
        return batch, True

    def _run(self, batch: list[tuple[Tensor, Future[Seen]]]) -> None:
        try:
            features = self.model.backbone(torch.stack([pixels for pixels, _ in batch]).to(self.device))
            output = HeadOutput._make(some.cpu() for some in self.model.head(features))
        except Exception as error:  # the next batch may do better
            self.failed = True
            for _, future in batch:
                future.set_exception(error)
            return
        self.failed = False
        for i, (_, future) in enumerate(batch):
            own = (some[i : i + 1] for some in output[:-1])  # the prototypes are everybody's
            future.set_result(Seen(HeadOutput._make((*own, output.prototypes)), features.regions))
