"""ISIC 2019 and 2020 as published, wherever unpacking the archives has put them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering
from protopush.data.sources.dermoscopy import has_part, read_part, truth_of
from protopush.data.sources.folder import (
    existing_folder,
    find_file,
    has_columns,
    images_of,
    refuse_missing,
    refuse_twice,
)
from protopush.data.table import Table, read_table
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

CLASSES_2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")  # in the order of the published columns
UNKNOWN = "UNK"  # "none of the others": of test images alone
WEIGHTS = ("score_weight", "validation_weight")  # further columns of the test set's table
METADATA_2019 = "ISIC_2019_Training_Metadata.csv"

TABLES_2020 = ("ISIC_2020_Training_GroundTruth_v2.csv", "ISIC_2020_Training_GroundTruth.csv")
KAGGLE_2020 = "train.csv"
COLUMNS_2020 = ("image_name", "patient_id", "target")
DUPLICATES_2020 = "ISIC_2020_Training_Duplicates.csv"
CLASSES_2020 = ("benign", "malignant")  # target 0, 1


def isic2019(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Eight classes of skin lesions (Combalia et al., arXiv:1908.02288), as the challenge's archives unpack.

    ``ISIC_2019_Training_Input`` holds the images, ``ISIC_2019_Training_GroundTruth.csv`` a 1 for each one's class,
    ``ISIC_2019_Training_Metadata.csv`` its lesion, where that is known: the group. ``ISIC_2019_Test_Input`` and
    ``ISIC_2019_Test_GroundTruth.csv`` are the test split; without them it is held out by lesion. Test images of the
    class UNK, which no training image has, are left out.

    Raises:
        InputError: a table or images are missing, columns are others, or a row has not exactly one class.
    """
    root = existing_folder(path, "the folder with ISIC_2019_Training_Input and its tables")
    metadata = find_file(root, METADATA_2019) or root / METADATA_2019
    expected = "the published lesion of each training image (without it one lesion would lie in two splits)"
    rows = Table(metadata, ("image", "lesion_id"), expected).rows(["image"])
    lesions = {row["image"]: row["lesion_id"] for row in rows}
    here = ["Training", *(["Test"] if has_part(root, "ISIC_2019_Test") else [])]
    columns = (*CLASSES_2019, UNKNOWN)
    parts = {part: read_part(root, f"ISIC_2019_{part}", columns, "ISIC 2019", WEIGHTS) for part in here}
    training = parts["Training"][1]
    if unlisted := [name for name in training if name not in lesions]:
        raise InputError(f"{metadata} has no row for {listing(unlisted)}; expected one for each training image")
    if alone := sum(not lesions[name] for name in training):
        logger.warning("%d of %d training images have no lesion_id: each counts as its own", alone, len(training))
    names = tuple(classes) if classes is not None else columns if UNKNOWN in training.values() else CLASSES_2019
    samples = []
    for part, (table, labels, images) in parts.items():
        known = {name: label for name, label in labels.items() if label != UNKNOWN or UNKNOWN in names}
        if len(known) < len(labels):
            logger.warning("%s: %d images of %s are left out", table, len(labels) - len(known), UNKNOWN)
        number = numbering(known.values(), names, table)
        split = "" if len(parts) == 1 else "train" if part == "Training" else "test"
        for name, label in known.items():
            group = lesions[name] or None if part == "Training" else None
            place = images[name].relative_to(root).as_posix()
            samples.append(Sample(images[name], place, number[label], split, group))
    return Catalog(tuple(samples), names, root)


def is_isic2019(root: Path) -> bool:
    """Whether a folder holds the training labels under their published name."""
    return find_file(root, truth_of("ISIC_2019_Training"), depth=1) is not None


def isic2020(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Benign against malignant (Rotemberg et al., Sci. Data 8:34, 2021), as ISIC or Kaggle hand it out.

    ``ISIC_2020_Training_GroundTruth_v2.csv``, the same without ``_v2`` or Kaggle's ``train.csv`` has ``image_name``,
    ``patient_id`` and ``target``; the JPEG images lie in ``train`` or anywhere under the path. The patient is the
    group. Of each pair in ``ISIC_2020_Training_Duplicates.csv``, where that is there, the second is left out. Labels of
    the test images are not published, so that all splits are made.

    Raises:
        InputError: the table or images are missing, a column lacks, or a target is neither 0 nor 1.
    """
    root = existing_folder(path, f"the folder with {TABLES_2020[0]} (or Kaggle's {KAGGLE_2020}) and train")
    table = find_file(root, *TABLES_2020) or find_file(root, KAGGLE_2020) or root / TABLES_2020[0]
    rows = read_table(table, COLUMNS_2020, f"ISIC 2020 ground truth ({','.join(COLUMNS_2020)},...)")
    refuse_twice((row["image_name"] for row in rows), table)
    if wrong := sorted({row["target"] for row in rows} - {"0", "1"}):
        raise InputError(f"{table} has the targets {listing(wrong)}; expected 0 (benign) or 1 (malignant)")
    if (pairs := find_file(root, DUPLICATES_2020)) is not None:
        second = {row["image_name_2"] for row in read_table(pairs, ("image_name_1", "image_name_2"), "pairs of images")}
        kept = [row for row in rows if row["image_name"] not in second]
        logger.warning("%s: %d images that are listed as duplicates are left out", pairs, len(rows) - len(kept))
        rows = kept
    else:
        logger.warning("%s is not under %s: the duplicates that it lists stay", DUPLICATES_2020, root)
    images: dict[str, Path] = {}
    for image in sorted(images_of(root), key=lambda file: "train" not in file.relative_to(root).parts[:-1]):
        images.setdefault(image.stem, image)  # of copies (resized ones) that of the published folder
    refuse_missing([row["image_name"] for row in rows], images, table, f"{root / 'train'} as JPEG (DICOM is not read)")
    names = tuple(classes) if classes is not None else CLASSES_2020
    number = numbering(CLASSES_2020, names, table)
    samples = []
    for row in rows:
        image, label = images[row["image_name"]], CLASSES_2020[int(row["target"])]
        place = image.relative_to(root).as_posix()
        samples.append(Sample(image, place, number[label], "", row["patient_id"]))
    return Catalog(tuple(samples), names, root)


def is_isic2020(root: Path) -> bool:
    """Whether a folder holds the training labels under a published name, or Kaggle's with the published columns."""
    table = find_file(root, KAGGLE_2020, depth=0)
    return find_file(root, *TABLES_2020, depth=1) is not None or (
        table is not None and has_columns(table, COLUMNS_2020)
    )
