"""Manifests of images: samples, catalogs, and the splits that groups never share.

A manifest is a CSV ``image,label[,split][,group][,mask]`` with paths relative to it.
"""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from protopush.data.table import NamedFiles, Table, is_one, labelled, plain, require_columns
from protopush.errors import CountOrZero, InputError, Positive, Range, Share, listing

logger = logging.getLogger("protopush.data")


@dataclass
class DataConfig:
    """Data of a run: which images, and how they are seen.

    Args:
        path: a folder of class folders, a manifest (CSV image,label[,split][,group][,mask]), or shards (tar, Parquet).
        source: auto, folder, manifest, imagefolder, isic2018, isic2019, isic2020, ham10000, shards, medmnist or elpv
            (docs/data.md).
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


ISIC = re.compile(r"ISIC_\d{7}", re.IGNORECASE)
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


FIELDS = ("label", "split", "group", "mask")
GROUPS = ("patient_id", "lesion_id")  # a column ``group`` under its usual names; a patient has all of his lesions
MANIFEST = "a manifest (CSV with the columns image,label)"


def manifest_rows(path: Path, expected: str = MANIFEST, label_needed: bool = True) -> Iterator[dict[str, str]]:
    """The rows of a manifest, each with ``image``, the path of its file, and perhaps ``label``, ``split``, ``group``.

    Where there is no column ``label``, the others may be a class each, with 1 in the rows of its images.

    Raises:
        InputError: no such file, a column lacks, a value lacks, or it is not clear which file is meant.
    """
    table, files = Table(path, ("image",), expected, (*FIELDS, *GROUPS)), NamedFiles(path.parent)
    group = next((name for name in ("group", *GROUPS) if name in table.columns), None)
    classes = [] if "label" in table.columns else _class_columns(table)
    needed = ("label",) if label_needed and not classes else ()
    require_columns(path, table.columns, needed)
    rows = table.rows(("image", *needed, *classes))
    rows = labelled(rows, classes, path) if classes else rows
    unused = set(classes)
    for row in rows:
        row |= {name: plain(row[name]) for name in ("label", group) if name in row}
        unused.discard(row.get("label", ""))
        yield row | {"image": files.find(row["image"]), "group": row.get(group or "", "")}
    if unused:
        logger.warning("%s: no image has a 1 in %s, which is no class then", path, listing(sorted(unused)))


def _class_columns(table: Table) -> list[str]:
    """The columns that can only be classes: two or more, and the first row has 0 or 1 in each."""
    names = [name for name in table.columns if name and name not in ("image", *FIELDS, *GROUPS)]
    first = next(table.rows(), {})
    return names if len(names) > 1 and all(is_one(first[name]) is not None for name in names) else []


def read_manifest(path: str | Path, classes: Sequence[str] | None = None) -> Catalog:
    """Read a manifest; ``classes`` are the names in label order where a trained model fixes them.

    Raises:
        InputError: the file is missing or empty, a column lacks, a row has no value, or a label is unknown.
    """
    path = Path(path)
    rows = list(manifest_rows(path))
    number = numbering((row["label"] for row in rows), classes, path)
    root, images, files = path.parent, [row["image"] for row in rows], NamedFiles(path.parent)
    names = _below(root, images)
    if any(name.startswith("..") for name in names):  # then the nearest folder that holds all
        places = [os.path.abspath(image) for image in images]
        root = Path(os.path.commonpath([os.path.abspath(root), *places]))
        names = _below(root, places)
    samples = []
    for image, name, row in zip(images, names, rows, strict=True):
        mask = Path(files.find(row["mask"])) if row.get("mask") else None
        split, group = split_name(row.get("split", "")), row["group"] or None
        samples.append(Sample(Path(image), name, number[row["label"]], split, group, mask))
    return Catalog(tuple(samples), tuple(number), root)


def _below(root: Path, places: Sequence[str]) -> list[str]:
    """The paths from a folder to places, with forward slashes; quick where they begin with the folder's own path."""
    start = "" if root == Path() else os.path.join(root, "")  # noqa: PTH118 - of a million rows
    names = []
    for place in places:
        inner = place[len(start) :] if place.startswith(start) else os.path.sep
        names.append(os.path.normpath(os.path.relpath(place, root) if os.path.isabs(inner) else inner))  # noqa: PTH117
    return [name.replace(os.sep, "/") for name in names]


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
    """By a hash of the group (of the name, without one): images keep their split when others are added or taken away.

    A group with several classes counts for its first. In each class a split has at least one group (if its share comes
    to one) and at most twice its share; only where a class is so small that this counts can an image change its split.
    """
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.group or sample.name].append(sample)
    by_label: dict[int, list[tuple[float, str]]] = defaultdict(list)
    for key, members in groups.items():
        digest = sha256(f"{seed}/{key}".encode("utf-8", "surrogateescape")).digest()
        by_label[members[0].label].append((int.from_bytes(digest[:8], "big") / 2**64, key))
    split_of: dict[str, str] = {}
    for keys in by_label.values():
        keys.sort()
        start, place = 0, 0.0
        for split, share in shares.items():
            place += share
            least, most = min(1, round(share * len(keys))), int(2 * share * len(keys))
            end = start + min(max(bisect(keys, (place,)) - start, least), most)
            split_of.update((key, split) for _, key in keys[start:end])
            start = end
    return tuple(replace(s, split=split_of.get(s.group or s.name, "train")) for s in samples)


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


# Control characters, ends of lines, and bytes of a file name that are no UTF-8 (surrogates).
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_names(catalog: Catalog) -> None:
    """Refuse names that no table, page or terminal can hold as they are, of images, classes and groups.

    Where files are named as ISIC's, which shows many a lesion on several images, and no group is known, the log says
    what is missing.

    Raises:
        InputError: names have control characters or are no UTF-8.
    """
    groups = sorted({sample.group for sample in catalog.samples if sample.group})
    names = (str(catalog.root), *catalog.classes, *(sample.name for sample in catalog.samples), *groups)
    if bad := [ascii(name) for name in names if UNPRINTABLE.search(name)]:
        raise InputError(
            f"{len(bad)} names of files, classes or groups are no UTF-8 or hold control characters: {listing(bad, 5)}; "
            "expected text that can be printed; rename them"
        )
    named = sum(ISIC.match(sample.image.name) is not None for sample in catalog.samples)
    if 2 * named > len(catalog.samples) and not groups:
        logger.warning(
            "%d images are named as in the ISIC archive, and no group is known: photographs of one lesion may lie in "
            "two splits; add a column group (or lesion_id, of the archive's metadata) to a manifest",
            named,
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
