"""Features of a frozen backbone, computed once and kept on disk as float16 (patches alone: pooled is their mean)."""

from __future__ import annotations

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
from torch.utils.data import DataLoader

from protopush.data.dataset import ImageDataset
from protopush.data.files import atomic, default_cache_dir, write_json
from protopush.data.images import sha256_of
from protopush.data.regions import Regions
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


class CachedFeatures(ImageDataset):
    """The same samples as their images, but items are (patches float16 (L, C), label, index)."""

    def __init__(self, images: ImageDataset, file: Path, regions: Regions) -> None:
        super().__init__(images.samples, images.eval_transform)
        self.file = file
        self.regions = regions
        self.array = np.load(file, mmap_mode="r")

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return torch.from_numpy(np.array(self.array[index])), self.samples[index].label, index


def inference_batch_size(device: torch.device) -> int:
    """Images a forward pass without gradients: few on a CPU, where memory for large activations is dear."""
    return 8 if device.type == "cpu" else 64


def cache_features(
    backbone: nn.Module, images: ImageDataset, hashes: Sequence[str], folder: Path | None = None,
    device: torch.device | str = "cpu", batch_size: int | None = None, num_workers: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> CachedFeatures:  # fmt: skip
    """The features of all images, from disk where they were computed before from these weights, transform and files.

    Args:
        backbone: returns an object with ``patches`` (B, L, C) and ``regions``.
        images: read through its deterministic view.
        hashes: SHA-256 of each image file, from :func:`protopush.data.images.check_images`.
        folder: where the files are kept; by default :func:`default_cache_dir`.
        device: where the backbone is.
        batch_size, num_workers: of the pass over the images; by default :func:`inference_batch_size`.
        advance: called with the number of images done.

    Raises:
        InputError: features aren't finite (the images are named), or the disk is too full.
    """
    device = torch.device(device)
    view = images.eval_view()
    stem = (folder or default_cache_dir()) / _key(backbone, view, hashes)
    stored = _read(view, stem)
    if stored is not None:
        return stored
    loader = DataLoader(view, batch_size=batch_size or inference_batch_size(device), num_workers=num_workers)
    array = stem.with_suffix(".npy")
    regions = _compute(backbone, view, loader, array, device, advance)
    write_json(stem.with_suffix(".json"), {"regions": regions, "images": len(view)})
    return CachedFeatures(view, array, Regions.from_dict(regions))


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


def _read(view: ImageDataset, stem: Path) -> CachedFeatures | None:
    array, meta = stem.with_suffix(".npy"), stem.with_suffix(".json")
    if not (array.is_file() and meta.is_file()):  # the description is written last: it says that the array is whole
        return None
    return CachedFeatures(view, array, Regions.from_dict(json.loads(meta.read_text())["regions"]))


def _key(backbone: nn.Module, view: ImageDataset, hashes: Sequence[str]) -> str:
    transform = view.eval_transform
    recipe: dict[str, Any] = getattr(backbone, "recipe", None) or {}
    # What makes a difference although weights are equal: an activation, the normalisation of a fusion's part.
    options = {key: value for key, value in recipe.items() if key not in ("name", "name_or_module")}
    content = {
        "format": FORMAT,
        "weights": weights_fingerprint(backbone.state_dict()),
        "backbone": f"{getattr(backbone, 'name', '')} {getattr(backbone, 'layout', '')}",
        **({"options": options} if options else {}),
        "preprocessing": transform.preprocessing.to_dict(),
        "crop_pct": transform.crop_pct,
        "files": list(hashes),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _compute(
    backbone: nn.Module, view: ImageDataset, loader: DataLoader[Any], file: Path, device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    regions, done, bad = dict[str, Any](), 0, list[str]()
    with preserve_state(backbone), atomic(file) as temporary:
        array: np.memmap[Any, Any] | None = None
        for images, _, ids in loader:
            features: Any = backbone(images.to(device))
            patches = features.patches.half().cpu()
            bad += [view.samples[i].name for i in ids[~patches.isfinite().flatten(1).all(dim=1)].tolist()]
            if len(bad) >= MANY_BAD:
                break
            if array is None:
                regions, shape = features.regions.to_dict(), (len(view), *patches.shape[1:])
                needed, free = math.prod(shape) * 2, shutil.disk_usage(temporary.parent).free
                if needed > free:
                    raise InputError(
                        f"the features need {needed / 2**30:.1f} GiB but {temporary.parent} has {free / 2**30:.1f} GiB "
                        "free; make room or choose --trainer.cache_dir"
                    )
                array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
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
