"""A folder of class folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from protopush.data.images import EXTENSIONS
from protopush.data.manifest import SPLITS, Catalog, Sample, split_name
from protopush.errors import InputError, listing


def folder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A folder of class folders, with or without train / val / test folders above them.

    Raises:
        InputError: no such folder, no images, or a class that the model doesn't know.
    """
    return class_folders(Path(path), Path(path), (*SPLITS, "valid", "validation"), classes)


def class_folders(root: Path, top: Path, split_words: Sequence[str], classes: Sequence[str] | None) -> Catalog:
    """The images of class folders in ``top``, or in the folders there that are named as splits are.

    Args:
        root: what names are relative to.
        top: holds class folders, or folders of one of ``split_words`` with class folders.
        split_words: the names that mean a split.
        classes: class names in label order, where a trained model fixes them.
    """
    if not top.is_dir():
        raise InputError(f"no such folder: {top}; expected a folder with one folder of images per class")
    splits = [(split_name(entry.name), entry) for entry in folders_of(top) if entry.name in split_words]
    tops = splits or [("", top)]
    labelled = [
        (split, kind.name, image) for split, place in tops for kind in folders_of(place) for image in images_of(kind)
    ]
    if not labelled:
        raise InputError(f"no images under {top}; expected one folder of images per class")
    # A class folder without a single image is still a class: the check of the training images names it.
    found = {kind.name for _, place in tops for kind in folders_of(place)}
    names = tuple(classes) if classes is not None else tuple(sorted(found))
    unknown = sorted(found - set(names))
    if unknown:
        raise InputError(f"unknown class folders in {top}: {listing(unknown)}; the model knows: {listing(names)}")
    number = {name: place for place, name in enumerate(names)}
    samples = tuple(
        Sample(image, image.relative_to(root).as_posix(), number[kind], split) for split, kind, image in labelled
    )
    return Catalog(samples, names, root)


def folders_of(root: Path) -> list[Path]:
    """The folders in a folder, hidden ones apart, in order."""
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def images_of(root: Path) -> list[Path]:
    """The image files anywhere under a folder, hidden ones apart, in order."""
    found = (Path(top, name) for top, _, names in os.walk(root) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS)
