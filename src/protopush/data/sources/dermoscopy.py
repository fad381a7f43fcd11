"""Dermoscopy as published: ISIC 2018 Task 3 and HAM10000, wherever unpacking the archives has put them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering, split_name
from protopush.data.sources.folder import (
    DEPTH,
    existing_folder,
    find_file,
    images_of,
    is_split,
    refuse_missing,
    refuse_twice,
)
from protopush.data.table import labelled, read_table
from protopush.data.walk import walk_images
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

TASK = "ISIC2018_Task3"
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
    here = [part for part in PARTS if part == "Training" or has_part(root, f"{TASK}_{part}")]
    parts = {part: read_part(root, f"{TASK}_{part}", CLASSES, "ISIC 2018 Task 3") for part in here}
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
    return find_file(root, truth_of(f"{TASK}_Training"), depth=1) is not None


def ham10000(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Seven classes of skin lesions (Tschandl et al., Sci. Data 5:180161, 2018), as Dataverse or Kaggle hand them out.

    ``HAM10000_metadata`` (``.csv``, ``.tab`` or without ending) has ``lesion_id``, ``image_id`` and ``dx``; images lie
    in ``HAM10000_images_part_1`` and ``_part_2`` or anywhere under the path, masks are ``ID_segmentation.png``. With
    ``ISIC2018_Task3_Test_GroundTruth`` (the same columns) and its images they are the test split. The lesion is the
    group: whatever is held out is held out by lesion, never by image.

    Images that somebody has sorted into folders of classes (``mel/ISIC_0024310.jpg``, or ``malignant``; with or without
    folders of splits above) stay in them, all or some of those that are published; the table lies inside or beside.

    Raises:
        InputError: the table or images are missing, a column lacks, a row has no value, or a class folder holds an
            image of another class or one that the table doesn't list.
    """
    root = existing_folder(path, f"the folder with {METADATA}.csv and the images")
    table = _find_table(root, METADATA) or _find_table(root.parent, METADATA, 0) or root / f"{METADATA}.csv"
    rows = _read_metadata(table)
    by_id = {row["image_id"]: row for row in rows}
    if sorted_into := _class_folders(root, by_id):
        return _sorted(root, sorted_into, by_id, classes, table)
    images, masks = _images_and_masks(root)
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
    """Whether a folder holds the table under its published name, or images of ISIC's and the table lies beside it."""
    if _find_table(root, METADATA, depth=1) is not None:
        return True
    first = next(walk_images(root), "") if _find_table(root.parent, METADATA, depth=0) is not None else ""
    return Path(first).name.startswith("ISIC_")


def truth_of(part: str) -> str:
    """The name of a part's table: ``ISIC_2019_Training`` is such a part."""
    return f"{part}_GroundTruth.csv"


def _input_folders(root: Path, part: str) -> list[Path]:
    """The image folders of a part (upper or lower case) in ``root`` or one level below."""
    name = f"{part}_Input".casefold()
    found = (entry for pattern in ("*", "*/*") for entry in sorted(root.glob(pattern)))
    return [entry for entry in found if entry.name.casefold() == name and entry.is_dir()]


def has_part(root: Path, part: str) -> bool:
    """Whether the table and the images of a part are there; one without the other is named in the log."""
    table, folders = find_file(root, truth_of(part)), _input_folders(root, part)
    if (table is None) != (not folders):
        lacks = truth_of(part) if table is None else f"{part}_Input"
        logger.warning("%s is not under %s: its split is left out", lacks, root)
    return table is not None and bool(folders)


def read_part(
    root: Path, part: str, classes: Sequence[str], title: str, more: Sequence[str] = ()
) -> tuple[Path, dict[str, str], dict[str, Path]]:
    """The table's path, the class of each image, and the file of each image.

    Args:
        root: where the archives are unpacked.
        part: the beginning of the published names.
        classes: the columns with a 1 for an image's class.
        title: of the data, for error lines.
        more: columns that may be there and say nothing of the class.
    """
    table = find_file(root, truth_of(part)) or root / truth_of(part).removesuffix(".csv") / truth_of(part)
    rows = read_table(table, ("image", *classes), f"{title} ground truth (image,{','.join(classes)})")
    if unknown := [column for column in rows[0] if column not in ("image", *classes, *more)]:
        raise InputError(f"unknown class columns in {table}: {listing(unknown)}; expected: {', '.join(classes)}")
    refuse_twice((row["image"] for row in rows), table)
    labels = {row["image"]: row["label"] for row in labelled(rows, classes, table)}
    images: dict[str, Path] = {}
    for folder in _input_folders(root, part):
        for image in images_of(folder):
            images.setdefault(image.stem, image)  # the first where there are copies (Kaggle has some)
    refuse_missing(list(labels), images, table, str(root / f"{part}_Input"))
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

    for file in sorted(images_of(root), key=lambda file: not _is_published(file.relative_to(root))):
        if file.stem.endswith(MASK):
            masks.setdefault(file.stem.removesuffix(MASK), file)
        else:
            images.setdefault(file.stem, file)
    return images, masks


def _is_published(place: Path) -> bool:
    """Whether a file lies in a folder of its published name."""
    return any(name.casefold().startswith(("ham10000_images", "isic2018_task3_test")) for name in place.parts[:-1])


def _class_folders(root: Path, rows: Mapping[str, Mapping[str, str]]) -> list[Path]:
    """The images, where all lie in folders of classes; else none.

    These are named as the table's classes are, or, under names of one's own, each holds all images of its classes.
    """
    images = [image for image in images_of(root) if not image.stem.endswith(MASK)]
    if any(image.parent == root or _is_published(image.relative_to(root)) for image in images):
        return []
    names, classes = {image.parent.name for image in images}, {row["dx"].casefold() for row in rows.values()}
    pairs = {(rows[image.stem]["dx"], image.parent.name) for image in images if image.stem in rows}
    own = len(names) > 1 and len(pairs) == len({dx for dx, _ in pairs}) > 0
    return images if own or all(name.casefold() in classes for name in names) else []


def _sorted(
    root: Path,
    images: Sequence[Path],
    rows: Mapping[str, Mapping[str, str]],
    classes: Sequence[str] | None,
    table: Path,
) -> Catalog:
    """The catalog of images in class folders, with the lesions of the table's ``rows``."""
    if unlisted := [image.name for image in images if image.stem not in rows]:
        raise InputError(
            f"{len(unlisted)} images under {root} are not in {table}: {listing(unlisted)}; without its lesion an image "
            "may lie in two splits; remove them, or say --data.source folder"
        )
    known = {row["dx"].casefold(): row["dx"] for row in rows.values()}
    labels = [known.get(image.parent.name.casefold(), image.parent.name) for image in images]
    pairs = [(image, label) for image, label in zip(images, labels, strict=True) if label in known.values()]
    if wrong := [image.relative_to(root).as_posix() for image, label in pairs if label != rows[image.stem]["dx"]]:
        raise InputError(
            f"{len(wrong)} images lie in the folder of another class than {table} says: {listing(wrong)}; move them"
        )
    number, masks = numbering(labels, classes, table), _images_and_masks(root)[1]
    samples = []
    for image, label in zip(images, labels, strict=True):
        place, lesion = image.relative_to(root), rows[image.stem]["lesion_id"]
        split = next((split_name(word) for word in place.parts[:-2] if is_split(word)), "")
        samples.append(Sample(image, place.as_posix(), number[label], split, lesion, masks.get(image.stem)))
    return Catalog(tuple(samples), tuple(number), root)
