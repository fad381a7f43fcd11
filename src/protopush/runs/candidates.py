"""Candidates: the training images that each prototype of a run likes best, ``candidates.safetensors`` in its folder.

They hold for these weights alone, and for a prototype while it is where it was: a decision about it is then worked out
from a few images. Whatever is not known is ranked again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from protopush.data.dataset import ImageDataset
from protopush.data.files import atomic
from protopush.data.regions import Regions
from protopush.errors import InputError, listing
from protopush.explain.neighbours import BestImages, Neighbours, RankedImages, rank_images
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.push.options import Allow
from protopush.push.shortlist import Bounds
from protopush.push.top_candidates import NO_ID
from protopush.runs.embeddings import Embedder, embeddings_of
from protopush.runs.progress import bar

logger = logging.getLogger("protopush.runs")

FILE = "candidates.safetensors"
MOST, OTHERS = 64, 8  # images kept for each prototype: of its class, and of all others
NEAREST = 4  # images of its class that show a prototype's neighbours, one of them its anchor's
SAME = 1e-6  # of a prototype's numbers, computed twice
LISTS = ("similarities", "cells", "ids")
KINDS = ("own", "others")

Slot = tuple[int, int]  # (class, prototype)


class KeptCandidates(NamedTuple):
    """The images of a training set that each prototype likes best, and the prototypes that they were ranked for.

    Attributes:
        ranked: ids are places in the training set; NaN is the similarity of what was not ranked.
        vectors: (C, K, D), the prototypes then; NaN where a slot was not ranked.
        counts: (C,), images of each class.
    """

    ranked: RankedImages
    vectors: Tensor
    counts: Tensor

    def fresh(self, model: ProtoModel) -> Tensor:
        """Bool (C, K), the prototypes that are where they were."""
        with torch.no_grad():
            now = model.head.prototypes().float().cpu()
        return (now - self.vectors).abs().amax(dim=2) <= SAME

    def bounds(self, slots: Sequence[Slot], allow: Allow) -> Bounds:
        """What prototypes can find at most in images of their class that have a patch that is allowed."""
        own, regions = self.ranked.own, self.ranked.regions
        ids, similarity = torch.full_like(own.ids, NO_ID), torch.full_like(own.similarities, -torch.inf)
        for c, k in slots:
            found = own.similarities[:, c, k].isfinite()
            some = own.ids[found, c, k]
            if not len(some):  # a class without images has none to ask about
                continue
            free = allow(some, regions).any(dim=1)
            ids[: int(free.sum()), c, k] = some[free]
            similarity[: int(free.sum()), c, k] = own.similarities[found, c, k][free]
        more = (self.counts > len(own.ids)).unsqueeze(1)
        rest = own.similarities[-1].masked_fill(~more, -torch.inf)
        return Bounds(ids, similarity, rest, self.ranked.error)

    def neighbours(self, model: ProtoModel, train: ImageDataset) -> list[list[Neighbours | None]] | None:
        """As :func:`protopush.explain.neighbours.find_neighbours`; None where some prototype's are not known."""
        used = model.head.proto_manager.mask().cpu()
        known = self.fresh(model) & ~self.ranked.others.similarities.isnan().any(dim=0)
        known &= (self.counts.clamp(max=NEAREST) <= len(self.ranked.own.ids)).unsqueeze(1)
        return self.ranked.neighbours(model, train) if bool(known[used].all()) else None


def rank_candidates(
    run: Run, train: ImageDataset, device: torch.device, num_workers: int = 0, most: int = MOST,
    advance: Callable[[int], None] = lambda _: None,
) -> KeptCandidates:  # fmt: skip
    """Rank the training images for every prototype, in one pass."""
    ranked = rank_images(run.model, train, device, most, OTHERS, num_workers, advance)
    with torch.no_grad():
        vectors = run.head.prototypes().float().cpu().clone()
    return KeptCandidates(ranked, vectors, _counts(train, len(vectors)))


def _counts(train: ImageDataset, classes: int) -> Tensor:
    return torch.bincount(torch.tensor(train.labels, dtype=torch.int64), minlength=classes)


def keep_candidates(
    run: Run, train: ImageDataset, val: ImageDataset | None, device: torch.device, num_workers: int, most: int = MOST
) -> None:
    """Rank the training images and embed the validation images, so that decisions need not; 0 candidates: nothing."""
    if most:
        with bar("Candidates of the prototypes", len(train)) as advance:
            save_candidates(run, rank_candidates(run, train, device, num_workers, most, advance), train)
        if val is not None:
            with bar("Embeddings of the validation images", len(val)) as advance:
                embeddings_of(run, val, device, num_workers, advance)


