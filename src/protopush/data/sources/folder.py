"""Folders of images: class folders, Hugging Face's ``imagefolder``, and what readers of published folders share."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from protopush.data.images import EXTENSIONS
from protopush.data.manifest import (
    SPLIT_ALIASES,
    SPLITS,
    Catalog,
    Sample,
    numbering,
    read_table,
    refuse_empty,
    require_columns,
    split_name,
)
from protopush.errors import InputError, listing

SPLIT_WORDS = (*SPLITS, *SPLIT_ALIASES)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NEEDED = ("file_name", "label")
DEPTH = 2  # archives that are unpacked each into a folder of its own name, and that once more


def folder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """A folder of class folders, with or without train / val / test folders above them.

    Raises:
        InputError: no such folder, no images, or a class that the model doesn't know.
    """
    root = existing_folder(path, "a folder with one folder of images per class")
    return _class_folders(root, root, (*SPLITS, "valid", "validation"), classes)


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
        return _class_folders(root, top, SPLIT_WORDS, classes)
    kinds = sorted({table.name for table in tables})
    if len(kinds) > 1 or kinds == ["metadata.parquet"]:
        raise InputError(f"{listing(kinds)} under {root}; expected metadata.csv or metadata.jsonl, of one kind")
    rows = [(table, row) for table in tables for row in _metadata(table)]
    images = [Path(os.path.normpath(table.parent / row["file_name"].replace("\\", "/"))) for table, row in rows]
    if missing := [image.as_posix() for image in images if not image.is_file()]:
        raise InputError(
            f"{len(missing)} of {len(images)} images listed in {listing(tables, 3)} are missing: "
            f"{listing(missing, 20)}; file_name is relative to the metadata's folder"
        )
    number = numbering((row["label"] for _, row in rows), classes, tables[0])
    samples = []
    for image, (_, row) in zip(images, rows, strict=True):
        place = Path(os.path.relpath(image, root))
        folder_split = next((word for word in place.parts[:-1] if word in SPLIT_WORDS), "")
        split = split_name(row.get("split") or folder_split)
        samples.append(Sample(image, place.as_posix(), number[row["label"]], split, row.get("group") or None))
    return Catalog(tuple(samples), tuple(number), root)


def is_imagefolder(root: Path) -> bool:
    """Whether there is metadata with ``file_name`` and ``label`` at the top or in a folder of a split."""
    tops = (root, root / "data")
    places = (*tops, *(top / word for top in tops for word in SPLIT_WORDS))
    return any(_has_needed_columns(place / name) for place in places for name in METADATA[:2])


def existing_folder(path: str, expected: str) -> Path:
    """The folder of a path; an InputError says what is ``expected`` where it isn't there."""
    root = Path(path)
    if not path or not root.is_dir():
        raise InputError(f"no such folder: {root if path else '(none given)'}; expected {expected}")
    return root


def images_of(root: Path) -> list[Path]:
    """The image files anywhere under a folder, hidden ones apart, in order."""
    found = (Path(top, name) for top, _, names in os.walk(root) for name in names if not name.startswith("."))
    return sorted(path for path in found if path.suffix.lower() in EXTENSIONS)


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


def _class_folders(root: Path, top: Path, split_words: Sequence[str], classes: Sequence[str] | None) -> Catalog:
    """The images of class folders in ``top``, or in its folders of ``split_words``; names are relative to ``root``."""
    splits = [(split_name(entry.name), entry) for entry in _folders_of(top) if entry.name in split_words]
    kinds = [(split, kind) for split, place in splits or [("", top)] for kind in _folders_of(place)]
    labelled = [(split, kind.name, image) for split, kind in kinds for image in images_of(kind)]
    if not labelled:
        raise InputError(f"no images under {top}; expected one folder of images per class")
    # A class folder without a single image is still a class: the check of the training images names it.
    number = numbering((kind.name for _, kind in kinds), classes, top)
    samples = tuple(
        Sample(image, image.relative_to(root).as_posix(), number[kind], split) for split, kind, image in labelled
    )
    return Catalog(samples, tuple(number), root)


def _folders_of(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _metadata(table: Path) -> list[dict[str, str]]:
    """The rows of metadata, each with a file and a label."""
    if table.suffix == ".csv":
        rows = read_table(table, NEEDED, "metadata")
    else:
        try:
            lines = [json.loads(line) for line in table.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
            rows = [{key: "" if value is None else str(value).strip() for key, value in line.items()} for line in lines]
        except (ValueError, AttributeError) as error:
            raise InputError(f"not JSON lines: {table} ({error}); expected one object a line, in UTF-8") from error
    require_columns(table, list(rows[0]) if rows else [], NEEDED)
    refuse_empty(table, rows, NEEDED, "file_name or no label in rows", start=1)
    return rows


def _has_needed_columns(table: Path) -> bool:
    """Read the first line alone: a folder of class folders may have metadata of another kind beside it."""
    if not table.is_file():
        return False
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    return all(column in first for column in NEEDED)
