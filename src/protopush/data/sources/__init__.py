"""Sources of images: each turns a path into a :class:`Catalog`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, read_manifest, with_splits
from protopush.data.shards import is_shard
from protopush.data.sources.dermoscopy import ham10000, is_ham10000, is_isic2018, isic2018
from protopush.data.sources.folder import folder, imagefolder, is_imagefolder
from protopush.data.sources.isic_challenges import is_isic2019, is_isic2020, isic2019, isic2020
from protopush.data.sources.packaged import elpv, medmnist
from protopush.data.sources.sharded import is_shards, shards
from protopush.errors import InputError

Source = Callable[[str, Sequence[str] | None], Catalog]

SOURCES: dict[str, Source] = {
    "folder": folder,
    "manifest": read_manifest,
    "imagefolder": imagefolder,
    "isic2018": isic2018,
    "isic2019": isic2019,
    "isic2020": isic2020,
    "ham10000": ham10000,
    "shards": shards,
    "medmnist": medmnist,
    "elpv": elpv,
}

# Folders that can't be anything else, since they hold files of these names.
LAYOUTS: dict[str, Callable[[Path], bool]] = {
    "isic2018": is_isic2018,
    "isic2019": is_isic2019,
    "isic2020": is_isic2020,
    "ham10000": is_ham10000,
    "imagefolder": is_imagefolder,
    "shards": is_shards,
}


def load_catalog(
    path: str = "",
    source: str | Source = "auto",
    classes: Sequence[str] | None = None,
    seed: int = 0,
    refuse_leaks: bool = True,
) -> Catalog:
    """The samples of a source, each with a split.

    Args:
        path: a folder, a file, or nothing where the source needs none.
        source: a name of :data:`SOURCES`, ``auto`` (see :func:`recognise`), or a function.
        classes: class names in label order, where a trained model fixes them.
        seed: decides held-out images where the source has no splits.
        refuse_leaks: whether a group in two splits is an error; an audit wants to list all of them.

    Raises:
        InputError: an unknown source, or what the source itself raises.
    """
    if not callable(source):
        name = recognise(path) if source == "auto" else source
        if name not in SOURCES:
            raise InputError(f"unknown data source {name!r}; expected one of: auto, {', '.join(SOURCES)}")
        source = SOURCES[name]
    return with_splits(source(path, classes), seed=seed, refuse_leaks=refuse_leaks)


def recognise(path: str) -> str:
    """The one source that a path must be meant for: a layout of :data:`LAYOUTS`, else ``folder``; a file's ending."""
    if not path:
        raise InputError("no data given; expected --data.path FOLDER or MANIFEST.csv")
    place = Path(path)
    if not os.path.isdir(place):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        return "medmnist" if place.suffix == ".npz" else "shards" if is_shard(place) else "manifest"
    fitting = [name for name, fits in LAYOUTS.items() if fits(place)]
    if len(fitting) > 1:
        raise InputError(f"{place} could be {' or '.join(fitting)}; say which with --data.source")
    return fitting[0] if fitting else "folder"
