"""Folders of images: class folders, Hugging Face's ``imagefolder``, and what readers of published folders share."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from protopush.data.manifest import (
    SPLIT_ALIASES,
    SPLITS,
    Catalog,
    Sample,
    numbering,
    split_name,
)
from protopush.data.table import NamedFiles, Table, plain, read_table, require_columns
from protopush.data.walk import LeftOut, extensions, is_dropping, walk_images
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

SPLIT_WORDS = (*SPLITS, *SPLIT_ALIASES)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NEEDED = ("file_name", "label")
NO_METADATA = "--data.source folder takes folders as classes and no metadata"
# Names of masks beside their image (BUSI, ISIC and many more): x_mask.png, x_mask_1.png, x-segmentation.png of x.jpg.
MASK = re.compile(r"(.+?)[ _-](?:mask|segmentation|seg)s?(?:[ _-]?\d+)?", re.IGNORECASE)
DEPTH = 2  # archives that are unpacked each into a folder of its own name, and that once more


def folder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A folder of class folders, with or without folders of splits above them, named as splits are, in any case.

    Masks beside their image become its mask. What is left out - folders beside those of splits, files that are no
    images, masks of an image that has several - is counted in the log.

    Raises:
        InputError: no such folder, no images, or a class that the model doesn't know.
    """
    root = existing_folder(path, "a folder with one folder of images per class")
    return _class_folders(root, root, classes)


