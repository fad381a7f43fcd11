"""Outputs of frozen layers, computed once and kept on disk (of features patches alone: pooled is their mean)."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from protopush.data.dataset import ImageDataset
from protopush.data.files import atomic, default_cache_dir, write_json
from protopush.data.images import sha256_of
from protopush.data.regions import Regions
from protopush.data.transforms import oriented
from protopush.errors import InputError, listing
from protopush.preserve_state import preserve_state

FORMAT = 2
MANY_BAD = 20  # samples with NaN after which the search for more ends


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
    """The same samples as their images, but items are (patches, label, index), as they are stored.

    Of several ``views`` of an image each item is a random one, drawn by torch; ``eval_view()`` has the first.
    """

    def __init__(self, images: ImageDataset, file: Path, regions: Regions, views: int = 1) -> None:
        super().__init__(images.samples, images.eval_transform)
        self.file = file
        self.regions = regions
        self.array = np.load(file, mmap_mode="r")
        self.views, self.random = views, views > 1

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        stored = self.array[index]
        if self.views > 1:
            stored = stored[int(torch.randint(self.views, ())) if self.random else 0]
        return torch.from_numpy(np.array(stored)), self.samples[index].label, index

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

    Args:
        backbone: returns an object with ``patches`` (B, ...) and ``regions``.
        images: read through its deterministic view.
        hashes: SHA-256 of each image file, from :func:`protopush.data.images.check_images`.
        folder: where the files are kept; by default :func:`default_cache_dir`.
        device: where the backbone is.
        batch_size, num_workers: of the pass over the images; by default :func:`inference_batch_size`.
        advance: called with the number of images done.
        views: orientations of each image that are kept (:class:`Orientations`).
        precision: float16 or float32, of what is kept.

    Raises:
        InputError: features aren't finite (the images are named), or the disk is too full.
    """
    device = torch.device(device)
    view = images.eval_view()
    backbone = backbone if views == 1 else Orientations(backbone, views)
    stem = (folder or default_cache_dir()) / _key(backbone, view, hashes, precision)
    stored = _read(view, stem, views)
    if stored is not None:
        return stored
    loader = DataLoader(view, batch_size=batch_size or inference_batch_size(device), num_workers=num_workers)
    array = stem.with_suffix(".npy")
    regions = _compute(backbone, view, loader, array, device, advance, precision)
    write_json(stem.with_suffix(".json"), {"regions": regions, "images": len(view)})
    return CachedFeatures(view, array, Regions.from_dict(regions), views)


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
    return _read(view, default_cache_dir() / _key(backbone, view, hashes))


def _read(view: ImageDataset, stem: Path, views: int = 1) -> CachedFeatures | None:
    array, meta = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not (array.is_file() and meta.is_file()):  # the description is written last: it says that the array is whole
        return None
    return CachedFeatures(view, array, Regions.from_dict(json.loads(meta.read_text())["regions"]), views)


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
    backbone: nn.Module, view: ImageDataset, loader: DataLoader[Any], file: Path, device: torch.device,
    advance: Callable[[int], None], precision: str,
) -> dict[str, Any]:  # fmt: skip
    regions, done, bad = dict[str, Any](), 0, list[str]()
    with preserve_state(backbone), atomic(file) as temporary:
        array: np.memmap[Any, Any] | None = None
        for images, _, ids in loader:
            features: Any = backbone(images.to(device))
            patches = features.patches.to(getattr(torch, precision)).cpu()
            bad += [view.samples[i].name for i in ids[~patches.isfinite().flatten(1).all(dim=1)].tolist()]
            if len(bad) >= MANY_BAD:
                break
            if array is None:
                regions, shape = features.regions.to_dict(), (len(view), *patches.shape[1:])
                needed, free = math.prod(shape) * patches.element_size(), shutil.disk_usage(temporary.parent).free
                if needed > free:
                    raise InputError(
                        f"the features need {needed / 2**30:.1f} GiB but {temporary.parent} has {free / 2**30:.1f} GiB "
                        "free; make room or choose --trainer.cache_dir"
                    )
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=precision, shape=shape)
            array[done : done + len(patches)] = patches.numpy()
            done += len(patches)
            advance(len(patches))
        if bad:
            count = f"{len(bad)} samples" if len(bad) < MANY_BAD else f"at least {len(bad)} samples"
            raise InputError(
                f"NaN or infinite features in {count}: {listing(bad)}; expected finite ones; "
                "check these images and the backbone's weights"
            )
        if array is not None:
            array.flush()
    return regions
