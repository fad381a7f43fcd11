"""Manifests and other tables of images: samples, catalogs, and the splits that groups never share.

A manifest is a CSV ``image,label[,split][,group][,mask]`` with paths relative to it. Tables are read as people save
them: CSV or tab-separated, with or without a byte order mark, blanks around the values.
"""

from __future__ import annotations

import csv
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from protopush.errors import CountOrZero, InputError, Positive, Range, Share, did_you_mean, listing


@dataclass
class DataConfig:
    """Data of a run: which images, and how they are seen.

    Args:
        path: a folder of class folders or a manifest (CSV image,label[,split][,group][,mask]).
        source: auto, folder, manifest, imagefolder, isic2018, ham10000, medmnist or elpv (docs/data.md).
        crop_pct: share of the resized short side that the centre crop keeps.
        augment: random crops, flips and colour, where the backbone is trained.
        auto_augment: a policy of timm's on top of crops and flips, such as rand-m9-mstd0.5-inc1 or augmix-m3-w3; it
            takes the place of our own colour changes.
        random_erasing: the share of images of which a random rectangle is erased.
        flip_vertical: whether upside down is as good.
        cached_views: train on outputs of the frozen layers for so many orientations of each image, computed once: 1,
            upright; 2, also mirrored; 4, both flips; 8, with quarter turns. 0: upright where all of the backbone is
            frozen, else computed in each epoch, with augment.
        num_workers: processes that read images.
        split_seed: decides held-out images where the source has no splits.
        max_megapixels: of an image, in millions of pixels; larger ones are refused before they are decoded.
        allow_duplicates: the same file may lie in two splits or have two labels.
    """

    path: str = ""
    source: str = "auto"
    crop_pct: Annotated[float, Range(0.01, 1)] = 1.0
    augment: bool = True
    auto_augment: str = ""
    random_erasing: Share = 0.0
    flip_vertical: bool = True
    cached_views: Literal[0, 1, 2, 4, 8] = 0
    num_workers: CountOrZero = 2
    split_seed: int = 0
    max_megapixels: Positive = 100.0
    allow_duplicates: bool = False


def read_table(path: Path, required: Sequence[str], expected: str) -> list[dict[str, str]]:
    """The rows of :func:`rows_of`, all at once."""
    return list(rows_of(path, required, expected))


