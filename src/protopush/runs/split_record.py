"""Splits of a run, as its training had them: ``split.csv`` in its folder, which later commands keep to."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from protopush.data.files import atomic
from protopush.data.images import sha256_of
from protopush.data.manifest import Catalog, DataConfig, Sample
from protopush.data.sources import load_catalog
from protopush.data.table import cell_text, composed, require_columns, spreadsheet_cell
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.runs")

FILE = "split.csv"
COLUMNS = ("name", "sha256", "split", "group")
LABEL = "label"  # of newer runs
LOOKED_AT = 20  # files that say whether images are those of the training
NEW = "new"  # the split of images that came after the training, where no source says another


def write_split(folder: Path, catalog: Catalog, hashes: Mapping[str, str]) -> None:
    """Write ``split.csv``: each image's name, the SHA-256 of its file, split, group and class; none is a formula."""
    with atomic(folder / FILE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*COLUMNS, LABEL))
        for s in catalog.samples:
            row = (s.name, hashes[s.name], s.split, s.group or "", catalog.classes[s.label])
            writer.writerow(map(spreadsheet_cell, row))


def read_split(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of ``split.csv`` by name; none where the run is older than that file.

    Raises:
        InputError: it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:  # each byte counts: a name may begin or end with blanks
            reader = csv.DictReader(file, strict=True)
            require_columns(path, reader.fieldnames or (), COLUMNS)
            names = [name for name in (*COLUMNS, LABEL) if name in (reader.fieldnames or ())]
            rows = [{name: cell_text(row[name]) for name in names} for row in reader]
    except (UnicodeDecodeError, csv.Error, TypeError, AttributeError) as error:
        raise InputError(f"damaged file: {path} ({error}); take it from a copy of the run") from error
    return {row["name"]: row for row in rows}


def open_catalog(data: DataConfig, class_names: Sequence[str] | None, folder: Path) -> Catalog:
    """The samples of a source for the run in a folder; of the training's own images, each with the split it had then.

    Where training has drawn splits, images that came later have the split ``new``, and are in none of the three. What
    is new or missing is named in the log.

    Raises:
        InputError: what the source raises.
    """
    catalog = load_catalog(data.path, data.source, classes=class_names, seed=data.split_seed)
    recorded = _as_spelled(read_split(folder), {sample.name for sample in catalog.samples})
    return with_recorded(catalog, recorded) if _is_own(catalog, recorded) else catalog


def _as_spelled(recorded: dict[str, dict[str, str]], names: Set[str]) -> dict[str, dict[str, str]]:
    """A record by the names that images have now, where a copy has changed their Unicode form."""
    now = {composed(name): name for name in names - recorded.keys()}
    return {name if name in names else now.get(composed(name), name): row for name, row in recorded.items()}


def catalog_to_go_on(data: DataConfig, folder: Path) -> Catalog:
    """The images that the run in a folder was started with, in its order and splits, wherever they lie now.

    Images that came later have no part; the log names them.

    Raises:
        InputError: an image is missing, or has another class or group; or what the source raises.
    """
    catalog = load_catalog(data.path, data.source, seed=data.split_seed)
    recorded = _as_spelled(read_split(folder), {sample.name for sample in catalog.samples})
    if not recorded:
        return catalog
    found = {sample.name: sample for sample in catalog.samples}
    _refuse_others([name for name in recorded if name not in found], f"are missing under {catalog.root}", folder)
    kept = [found[name] for name in recorded]
    if new := [name for name in found if name not in recorded]:
        logger.warning("%d images came after the training began, and have no part: %s", len(new), listing(new, 3))
    differ = [
        f"{sample.name} (was {row[key]!r}, is {now!r})"
        for sample, row in zip(kept, recorded.values(), strict=True)
        for key, now in ((LABEL, catalog.classes[sample.label]), ("group", sample.group or ""))
        if row.get(key, now) != now
    ]
    _refuse_others(differ, "have another class or group", folder)
    labels = sorted({sample.label for sample in kept})  # without classes of new images alone
    samples = (
        replace(sample, label=labels.index(sample.label), split=row["split"])
        for sample, row in zip(kept, recorded.values(), strict=True)
    )
    return replace(catalog, samples=tuple(samples), classes=tuple(catalog.classes[label] for label in labels))


def refuse_changed(folder: Path, hashes: Mapping[str, str]) -> None:
    """Refuse, in an InputError that names them, files that are not those that the run was started with."""
    changed = [
        name for name, row in _as_spelled(read_split(folder), hashes.keys()).items() if hashes[name] != row["sha256"]
    ]
    _refuse_others(changed, "are other files (SHA-256)", folder)


def _refuse_others(names: Sequence[str], how: str, folder: Path) -> None:
    if names:
        raise InputError(
            f"{len(names)} images of the run in {folder} {how}: {listing(names, 5)}; expected those that it was "
            "started with; put them back, or train again with --overwrite"
        )


def with_recorded(catalog: Catalog, recorded: Mapping[str, Mapping[str, str]]) -> Catalog:
    """The catalog with the splits of a training's record."""
    samples, new = [], []
    for sample in catalog.samples:
        row = recorded.get(sample.name)
        if row is None:
            new.append(sample.name)
        split = row["split"] if row else NEW if sample.split in catalog.drawn else sample.split
        samples.append(replace(sample, split=split))
    missing = recorded.keys() - {sample.name for sample in samples}
    if new:
        logger.warning("%d images came after the training: %s", len(new), listing(new, 3))
    if missing:
        logger.warning("%d images of the training are missing: %s", len(missing), listing(sorted(missing), 3))
    return replace(catalog, samples=tuple(samples))


def never_trained(samples: Sequence[Sample], hashes: Mapping[str, str], folder: Path, split: str) -> list[Sample]:
    """The samples of a split to test on, less those whose file was trained on, under whatever name.

    Raises:
        InputError: nothing is left.
    """
    if split not in ("val", "test"):
        return list(samples)
    trained = {row["sha256"] for row in read_split(folder).values() if row["split"] == "train"}
    left = [sample for sample in samples if hashes[sample.name] not in trained]
    if len(left) < len(samples):
        gone = [sample.name for sample in samples if hashes[sample.name] in trained]
        logger.warning("left out of %r, since the run was trained on these files: %s", split, listing(gone, 3))
    if not left:
        raise InputError(f"the run was trained on every image of {split!r}; expected others; give --data.path")
    return left


def _is_own(catalog: Catalog, recorded: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether these are the images of the training, wherever they lie now: by most names, and the files of some."""
    known = [sample for sample in catalog.samples if sample.name in recorded]
    some = known[:: max(1, len(known) // LOOKED_AT)]
    same = [_digest(sample.image) == recorded[sample.name]["sha256"] for sample in some]
    return 2 * len(known) > len(recorded) and 2 * sum(same) > len(same)


def _digest(file: Path) -> str:
    try:
        return sha256_of(file)
    except OSError:
        return ""