def imagefolder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Images with ``metadata.csv`` or ``metadata.jsonl``, or folders of splits and classes (Hugging Face's layout).

    Metadata lie at the top, in ``data``, or in any folder below; ``file_name`` is relative to them. ``label`` is the
    class; ``split`` and ``group`` are optional. Without ``split``, a folder above the image that is named as splits are
    (train, training; val, valid, validation, dev; test, testing, eval, evaluation) decides. Where there are metadata,
    folders do not name classes, as in that library.

    Raises:
        InputError: no such folder, metadata of two kinds, a column lacks, or images are missing.
    """
    root = existing_folder(path, "a folder with metadata.csv, or with train/CLASS/IMAGE")
    tables = sorted(Path(top, name) for top, _, names in os.walk(root) for name in names if name in METADATA)
    if not tables:
        top = root / "data" if (root / "data").is_dir() else root
        return _class_folders(root, top, classes)
    kinds = sorted({table.name for table in tables})
    if len(kinds) > 1 or kinds == ["metadata.parquet"]:
        raise InputError(f"{listing(kinds)} under {root}; expected metadata.csv or metadata.jsonl, of one kind")
    rows = [(table, row) for table in tables for row in _metadata(table)]
    files = {table: NamedFiles(table.parent) for table in tables}
    images = [Path(os.path.normpath(files[table].find(row["file_name"]))) for table, row in rows]
    if missing := [image.as_posix() for image in images if not image.is_file()]:
        raise InputError(
            f"{len(missing)} of {len(images)} images listed in {listing(tables, 3)} are missing: "
            f"{listing(missing, 20)}; file_name is relative to the metadata's folder"
        )
    if unlisted := {Path(os.path.normpath(image)) for image in images_of(root)} - set(images):
        names = [Path(os.path.relpath(image, root)).as_posix() for image in sorted(unlisted)]
        logger.warning("%s: %d images are not in the metadata and left out: %s", root, len(names), listing(names, 3))
    number = numbering((plain(row["label"]) for _, row in rows), classes, tables[0])
    samples = []
    for image, (_, row) in zip(images, rows, strict=True):
        place = Path(os.path.relpath(image, root))
        folder_split = next(filter(is_split, place.parts[:-1]), "")
        split = split_name(row.get("split") or folder_split)
        label, group = number[plain(row["label"])], plain(row.get("group", "")) or None
        samples.append(Sample(image, place.as_posix(), label, split, group))
    return Catalog(tuple(samples), tuple(number), root)


def is_imagefolder(root: Path) -> bool:
    """Whether there is metadata with a ``file_name`` at the top or in a folder of a split."""
    tops = (root, root / "data")
    places = (*tops, *(place for top in tops if top.is_dir() for place in _folders_of(top) if is_split(place.name)))
    return any(has_columns(place / name, NEEDED[:1]) for place in places for name in METADATA[:2])


def existing_folder(path: str, expected: str) -> Path:
    """The folder of a path; an InputError says what is ``expected`` where it isn't there."""
    root = Path(path)
    if not path or not os.path.isdir(root):  # noqa: PTH112 - Path.is_dir raises where a name is too long
        raise InputError(f"no such folder: {root if path else '(none given)'}; expected {expected}")
    return root


def images_of(root: Path) -> list[Path]:
    """The image files anywhere under a folder, hidden ones apart, in order."""
    return _sorted(walk_images(root))


def _sorted(files: Iterable[str]) -> list[Path]:
    """In the order of paths, part by part, which takes paths themselves much longer to find."""
    return list(map(Path, sorted(files, key=lambda file: file.replace(os.sep, "\0"))))


def find_file(root: Path, *names: str, depth: int = DEPTH) -> Path | None:
    """The first file of one of these names in ``root``, or in folders up to ``depth`` below; None: there is none."""
    patterns = ("*/" * level + name for level in range(depth + 1) for name in names)
    return next((file for pattern in patterns for file in sorted(root.glob(pattern)) if file.is_file()), None)


def refuse_missing(ids: Sequence[str], found: dict[str, Path], table: Path, where: str) -> None:
    """Name, in one InputError, all images that a table lists and that aren't there."""
    if missing := [name for name in ids if name not in found]:
        raise InputError(
            f"{len(missing)} of {len(ids)} images listed in {table} are missing: {listing(missing, 20)}; "
            f"expected them under {where}; unpack its archive again"
        )


def refuse_twice(ids: Iterable[str], table: Path) -> None:
    """Name, in one InputError, the images that a table lists more than once."""
    if twice := [name for name, count in Counter(ids).items() if count > 1]:
        raise InputError(f"{table} lists {len(twice)} images more than once: {listing(twice)}; keep one row for each")


def _class_folders(root: Path, top: Path, classes: Sequence[str] | None) -> Catalog:
    """The images of class folders in ``top``, or in its folders of splits; names are relative to ``root``."""
    here, left_out = _folders_of(top), LeftOut()
    splits = [(split_name(entry.name), entry) for entry in here if is_split(entry.name)]
    if splits and len(splits) < len(here):
        rest = [entry.name for entry in here if not is_split(entry.name)]
        logger.warning("%s has folders of splits; left out beside them: %s", top, listing(rest))
    places = splits or [("", top)]
    loose = [image for _, place in [("", top), *splits] for image in _images_in(place)]
    if loose:
        names = [image.relative_to(root).as_posix() for image in loose]
        logger.warning("%s: %d images in no folder of a class are left out: %s", top, len(loose), listing(names, 3))
    kinds = [(split, kind) for split, place in places for kind in _folders_of(place)]
    if deeper := [kind for _, kind in kinds if any(is_split(entry.name) for entry in _folders_of(kind))]:
        raise InputError(
            f"folders of splits lie below {listing([str(kind) for kind in deeper], 3)}; expected them above those of "
            "the classes; if that is the data, give it as --data.path"
        )
    found = [(split, kind.name, _sorted(walk_images(kind, left_out))) for split, kind in kinds]
    if not any(images for *_, images in found):
        raise InputError(f"no images under {top}; expected one folder of images per class")
    for line in left_out.in_words():
        logger.warning("%s: %s", top, line)
    masks = _masks_beside([image for *_, images in found for image in images])
    taken = {image: files[0] for image, files in masks.items() if len(files) == 1}
    if masks:
        several = f"; {len(masks) - len(taken)} images have several and get none" if len(taken) < len(masks) else ""
        logger.warning("%s: %d masks beside their images%s", top, sum(map(len, masks.values())), several)
    no_images = {file for files in masks.values() for file in files}
    # A class folder without a single image is still a class: the check of the training images names it.
    number = numbering((plain(kind.name) for _, kind in kinds), classes, top)
    start = len(str(root / "x")) - 1
    samples = tuple(
        Sample(image, image.as_posix()[start:], number[plain(kind)], split, mask=taken.get(image))
        for split, kind, images in found
        for image in images
        if image not in no_images
    )
    return Catalog(samples, tuple(number), root)


def _masks_beside(files: Sequence[Path]) -> dict[Path, list[Path]]:
    """The masks of images: files that are named as masks of another file in their folder."""
    stems = {(file.parent, file.stem.casefold()): file for file in files}
    masks: dict[Path, list[Path]] = {}
    for file in files:
        named = MASK.fullmatch(file.stem)
        image = stems.get((file.parent, named[1].casefold())) if named else None
        if image is not None:
            masks.setdefault(image, []).append(file)
    return masks


def is_split(name: str) -> bool:
    """Whether a folder's name is a word for a split, in any case."""
    return name.lower() in SPLIT_WORDS


def _images_in(root: Path) -> list[Path]:
    """The image files directly in a folder."""
    return sorted(
        entry
        for entry in root.iterdir()
        if entry.suffix.lower() in extensions() and entry.is_file() and not is_dropping(entry.name)
    )


def _folders_of(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_dropping(entry.name))


def _metadata(table: Path) -> list[dict[str, str]]:
    """The rows of metadata, each with a file and a label."""
    if table.suffix == ".csv":
        try:
            return read_table(table, NEEDED, "metadata", ("split", "group"))
        except InputError as error:
            raise InputError(f"{error}; {NO_METADATA}") from error
    try:
        lines = [json.loads(line) for line in table.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        rows = [{key: "" if value is None else str(value).strip() for key, value in line.items()} for line in lines]
    except (ValueError, AttributeError) as error:
        raise InputError(f"not JSON lines: {table} ({error}); expected one object a line, in UTF-8") from error
    try:
        require_columns(table, list(rows[0]) if rows else [], NEEDED)
    except InputError as error:
        raise InputError(f"{error}; {NO_METADATA}") from error
    if empty := [number for number, row in enumerate(rows, 1) if not all(row.get(name) for name in NEEDED)]:
        raise InputError(f"{table}: no file_name or no label in rows {listing(empty)}; fill them in or remove them")
    return rows


def has_columns(table: Path, columns: Sequence[str]) -> bool:
    """Whether the first lines of a file name the columns: a folder of images may have tables of other kinds in it."""
    if not table.is_file():
        return False
    if table.suffix == ".csv":
        try:
            return bool(Table(table, columns, "metadata").columns)
        except InputError:
            return False
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    return all(column in first for column in columns)