def rows_of(path: Path, required: Sequence[str], expected: str) -> Iterator[dict[str, str]]:
    """The rows of a table in UTF-8, one by one; the separator is a tab where the first line has one, else a comma.

    Raises:
        InputError: the file is missing, not what is ``expected``, empty, or lacks a ``required`` column.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; expected {expected}")
    row = None
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = "\t" if "\t" in file.readline() else ","
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            columns = [column.strip() for column in reader.fieldnames or []]
            reader.fieldnames = columns
            require_columns(path, columns, required)
            for row in reader:
                yield {key: (value or "").strip() for key, value in row.items() if key}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"not a CSV file: {path} ({error}); expected {expected}, in UTF-8") from error
    if row is None:
        raise InputError(f"{path} has no rows; expected one line per image")


def require_columns(path: Path, columns: Sequence[str], required: Sequence[str]) -> None:
    """Refuse a table in an InputError that names the column that lacks, and the one that was probably meant."""
    for column in required:
        if column not in columns:
            hint = did_you_mean(column, columns, "", cutoff=0.5)
            known = f"{listing(columns) or 'nothing'}{hint and f'; {hint} rename it'}"
            raise InputError(f"{path} has no column {column!r}; it has: {known}")


def refuse_empty(
    path: Path, rows: Sequence[Mapping[str, str]], columns: Sequence[str], words: str, start: int = 2
) -> None:
    """Refuse rows without a value in some column in an InputError; ``words`` name the columns and what is numbered."""
    if empty := [number for number, row in enumerate(rows, start) if not all(row.get(column) for column in columns)]:
        raise InputError(f"{path}: no {words} {listing(empty)}; fill them in or remove them")


def numbering(labels: Iterable[str], classes: Sequence[str] | None, path: Path) -> dict[str, int]:
    """The label of each class name: its place in ``classes``, or among the sorted names where no model fixes them.

    Raises:
        InputError: a name that the model doesn't know.

    Example:
        >>> numbering(["nv", "mel", "nv"], None, Path("table.csv"))
        {'mel': 0, 'nv': 1}
    """
    found = sorted(set(labels))
    names = list(classes) if classes is not None else found
    if unknown := [name for name in found if name not in names]:
        raise InputError(f"unknown labels in {path}: {listing(unknown)}; the model knows: {listing(names)}")
    return {name: number for number, name in enumerate(names)}


SPLITS = ("train", "val", "test")
# Other words for them: those that Hugging Face's datasets knows as well.
SPLIT_ALIASES = {
    "training": "train",
    "valid": "val", "validation": "val", "dev": "val",
    "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def split_name(word: str) -> str:
    """``train``, ``val`` or ``test`` for any of the usual words, in any case; another word as it is.

    Example:
        >>> split_name("Validation"), split_name("Fold3")
        ('val', 'Fold3')
    """
    known = SPLIT_ALIASES.get(word.lower(), word.lower())
    return known if known in SPLITS else word


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image file. ``name`` is its path relative to the source's root, with forward slashes."""

    image: Path
    name: str
    label: int
    split: str = ""
    group: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class Catalog:
    """What a source holds: its samples, the class names in label order, and the root that names are relative to.

    ``drawn`` are the splits that were drawn, since the source names none.
    """

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    root: Path
    drawn: tuple[str, ...] = ()

    def split(self, name: str) -> list[Sample]:
        """The samples of one split, in file order; ``all`` is every sample. None at all is an InputError."""
        found = [sample for sample in self.samples if name in (sample.split, "all")]
        if not found:
            known = listing(sorted({sample.split for sample in self.samples}))
            raise InputError(f"no image in split {name!r} under {self.root}; expected one of: {known}")
        return found


def read_manifest(path: str | Path, classes: Sequence[str] | None = None) -> Catalog:
    """Read a manifest; ``classes`` are the names in label order where a trained model fixes them.

    Raises:
        InputError: the file is missing or empty, a column lacks, a row has no value, or a label is unknown.
    """
    path = Path(path)
    rows = read_table(path, ("image", "label"), "a manifest (CSV with the columns image,label)")
    refuse_empty(path, rows, ("image", "label"), "image or no label in lines")
    number = numbering((row["label"] for row in rows), classes, path)
    root, images = path.parent, [row["image"].replace("\\", "/") for row in rows]
    names = [_below(root, image) for image in images]
    if any(name.startswith("..") for name in names):  # then the nearest folder that holds all
        places = [os.path.abspath(root / image) for image in images]
        root = Path(os.path.commonpath([os.path.abspath(root), *places]))
        names = [_below(root, place) for place in places]
    samples = []
    for image, name, row in zip(images, names, rows, strict=True):
        mask = row.get("mask", "").replace("\\", "/")
        split, group = split_name(row.get("split", "")), row.get("group") or None
        samples.append(
            Sample(path.parent / image, name, number[row["label"]], split, group, path.parent / mask if mask else None)
        )
    return Catalog(tuple(samples), tuple(number), root)


def _below(root: Path, place: str) -> str:
    """The path from a folder to a place, absolute or relative to it, with forward slashes."""
    if os.path.isabs(place):  # noqa: PTH117 - of a million rows
        place = os.path.relpath(place, root)
    return os.path.normpath(place).replace(os.sep, "/")


