"""The layout that the ``datasets`` library calls ``imagefolder``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from protopush.data.manifest import (
    SPLIT_ALIASES,
    SPLITS,
    Catalog,
    Sample,
    numbering,
    read_table,
    require_columns,
    split_name,
)
from protopush.data.sources.folder import class_folders
from protopush.data.sources.published import published_root
from protopush.errors import InputError, listing

SPLIT_WORDS = (*SPLITS, *SPLIT_ALIASES)
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
NEEDED = ("file_name", "label")


def is_imagefolder(root: Path) -> bool:
    """Whether there is metadata with ``file_name`` and ``label`` at the top or in a folder of a split."""
    tops = (root, root / "data")
    places = (*tops, *(top / word for top in tops for word in SPLIT_WORDS))
    return any(_is_metadata(place / name) for place in places for name in METADATA)


def imagefolder(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Images with ``metadata.csv`` or ``metadata.jsonl``, or folders of splits and classes (Hugging Face's layout).

    Metadata lie at the top, in ``data``, or in any folder below; ``file_name`` is relative to them. ``label`` is the
    class; ``split`` and ``group`` are optional. Without ``split``, a folder above the image that is named as splits are
    (train, training; val, valid, validation, dev; test, testing, eval, evaluation) decides. Where there are metadata,
    folders do not name classes, as in that library.

    Raises:
        InputError: no such folder, metadata of two kinds, a column lacks, or images are missing.
    """
    root = published_root(path, "a folder with metadata.csv, or with train/CLASS/IMAGE")
    tables = sorted(Path(top, name) for top, _, names in os.walk(root) for name in names if name in METADATA)
    if not tables:
        top = root / "data" if (root / "data").is_dir() else root
        return class_folders(root, top, SPLIT_WORDS, classes)
    kinds = sorted({table.name for table in tables})
    if len(kinds) > 1 or kinds == ["metadata.parquet"]:
        raise InputError(f"{listing(kinds)} under {root}; expected metadata.csv or metadata.jsonl, of one kind")
    rows = [(table, row) for table in tables for row in _rows(table)]
    images = [Path(os.path.normpath(table.parent / row["file_name"].replace("\\", "/"))) for table, row in rows]
    missing = [image.as_posix() for image in images if not image.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(images)} images listed in {listing(tables, 3)} are missing: "
            f"{listing(missing, 20)}; file_name is relative to the metadata's folder"
        )
    number = numbering((row["label"] for _, row in rows), classes, tables[0])
    samples = tuple(
        Sample(
            image=image,
            name=Path(os.path.relpath(image, root)).as_posix(),
            label=number[row["label"]],
            split=split_name(row.get("split", "")) or _split_of(image, root),
            group=row.get("group") or None,
        )
        for image, (_, row) in zip(images, rows, strict=True)
    )
    return Catalog(samples, tuple(number), root)


def _rows(table: Path) -> list[dict[str, str]]:
    """The rows of metadata, each with a file and a label."""
    rows = read_table(table, NEEDED, "metadata") if table.suffix == ".csv" else list(_json_lines(table))
    require_columns(table, list(rows[0]) if rows else [], NEEDED)
    empty = [line for line, row in enumerate(rows, start=1) if not all(row.get(column) for column in NEEDED)]
    if empty:
        raise InputError(f"{table}: no file_name or no label in rows {listing(empty)}; fill them in or remove them")
    return rows


def _json_lines(table: Path) -> Iterator[dict[str, str]]:
    try:
        for line in table.read_text(encoding="utf-8-sig").splitlines():
            if line.strip():
                yield {key: _text(value) for key, value in json.loads(line).items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"not JSON lines: {table} ({error}); expected one object a line, in UTF-8") from error


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _split_of(image: Path, root: Path) -> str:
    """The split that a folder between the root and the image names, the nearest to the root; or none."""
    words = (word for word in Path(os.path.relpath(image, root)).parts[:-1] if word in SPLIT_WORDS)
    return split_name(next(words, ""))


def _is_metadata(table: Path) -> bool:
    """Read the first line alone: a folder of class folders may have metadata of another kind beside it."""
    if not table.is_file() or table.suffix == ".parquet":
        return False
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        first = file.readline()
    return all(column in first for column in NEEDED)
