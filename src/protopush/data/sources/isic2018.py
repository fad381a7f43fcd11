"""ISIC 2018 Task 3 as published."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering, read_table
from protopush.data.sources.published import (
    find_file,
    find_folders,
    images_by_id,
    published_root,
    refuse_missing,
    refuse_twice,
)
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")  # the order of the published columns
PARTS = {"Training": "train", "Validation": "val", "Test": "test"}
GROUPINGS = "ISIC2018_Task3_Training_LesionGroupings.csv"


def is_isic2018(root: Path) -> bool:
    """Whether a folder holds the training labels under their published name."""
    return find_file(root, _table("Training"), depth=1) is not None


def isic2018(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Seven classes of skin lesions (Codella et al., arXiv:1902.03368), as the challenge's archives unpack.

    ``ISIC2018_Task3_{Training,Validation,Test}_Input`` hold the images, ``..._GroundTruth/..._GroundTruth.csv`` a 1 for
    each one's class, ``ISIC2018_Task3_Training_LesionGroupings.csv`` the lesion of each training image: its group.
    Validation and test may be absent; then training images are held out by lesion, never by image.

    Raises:
        InputError: a table or images are missing, columns are others, or a row has not exactly one class.
    """
    root = published_root(path, "the folder with ISIC2018_Task3_Training_Input and its ground truth")
    lesions = _lesions(root)
    parts = {part: _read_part(root, part) for part in PARTS if part == "Training" or _is_there(root, part)}
    names = tuple(classes) if classes is not None else CLASSES
    only = len(parts) == 1  # then all three splits are made of it
    samples = []
    for part, (table, rows, images) in parts.items():
        known = numbering(rows.values(), names, table)
        for name, label in rows.items():
            group = lesions.get(name) if part == "Training" else None
            if part == "Training" and group is None:
                raise InputError(f"{GROUPINGS} has no lesion for {name}; expected one for each training image")
            place = images[name].relative_to(root).as_posix()
            samples.append(Sample(images[name], place, known[label], "" if only else PARTS[part], group))
    return Catalog(tuple(samples), names, root)


def _table(part: str) -> str:
    return f"ISIC2018_Task3_{part}_GroundTruth.csv"


def _is_there(root: Path, part: str) -> bool:
    table, folders = find_file(root, _table(part)), find_folders(root, f"ISIC2018_Task3_{part}_Input")
    if (table is None) != (not folders):
        lacks = _table(part) if table is None else f"ISIC2018_Task3_{part}_Input"
        logger.warning("%s is not under %s: its split is left out", lacks, root)
    return table is not None and bool(folders)


def _read_part(root: Path, part: str) -> tuple[Path, dict[str, str], dict[str, Path]]:
    """The table's path, the class of each image, and the file of each image."""
    table = find_file(root, _table(part)) or root / _table(part).removesuffix(".csv") / _table(part)
    rows = read_table(table, ("image", *CLASSES), f"ISIC 2018 Task 3 ground truth (image,{','.join(CLASSES)})")
    unknown = [column for column in rows[0] if column not in ("image", *CLASSES)]
    if unknown:
        raise InputError(f"unknown class columns in {table}: {listing(unknown)}; expected: {', '.join(CLASSES)}")
    refuse_twice([row["image"] for row in rows], table)
    labels = {row["image"]: [name for name in CLASSES if _is_one(row[name], table)] for row in rows}
    wrong = [name for name, found in labels.items() if len(found) != 1]
    if wrong:
        raise InputError(
            f"{table}: not exactly one class in the rows of {listing(wrong)}; expected one 1.0 and six 0.0"
        )
    folder = f"ISIC2018_Task3_{part}_Input"
    images = images_by_id(find_folders(root, folder))
    refuse_missing(list(labels), images, table, str(root / folder))
    return table, {name: found[0] for name, found in labels.items()}, images


def _is_one(value: str, table: Path) -> bool:
    try:
        return {0.0: False, 1.0: True}[float(value)]
    except (ValueError, KeyError) as error:
        raise InputError(f"{table} has the value {value!r}; expected 0.0 or 1.0 for each class") from error


def _lesions(root: Path) -> dict[str, str]:
    table = find_file(root, GROUPINGS) or root / GROUPINGS
    expected = "the published lesion of each training image (without it one lesion would lie in two splits)"
    return {row["image"]: row["lesion_id"] for row in read_table(table, ("image", "lesion_id"), expected)}