def candidates_for(
    run: Run, train: ImageDataset, slots: Sequence[Slot], device: torch.device, num_workers: int
) -> KeptCandidates:
    """Candidates of some prototypes: as the run keeps them, else ranked over the images of their classes, and kept."""
    kept = load_candidates(run, train)
    fresh = torch.zeros_like(run.head.proto_manager.mask().cpu()) if kept is None else kept.fresh(run.model)
    stale = [slot for slot in slots if not fresh[slot]]
    if kept is not None and not stale:
        return kept
    classes = {c for c, _ in stale}
    places = [i for i, label in enumerate(train.labels) if label in classes]
    names = listing([f"{run.class_names[c]}:{k}" for c, k in stale])
    logger.info("No candidates are kept for %s as it is now: %d images are read", names, len(places))
    some = ImageDataset([train.samples[i] for i in places], train.eval_transform)
    with bar("Ranking images", len(some)) as advance:
        most = MOST if kept is None else len(kept.ranked.own.ids)
        new = rank_candidates(run, some, device, num_workers, most, advance)
    own = new.ranked.own
    own.ids = torch.tensor([*places, 0])[own.ids.clamp(max=len(places))]
    took = torch.zeros_like(fresh)
    took[tuple(torch.tensor(stale).T)] = True
    merged = _merged(kept, new._replace(counts=_counts(train, len(fresh))), took)
    save_candidates(run, merged, train)
    return merged


def neighbours_of(
    run: Run, train: ImageDataset, device: torch.device, num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None, keep: bool = False,
) -> list[list[Neighbours | None]]:  # fmt: skip
    """The training images that each prototype likes best: as the run keeps them, else by a pass over all images.

    What was found is kept for later where that is asked for and the folder can be written.
    """
    kept = load_candidates(run, train)
    found = None if kept is None else kept.neighbours(run.model, train)
    if found is not None:
        advance(len(train))
        return found
    ranked = rank_candidates(run, train, device, num_workers, advance=advance)
    if keep:
        with suppress(InputError):
            save_candidates(run, ranked, train)
    return ranked.ranked.neighbours(run.model, train)


def _merged(old: KeptCandidates | None, new: KeptCandidates, took: Tensor) -> KeptCandidates:
    """The slots ``took`` (C, K) of the new ones, whose images of other classes are not known; the others of the old."""
    if old is None or old.ranked.own.ids.shape != new.ranked.own.ids.shape:
        unknown = torch.full_like(new.vectors, torch.nan)
        others = _unknown(new.ranked.others, torch.ones_like(took))
        return KeptCandidates(
            new.ranked._replace(others=others), torch.where(took.unsqueeze(2), new.vectors, unknown), new.counts
        )
    own = BestImages(
        *(torch.where(took, getattr(new.ranked.own, name), getattr(old.ranked.own, name)) for name in LISTS)
    )
    others = _unknown(old.ranked.others, took)
    ranked = RankedImages(own, others, old.ranked.regions, max(old.ranked.error, new.ranked.error))
    return KeptCandidates(ranked, torch.where(took.unsqueeze(2), new.vectors, old.vectors), new.counts)


def _unknown(best: BestImages, slots: Tensor) -> BestImages:
    return BestImages(best.similarities.masked_fill(slots, torch.nan), best.cells, best.ids)


def save_candidates(run: Run, candidates: KeptCandidates, train: ImageDataset) -> None:
    """Write :data:`FILE` into the run's folder."""
    ranked = candidates.ranked
    tensors = {"vectors": candidates.vectors}
    listed = sorted({i for best in ranked[:2] for i in best.ids.flatten().tolist()})
    number = torch.zeros(len(train), dtype=torch.int64)
    number[listed] = torch.arange(len(listed))
    for kind, best in zip(KINDS, ranked[:2], strict=True):
        tensors[f"{kind}.similarities"] = best.similarities
        tensors[f"{kind}.cells"], tensors[f"{kind}.ids"] = best.cells.int(), number[best.ids].int()
    said = {
        "names": json.dumps([train.samples[i].name for i in listed]),
        "valid_for": _valid_for(run, train),
        "regions": json.dumps(ranked.regions.to_dict()),
        "error": str(ranked.error),
    }
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic(run.folder / FILE) as temporary:
        save_file(plain, temporary, said)


def load_candidates(run: Run, train: ImageDataset) -> KeptCandidates | None:
    """What :func:`save_candidates` wrote; None where it was for other weights or images, or cannot be read."""
    try:
        with safe_open(run.folder / FILE, framework="pt") as file:
            said = file.metadata() or {}
            if said.get("valid_for") != _valid_for(run, train):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        place = {sample.name: i for i, sample in enumerate(train.samples)}
        ids = torch.tensor([place[name] for name in json.loads(said["names"])], dtype=torch.int64)
        own, others = (
            BestImages(tensors[f"{kind}.similarities"], tensors[f"{kind}.cells"].long(), ids[tensors[f"{kind}.ids"]])
            for kind in KINDS
        )
        ranked = RankedImages(own, others, Regions.from_dict(json.loads(said["regions"])), float(said["error"]))
        return KeptCandidates(ranked, tensors["vectors"], _counts(train, len(tensors["vectors"])))
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with the file: it can be made again
        logger.warning("%s is left aside (%s)", run.folder / FILE, error)
        return None


def _valid_for(run: Run, train: ImageDataset) -> str:
    """Changes with the weights that make an embedding, with what an image goes through, and with the images."""
    transform = run.transform
    said = [Embedder(run.model).key(), transform.preprocessing.to_dict(), transform.crop_pct]
    images = sorted((sample.name, sample.label) for sample in train.samples)
    return hashlib.sha256(json.dumps([said, images], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