def with_splits(
    catalog: Catalog, seed: int = 0, val: float = 0.1, test: float = 0.2, refuse_leaks: bool = True
) -> Catalog:
    """Give each sample a split where the source has none; groups (or single images) stay together.

    Without any split, ``val`` and ``test`` shares of each class are held out. With a train but no val split,
    ``val`` is taken from train. Splits that the source names are never changed otherwise.

    Raises:
        InputError: some rows have a split and others none, or a group lies in two splits.
    """
    unsplit = [sample.name for sample in catalog.samples if not sample.split]
    splits = {sample.split for sample in catalog.samples}
    if unsplit and len(unsplit) < len(catalog.samples):
        raise InputError(f"{len(unsplit)} images have no split ({listing(unsplit, 3)}); give all a split or none")
    drawn: tuple[str, ...] = ()
    if unsplit:
        samples, drawn = _hold_out(catalog.samples, {"test": test, "val": val}, seed), SPLITS
    elif "train" in splits and "val" not in splits:
        held = _hold_out([s for s in catalog.samples if s.split == "train"], {"val": val}, seed)
        samples, drawn = (*held, *(s for s in catalog.samples if s.split != "train")), ("train", "val")
    else:
        samples = catalog.samples
    if refuse_leaks and (leaks := list(groups_in_several_splits(samples))):
        raise InputError(f"{len(leaks)} groups lie in several splits: {listing(leaks, 5)}; keep each in one split")
    return replace(catalog, samples=tuple(samples), drawn=drawn)


def _hold_out(samples: Iterable[Sample], shares: dict[str, float], seed: int) -> tuple[Sample, ...]:
    """Stratified by class, whole groups at a time (one with several classes counts for its first); the rest trains."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group or sample.name].append(sample)
    by_label: dict[int, list[str]] = defaultdict(list)
    for key, members in groups.items():
        by_label[members[0].label].append(key)
    split_of: dict[str, str] = {}
    for label, keys in sorted(by_label.items()):
        keys = sorted(keys)
        Random(f"{seed}/{label}").shuffle(keys)
        for split, share in shares.items():
            take = round(share * len(by_label[label]))
            split_of.update(dict.fromkeys(keys[:take], split))
            keys = keys[take:]
        split_of.update(dict.fromkeys(keys, "train"))
    return tuple(replace(s, split=split_of[s.group or s.name]) for s in (m for g in groups.values() for m in g))


def groups_in_several_splits(samples: Iterable[Sample]) -> dict[str, dict[str, int]]:
    """The number of samples by group and split, of the groups that lie in several splits."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        if sample.group is not None:
            groups[sample.group][sample.split] += 1
    return {group: dict(splits) for group, splits in sorted(groups.items()) if len(splits) > 1}


def refuse_duplicates(samples: Sequence[Sample], hashes: Mapping[str, str]) -> None:
    """Refuse the same file in two splits or with two labels: it would be learned and tested, or right and wrong.

    Args:
        samples: of all splits.
        hashes: SHA-256 of each file by the sample's name.

    Raises:
        InputError: names the first of them.
    """
    first: dict[str, Sample] = {}
    pairs = []
    for sample in samples:
        twin = first.setdefault(hashes[sample.name], sample)
        if (sample.split, sample.label) != (twin.split, twin.label):
            pairs.append(f"{twin.name} and {sample.name}")
    if pairs:
        raise InputError(
            f"{len(pairs)} files are the same as one in another split or with another label: {listing(pairs, 5)}; keep "
            "one of each, or give --data.allow_duplicates true"
        )


def without_images(samples: Iterable[Sample], classes: Sequence[str]) -> list[str]:
    """The classes of which there is no sample."""
    known = {sample.label for sample in samples}
    return [name for label, name in enumerate(classes) if label not in known]


def require_training_images(catalog: Catalog) -> None:
    """Refuse a class without training images, whose prototypes could never be real patches, and one class alone."""
    if missing := without_images(catalog.split("train"), catalog.classes):
        raise InputError(f"classes without a training image: {listing(missing)}; add some or leave the class out")
    if len(catalog.classes) < 2:
        raise InputError(f"only one class ({catalog.classes[0]}) under {catalog.root}; expected at least two")
