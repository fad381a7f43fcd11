"""Dermoscopy as published: ISIC 2018 Task 3 and HAM10000, wherever unpacking the archives has put them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering
from protopush.data.sources.folder import DEPTH, existing_folder, find_file, images_of, refuse_missing, refuse_twice
from protopush.data.table import labelled, read_table
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")  # of ISIC 2018, in the order of the published columns
PARTS = {"Training": "train", "Validation": "val", "Test": "test"}
GROUPINGS = "ISIC2018_Task3_Training_LesionGroupings.csv"

METADATA = "HAM10000_metadata"
TEST = "ISIC2018_Task3_Test_GroundTruth"  # the test set of HAM10000's authors, as a table like METADATA
COLUMNS = ("lesion_id", "image_id", "dx")
MASK = "_segmentation"  # after the image's id
ENDINGS = (".csv", ".tab", "")  # Kaggle's, Dataverse's own format, and the original as Dataverse hands it out


def isic2018(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Seven classes of skin lesions (Codella et al., arXiv:1902.03368), as the challenge's archives unpack.

    ``ISIC2018_Task3_{Training,Validation,Test}_Input`` hold the images, ``..._GroundTruth/..._GroundTruth.csv`` a 1 for
    each one's class, ``ISIC2018_Task3_Training_LesionGroupings.csv`` the lesion of each training image: its group.
    Validation and test may be absent; then training images are held out by lesion, never by image.

    Raises:
        InputError: a table or images are missing, columns are others, or a row has not exactly one class.
    """
    root = existing_folder(path, "the folder with ISIC2018_Task3_Training_Input and its ground truth")
    table = find_file(root, GROUPINGS) or root / GROUPINGS
    expected = "the published lesion of each training image (without it one lesion would lie in two splits)"
    lesions = {row["image"]: row["lesion_id"] for row in read_table(table, ("image", "lesion_id"), expected)}
    parts = {part: _read_part(root, part) for part in PARTS if part == "Training" or _has_part(root, part)}
    names = tuple(classes) if classes is not None else CLASSES
    samples = []
    for part, (table, labels, images) in parts.items():
        number = numbering(labels.values(), names, table)
        split = PARTS[part] if len(parts) > 1 else ""  # of training images alone all three splits are made
        for name, label in labels.items():
            group = lesions.get(name) if part == "Training" else None
            if part == "Training" and group is None:
                raise InputError(f"{GROUPINGS} has no lesion for {name}; expected one for each training image")
            place = images[name].relative_to(root).as_posix()
            samples.append(Sample(images[name], place, number[label], split, group))
    return Catalog(tuple(samples), names, root)


def is_isic2018(root: Path) -> bool:
    """Whether a folder holds the training labels under their published name."""
    return find_file(root, _truth("Training"), depth=1) is not None


