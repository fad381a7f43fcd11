"""Shortlist of images: those that alone can hold the nearest patches, where bounds of the similarities are known."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from protopush.push.nearest_patches import Candidates, Rule, nearest_patches
from protopush.push.options import PushOptions
from protopush.push.protocol import Pushable, Slots
from protopush.push.reader import Reader
from protopush.push.top_candidates import NO_ID

logger = logging.getLogger("protopush.push")

MORE = 2  # times as many images are read where the first ones do not settle it


class Bounds(NamedTuple):
    """What prototypes can find at most in samples of their class, M of which are known one by one.

    Attributes:
        ids: int64 (M, C, K), by falling similarity; :data:`NO_ID` where there are fewer.
        similarity: (M, C, K), at least the largest cosine of the prototype and a patch of the sample, less ``error``.
        rest: (C, K), likewise of all other samples of the class; -inf where there are none.
        error: what these numbers may be too small by, and no more than that.
    """

    ids: Tensor
    similarity: Tensor
    rest: Tensor
    error: float

    def unread(self, count: int) -> Tensor:
        """The bounds (C, K) of all samples but each prototype's first ``count``."""
        return torch.maximum(self.similarity[count], self.rest) if count < len(self.similarity) else self.rest

    def hold(self, found: Candidates) -> bool:
        """Whether what was found in samples stays below their bounds."""
        similarity, ids = (values.cpu().transpose(0, 1).unsqueeze(1) for values in found.ranked[:2])
        same = ids == self.ids  # (found, known, C, K)
        above = similarity > self.similarity + self.error
        return not bool((same & above & (self.ids != NO_ID)).any())


def nearest_on_shortlist(
    net: Pushable, reader: Reader, slots: Slots, options: PushOptions, rule: Rule, depth: int
) -> Candidates:
    """What :func:`nearest_patches` finds, from few samples where ``options.bounds`` show that no others can win.

    Invariant: the ``depth`` nearest patches that were found lie above the bounds of all samples that were not read, so
    that a pass over all of the class finds the same ones. Where they do not, more samples are read, at last all.
    """
    bounds: Bounds = options.bounds
    used, count, read, found = slots.used.cpu(), depth + 1, set[int](), None
    while True:
        new = set(bounds.ids[:count].masked_fill(~used, NO_ID).flatten().tolist()) - {NO_ID} - read
        if new:
            more = nearest_patches(net, reader.subset(sorted(new)), slots, options, rule, depth)
            found, read = more if found is None else found.and_others(more), read | new
        if found is None:
            break
        if not bounds.hold(found):
            logger.warning("An image is nearer than its recorded similarity allows; the classes are read as a whole")
            break
        last, unread = found.ranked.similarity[:, depth - 1].cpu(), bounds.unread(count)
        if bool(((last > unread + bounds.error) | unread.isneginf())[used].all()):
            logger.info("  %d images settle it; the others cannot win", len(read))
            return found
        if count >= len(bounds.ids):
            logger.info("The %d candidates do not settle it: the classes are read as a whole", len(bounds.ids))
            break
        count *= MORE
    classes = used.any(dim=1).nonzero().flatten().tolist()
    return nearest_patches(net, reader.of_classes(classes), slots, options, rule, depth)
