"""Where images come from: each source turns a path into a :class:`Catalog`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from protopush.data.images import EXTENSIONS
from protopush.data.manifest import SPLITS, Catalog, Sample, read_manifest, with_splits
from protopush.errors import InputError, listing

Source = Callable[[str, Sequence[str] | None], Catalog]


def load_catalog(
    path: str = "",
    source: str | Source = "auto",
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> Catalog:
    """The samples of a source, each with a split.

    Args:
        path: a folder, a manifest, or nothing where the source needs none.
        source: a name of :data:`SOURCES`, ``auto`` (a folder is ``folder``, a file is ``manifest``), or a function.
        classes: class names in label order, where a trained model fixes them.
        seed: decides held-out images where the source has no splits.

    Raises:
        InputError: an unknown source, or what the source itself raises.
    """
    if callable(source):
        found = source(path, classes)
    else:
        name = _guess(path) if source == "auto" else source
        if name not in SOURCES:
            raise InputError(f"unknown data source {name!r}; expected one of: auto, {', '.join(SOURCES)}")
        found = SOURCES[name](path, classes)
    return with_splits(found, seed=seed)


def _guess(path: str) -> str:
    if not path:
        raise InputError("no data given; expected --data.path FOLDER or MANIFEST.csv")
    return "folder" if Path(path).is_dir() else "manifest"


def folder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A folder of class folders, with or without train / val / test folders above them."""
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; expected a folder with one folder of images per class")
    splits = {entry.name: entry for entry in _folders(root) if entry.name in (*SPLITS, "valid", "validation")}
    tops = list(splits.items()) if splits else [("", root)]
    labelled = [
        (split.replace("validation", "val").replace("valid", "val"), kind.name, image)
        for split, top in tops
        for kind in _folders(top)
        for image in _images(kind)
    ]
    if not labelled:
        raise InputError(f"no images under {root}; expected one folder of images per class")
    # A class folder without a single image is still a class: the check of the training images names it.
    found = {kind.name for _, top in tops for kind in _folders(top)}
    names = tuple(classes) if classes is not None else tuple(sorted(found))
    unknown = sorted(found - set(names))
    if unknown:
        raise InputError(f"unknown class folders in {root}: {listing(unknown)}; the model knows: {listing(names)}")
    samples = tuple(
        Sample(image, image.relative_to(root).as_posix(), names.index(kind), split) for split, kind, image in labelled
    )
    return Catalog(samples, names, root)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path) -> list[Path]:
    found = (Path(top, name) for top, _, names in os.walk(root) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS)


def manifest(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A CSV ``image,label[,split][,group][,mask]``; see :func:`protopush.data.manifest.read_manifest`."""
    return read_manifest(path, classes)


ELPV_BLOCK = 60


def elpv(path: str = "", classes: Sequence[str] | None = None) -> Catalog:
    """Solar cells in electroluminescence (Buerhop-Lutz et al. 2018): functional against defective, monocrystalline.

    Only the sure labels are taken (defect probability 0 or 1). The files are ordered by solar module, so cells are
    held out in contiguous blocks of 60: never at random, which would put one module in two splits.

    Raises:
        InputError: neither a path nor the package ``elpv-dataset`` is there.
    """
    root = Path(path) if path else _elpv_home()
    table = root / "labels.csv"
    if not table.is_file():
        raise InputError(f"no such file: {table}; expected the elpv data folder (pip install 'protopush[demo]')")
    names = tuple(classes) if classes is not None else ("functional", "defective")
    rows = [line.split() for line in table.read_text().splitlines()]
    sure = [
        (index // ELPV_BLOCK, name, float(probability))
        for index, (name, probability, kind) in enumerate(rows)
        if kind == "mono" and float(probability) in (0.0, 1.0)
    ]
    fold = {block: place % 5 for place, block in enumerate(sorted({block for block, _, _ in sure}))}
    samples = tuple(
        Sample(root / name, name, int(defect), _ELPV_FOLDS.get(fold[block], "train"), f"block {block}")
        for block, name, defect in sure
    )
    return Catalog(samples, names, root)


def _elpv_home() -> Path:
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise InputError(
            "the package elpv-dataset is not installed; pip install 'protopush[demo]', or give --data.path"
        )
    return Path(spec.origin).parent / "data"


# Every fifth block that holds sure monocrystalline cells, counted from the second: validation; from the third: test.
# With this choice both hold about as many defective as functional cells.
_ELPV_FOLDS = {1: "val", 2: "test"}


SOURCES: dict[str, Source] = {
    "folder": folder,
    "manifest": manifest,
    "elpv": elpv,
}
