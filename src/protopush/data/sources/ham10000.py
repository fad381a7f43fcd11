"""HAM10000 as published."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering, read_table
from protopush.data.sources.folder import images_of
from protopush.data.sources.published import DEPTH, find_file, published_root, refuse_missing, refuse_twice
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

METADATA = "HAM10000_metadata"
TEST = "ISIC2018_Task3_Test_GroundTruth"
MASK = "_segmentation"  # after the image's id
ENDINGS = (".csv", ".tab", "")  # Kaggle's, Dataverse's own format, and the original as Dataverse hands it out


def is_ham10000(root: Path) -> bool:
    """Whether a folder holds the table under its published name."""
    return _find(root, METADATA, depth=1) is not None


def ham10000(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Seven classes of skin lesions (Tschandl et al., Sci. Data 5:180161, 2018), as Dataverse or Kaggle hand them out.

    ``HAM10000_metadata`` (``.csv``, ``.tab`` or without ending) has ``lesion_id``, ``image_id`` and ``dx``; images lie
    in ``HAM10000_images_part_1`` and ``_part_2`` or anywhere under the path, masks are ``ID_segmentation.png``. With
    ``ISIC2018_Task3_Test_GroundTruth`` (the same columns) and its images they are the test split. The lesion is the
    group: whatever is held out is held out by lesion, never by image.

    Raises:
        InputError: the table or images are missing, a column lacks, or a row has no value.
    """
    root = published_root(path, f"the folder with {METADATA}.csv and the images")
    images, masks = _images_and_masks(root)
    table = _find(root, METADATA) or root / f"{METADATA}.csv"
    rows = _read(table)
    refuse_missing([row["image_id"] for row in rows], images, table, str(root / "HAM10000_images_part_1, _part_2"))
    test = _test_rows(root, images)
    number = numbering((row["dx"] for row in (*rows, *test)), classes, table)
    samples = tuple(
        Sample(
            image=images[row["image_id"]],
            name=images[row["image_id"]].relative_to(root).as_posix(),
            label=number[row["dx"]],
            split=split if test else "",
            group=row["lesion_id"],
            mask=masks.get(row["image_id"]),
        )
        for split, part in (("train", rows), ("test", test))
        for row in part
    )
    return Catalog(samples, tuple(number), root)


def _find(root: Path, stem: str, depth: int = DEPTH) -> Path | None:
    return find_file(root, *(stem + ending for ending in ENDINGS), depth=depth)


def _read(table: Path) -> list[dict[str, str]]:
    needed = ("lesion_id", "image_id", "dx")
    rows = read_table(table, needed, "HAM10000's table (lesion_id,image_id,dx,...)")
    empty = [line for line, row in enumerate(rows, start=2) if not all(row[column] for column in needed)]
    if empty:
        raise InputError(
            f"{table}: no lesion_id, image_id or dx in lines {listing(empty)}; fill them in or remove them"
        )
    refuse_twice([row["image_id"] for row in rows], table)
    return rows


def _test_rows(root: Path, images: dict[str, Path]) -> list[dict[str, str]]:
    """The rows of the test set; none where its images haven't been fetched."""
    table = _find(root, TEST)
    if table is None:
        return []
    rows = _read(table)
    if not any(row["image_id"] in images for row in rows):
        logger.warning("no image of %s is under %s: images are held out for testing instead", table.name, root)
        return []
    refuse_missing([row["image_id"] for row in rows], images, table, str(root / "ISIC2018_Task3_Test_Images"))
    return rows


def _images_and_masks(root: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Image and mask files by the image's id; of copies (resized, or Kaggle's twice) the published folder's counts."""
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    files = images_of(root)
    for file in sorted(files, key=lambda file: not _is_published(file.relative_to(root))):
        if file.stem.endswith(MASK):
            masks.setdefault(file.stem.removesuffix(MASK), file)
        else:
            images.setdefault(file.stem, file)
    return images, masks


def _is_published(place: Path) -> bool:
    return any(part.casefold().startswith(("ham10000_images", "isic2018_task3_test")) for part in place.parts[:-1])
