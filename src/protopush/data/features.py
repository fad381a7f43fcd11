"""Outputs of frozen layers, computed once and kept on disk (of features patches alone: pooled is their mean)."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from protopush.data.dataset import ImageDataset
from protopush.data.feature_shards import SHARD, Claims, Format, file_of, ids_of, missing, refuse_full_disk
from protopush.data.files import atomic, default_cache_dir
from protopush.data.images import sha256_of
from protopush.data.regions import Regions
from protopush.data.transforms import oriented
from protopush.distributed import rank_and_size
from protopush.errors import InputError, listing
from protopush.preserve_state import preserve_state

FORMAT = 3
LAYOUT = "layout.json"  # of a folder of shards: regions, shape and precision
MANY_BAD = 20  # samples with NaN after which the search for more ends


class _NotFinite(Exception):
    """A shard has NaN or infinite features: it is not kept, and the search for more goes on."""


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of a state dict, in the order of the names.

    Example:
        >>> weights_fingerprint({"w": torch.zeros(2)}) == weights_fingerprint({"w": torch.zeros(2)})
        True
        >>> weights_fingerprint({"w": torch.zeros(2)}) == weights_fingerprint({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Orientations(nn.Module):
    """What an extractor makes of an image's orientations: images to patches (B, views, ...) and the upright regions.

    Args:
        extract: images (B, 3, H, W) to an object with ``patches`` and ``regions``.
        views: 2, 4 or 8 of :func:`protopush.data.transforms.oriented`.
    """

    def __init__(self, extract: nn.Module, views: int) -> None:
        super().__init__()
        self.extract, self.views = extract, views
        self.name, self.recipe = f"{views} orientations of {extract.name}", extract.recipe
        self.layout = extract.layout

    def forward(self, images: Tensor) -> Any:
        found: list[Any] = [self.extract(oriented(images, view)) for view in range(self.views)]
        return found[0]._replace(patches=torch.stack([features.patches for features in found], dim=1))


class CachedFeatures(ImageDataset):
    """The same samples as their images, but items are (patches, label, index), each read alone from its shard.

    Of several ``views`` of an image each item is a random one, drawn by torch; ``eval_view()`` has the first.
    """

    def __init__(self, images: ImageDataset, folder: Path, views: int = 1) -> None:
        super().__init__(images.samples, images.eval_transform)
        self.folder = folder
        layout = json.loads((folder / LAYOUT).read_text())
        self.regions = Regions.from_dict(layout["regions"])
        self.format = Format(layout["precision"], layout["shape"])
        self.views, self.random = views, views > 1

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        view = int(torch.randint(self.views, ())) if self.random else 0
        return self.patches(index, view), self.samples[index].label, index

    def patches(self, index: int, view: int = 0) -> Tensor:
        """The patches of one view of an image."""
        number, place = divmod(index, SHARD)
        records = len(ids_of(number, len(self))) * self.views
        return self.format.read(file_of(self.folder, number), place * self.views + view, records)

    def eval_view(self) -> CachedFeatures:
        """The same samples, each as its first view."""
        view = copy.copy(self)
        view.random = False
        return view


def inference_batch_size(device: torch.device) -> int:
    """Images a forward pass without gradients: few on a CPU, where memory for large activations is dear."""
    return 8 if device.type == "cpu" else 64


def cache_features(
    backbone: nn.Module, images: ImageDataset, hashes: Sequence[str], folder: Path | None = None,
    device: torch.device | str = "cpu", batch_size: int | None = None, num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None, views: int = 1, precision: str = "float16",
) -> CachedFeatures:  # fmt: skip
    """The features of all images, from disk where they were computed before from these weights, transform and files.

    They lie in shards of 512 images. What a process has finished when it is killed is there for the next one, and
    processes that want the same features at once (the ranks of a run, or several runs) share the work: each computes
    those that no other does.

    Args:
        backbone: returns an object with ``patches`` (B, ...) and ``regions``.
        images: read through its deterministic view.
        hashes: SHA-256 of each image file, from :func:`protopush.data.images.check_images`.
        folder: where they are kept, in a folder of their own; by default :func:`default_cache_dir`.
        device: where the backbone is.
        batch_size, num_workers: of the pass over the images; by default :func:`inference_batch_size`.
        advance: called with the number of images done, here or elsewhere.
        views: orientations of each image that are kept (:class:`Orientations`).
        precision: float16, float32 or float8, of what is kept.

    Raises:
        InputError: features aren't finite (the images are named), or the disk is too full.
    """
    device, view = torch.device(device), images.eval_view()
    backbone = backbone if views == 1 else Orientations(backbone, views)
    place = (folder or default_cache_dir()) / _key(backbone, view, hashes, precision)
    batch, counted = batch_size or inference_batch_size(device), 0
    while left := missing(place, len(view)):
        there = len(view) - sum(len(ids_of(number, len(view))) for number in left)
        advance(there - counted)  # of an earlier run, or of another process
        counted = there
        rank, ranks = rank_and_size()
        first = len(left) * rank // ranks  # each begins where no other does
        with Claims(place, left[first:] + left[:first], len(view), batch) as claims:
            loader: DataLoader[Any] = DataLoader(view, batch_sampler=claims, num_workers=num_workers)
            done = _compute(backbone, view, loader, claims, views, precision, device, advance)
            if not done:  # others compute all that is left
                claims.claim(left[0], wait=True)
        counted += done
    return CachedFeatures(view, place, views)


def collate_stored(items: list[Any]) -> Any:
    """A batch of stored features in their own precision: autocast on a CPU refuses to stack float16."""
    with torch.autocast("cpu", enabled=False):
        return default_collate(items)


def stored_features(backbone: nn.Module, images: ImageDataset) -> CachedFeatures | None:
    """The features of all images as a training left them in :func:`default_cache_dir`; None where they are not there.

    The files are read to see whether they are the same, which takes far less than a forward pass. As features are
    float16, a cosine of them is right to about 0.001.
    """
    view = images.eval_view()
    try:
        hashes = [sha256_of(sample.image) for sample in view.samples]
    except OSError:  # who reads the images says so
        return None
    place = default_cache_dir() / _key(backbone, view, hashes)
    return CachedFeatures(view, place) if len(view) and not missing(place, len(view)) else None


def _key(backbone: nn.Module, view: ImageDataset, hashes: Sequence[str], precision: str = "float16") -> str:
    transform = view.eval_transform
    recipe: dict[str, Any] = getattr(backbone, "recipe", None) or {}
    # What makes a difference although weights are equal: an activation, the normalisation of a fusion's part.
    options = {key: value for key, value in recipe.items() if key not in ("name", "name_or_module")}
    content = {
        "format": FORMAT,
        "weights": weights_fingerprint(backbone.state_dict()),
        "backbone": f"{getattr(backbone, 'name', '')} {getattr(backbone, 'layout', '')}",
        **({"options": options} if options else {}),
        **({"precision": precision} if precision != "float16" else {}),
        "preprocessing": transform.preprocessing.to_dict(),
        "crop_pct": transform.crop_pct,
        "files": list(hashes),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _compute(
    backbone: nn.Module, view: ImageDataset, loader: DataLoader[Any], claims: Claims, views: int, precision: str,
    device: torch.device, advance: Callable[[int], None],
) -> int:  # fmt: skip
    """Compute the shards that can be claimed; the number of images."""
    count, bad = 0, list[str]()
    with preserve_state(backbone):
        for number, batches in groupby(loader, lambda batch: int(batch[2][0]) // SHARD):
            ids, known = ids_of(number, len(view)), len(bad)
            with suppress(_NotFinite), atomic(file_of(claims.folder, number)) as temporary:
                with temporary.open("wb") as file:
                    for images, _, indices in batches:
                        features: Any = backbone(images.to(device))
                        patches = features.patches.flatten(0, 1) if views > 1 else features.patches
                        form = Format(precision, patches.shape[1:])
                        if not file.tell():
                            left = sum(len(ids_of(n, len(view))) for n in missing(claims.folder, len(view)))
                            refuse_full_disk(claims.folder, left * views * form.size)
                            form.write_header(file, len(ids) * views)
                        data, finite = form.pack(patches)
                        finite = finite.view(-1, views).all(dim=1)
                        bad += [view.samples[i].name for i in indices[~finite].tolist()]
                        file.write(data)
                        advance(len(indices))
                        if len(bad) >= MANY_BAD:
                            break
                if len(bad) > known:
                    raise _NotFinite
                layout = {"regions": features.regions.to_dict(), "precision": precision, "shape": list(form.shape)}
                claims.write_once(LAYOUT, layout)  # before the shard, so that no shard is without
            if len(bad) >= MANY_BAD:
                break
            claims.release(number)
            count += len(ids)
    if bad:
        what = f"{len(bad)} samples" if len(bad) < MANY_BAD else f"at least {len(bad)} samples"
        raise InputError(
            f"NaN or infinite features in {what}: {listing(bad)}; expected finite ones; "
            "check these images and the backbone's weights"
        )
    return count