def ham10000(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Seven classes of skin lesions (Tschandl et al., Sci. Data 5:180161, 2018), as Dataverse or Kaggle hand them out.

    ``HAM10000_metadata`` (``.csv``, ``.tab`` or without ending) has ``lesion_id``, ``image_id`` and ``dx``; images lie
    in ``HAM10000_images_part_1`` and ``_part_2`` or anywhere under the path, masks are ``ID_segmentation.png``. With
    ``ISIC2018_Task3_Test_GroundTruth`` (the same columns) and its images they are the test split. The lesion is the
    group: whatever is held out is held out by lesion, never by image.

    Raises:
        InputError: the table or images are missing, a column lacks, or a row has no value.
    """
    root = existing_folder(path, f"the folder with {METADATA}.csv and the images")
    images, masks = _images_and_masks(root)
    table = _find_table(root, METADATA) or root / f"{METADATA}.csv"
    rows = _read_metadata(table)
    refuse_missing([row["image_id"] for row in rows], images, table, str(root / "HAM10000_images_part_1, _part_2"))
    test: list[dict[str, str]] = []
    if (test_table := _find_table(root, TEST)) is not None:
        test = _read_metadata(test_table)
        ids = [row["image_id"] for row in test]
        if images.keys().isdisjoint(ids):
            logger.warning("no image of %s is under %s: images are held out for testing instead", test_table.name, root)
            test = []
        else:
            refuse_missing(ids, images, test_table, str(root / "ISIC2018_Task3_Test_Images"))
    number = numbering((row["dx"] for row in (*rows, *test)), classes, table)
    samples = []
    for split, part in (("train" if test else "", rows), ("test", test)):
        for row in part:
            image, mask = images[row["image_id"]], masks.get(row["image_id"])
            place = image.relative_to(root).as_posix()
            samples.append(Sample(image, place, number[row["dx"]], split, row["lesion_id"], mask))
    return Catalog(tuple(samples), tuple(number), root)


def is_ham10000(root: Path) -> bool:
    """Whether a folder holds the table under its published name."""
    return _find_table(root, METADATA, depth=1) is not None


def _truth(part: str) -> str:
    return f"ISIC2018_Task3_{part}_GroundTruth.csv"


def _input_folders(root: Path, part: str) -> list[Path]:
    """The image folders of a part (upper or lower case) in ``root`` or one level below."""
    name = f"ISIC2018_Task3_{part}_Input".casefold()
    found = (entry for pattern in ("*", "*/*") for entry in sorted(root.glob(pattern)))
    return [entry for entry in found if entry.name.casefold() == name and entry.is_dir()]


def _has_part(root: Path, part: str) -> bool:
    table, folders = find_file(root, _truth(part)), _input_folders(root, part)
    if (table is None) != (not folders):
        lacks = _truth(part) if table is None else f"ISIC2018_Task3_{part}_Input"
        logger.warning("%s is not under %s: its split is left out", lacks, root)
    return table is not None and bool(folders)


def _read_part(root: Path, part: str) -> tuple[Path, dict[str, str], dict[str, Path]]:
    """The table's path, the class of each image, and the file of each image."""
    table = find_file(root, _truth(part)) or root / _truth(part).removesuffix(".csv") / _truth(part)
    rows = read_table(table, ("image", *CLASSES), f"ISIC 2018 Task 3 ground truth (image,{','.join(CLASSES)})")
    if unknown := [column for column in rows[0] if column not in ("image", *CLASSES)]:
        raise InputError(f"unknown class columns in {table}: {listing(unknown)}; expected: {', '.join(CLASSES)}")
    refuse_twice((row["image"] for row in rows), table)
    labels = {row["image"]: row["label"] for row in labelled(rows, CLASSES, table)}
    images: dict[str, Path] = {}
    for folder in _input_folders(root, part):
        for image in images_of(folder):
            images.setdefault(image.stem, image)  # the first where there are copies (Kaggle has some)
    refuse_missing(list(labels), images, table, str(root / f"ISIC2018_Task3_{part}_Input"))
    return table, labels, images


def _find_table(root: Path, stem: str, depth: int = DEPTH) -> Path | None:
    return find_file(root, *(stem + ending for ending in ENDINGS), depth=depth)


def _read_metadata(table: Path) -> list[dict[str, str]]:
    rows = read_table(table, COLUMNS, "HAM10000's table (lesion_id,image_id,dx,...)")
    refuse_twice((row["image_id"] for row in rows), table)
    return rows


def _images_and_masks(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Image and mask files by the image's id; of copies (resized, or Kaggle's twice) the published folder's counts."""
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}

    def published(file: Path) -> bool:
        folders = file.relative_to(root).parts[:-1]
        return any(name.casefold().startswith(("ham10000_images", "isic2018_task3_test")) for name in folders)

    for file in sorted(images_of(root), key=lambda file: not published(file)):
        if file.stem.endswith(MASK):
            masks.setdefault(file.stem.removesuffix(MASK), file)
        else:
            images.setdefault(file.stem, file)
    return images, masks
