"""A manifest is a CSV ``image,label[,split][,group][,mask]`` with paths relative to it."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from protopush.data.tables import numbering, read_table
from protopush.errors import InputError, listing

SPLITS = ("train", "val", "test")
# Other words for them: those that Hugging Face's datasets knows as well.
SPLIT_ALIASES = {
    "training": "train",
    "valid": "val", "validation": "val", "dev": "val",
    "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


def split_name(word: str) -> str:
    """``train``, ``val`` or ``test`` for any of the usual words; another word as it is.

    Example:
        >>> split_name("validation"), split_name("fold3")
        ('val', 'fold3')
    """
    return SPLIT_ALIASES.get(word, word)


@dataclass(frozen=True)
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
    """What a source holds: its samples, the class names in label order, and the root that names are relative to."""

    samples: tuple[Sample, ...]
    classes: tuple[str, ...]
    root: Path

    def split(self, name: str) -> list[Sample]:
        """The samples of one split, in file order; ``all`` is every sample.

        Raises:
            InputError: the split is empty or unknown.
        """
        found = [sample for sample in self.samples if name in (sample.split, "all")]
        if not found:
            known = listing(sorted({sample.split for sample in self.samples}))
            raise InputError(f"no image in split {name!r} under {self.root}; expected one of: {known}")
        return found


def read_manifest(path: str | Path, classes: Sequence[str] | None = None) -> Catalog:
    """Read a manifest.

    Args:
        path: the CSV file.
        classes: class names in label order, where a trained model fixes them; otherwise the sorted names found.

    Raises:
        InputError: the file is missing or empty, a column lacks, a row has no value, or a label is unknown.
    """
    path = Path(path)
    rows = _rows(path)
    number = numbering((row["label"] for row in rows), classes, path)
    images = [path.parent / row["image"].replace("\\", "/") for row in rows]
    root = _root(path.parent, images)
    samples = tuple(
        Sample(
            image=image,
            name=Path(os.path.relpath(image, root)).as_posix(),
            label=number[row["label"]],
            split=split_name(row.get("split", "")),
            group=row.get("group") or None,
            mask=path.parent / row["mask"] if row.get("mask") else None,
        )
        for image, row in zip(images, rows, strict=True)
    )
    return Catalog(samples, tuple(number), root)


def _root(folder: Path, images: Sequence[Path]) -> Path:
    """The manifest's folder, or the nearest one that holds all images where some lie outside of it."""
    if not any(os.path.relpath(image, folder).startswith("..") for image in images):
        return folder
    return Path(os.path.commonpath([os.path.abspath(path) for path in (folder, *images)]))


def _rows(path: Path) -> list[dict[str, str]]:
    rows = read_table(path, ("image", "label"), "a manifest (CSV with the columns image,label)")
    empty = [line for line, row in enumerate(rows, start=2) if not row["image"] or not row["label"]]
    if empty:
        raise InputError(f"{path}: no image or no label in lines {listing(empty)}; fill them in or remove them")
    return rows


def with_splits(
    catalog: Catalog, seed: int = 0, val: float = 0.1, test: float = 0.2, refuse_leaks: bool = True
) -> Catalog:
    """Give each sample a split where the source has none; groups (or single images) stay together.

    Without any split, ``val`` and ``test`` shares of each class are held out. With a train but no val split,
    ``val`` is taken from train. Splits that the source names are never changed otherwise. Without ``refuse_leaks``
    groups may lie in several splits, for an audit that tells all of them.

    Raises:
        InputError: some rows have a split and others none, or a group lies in two splits.
    """
    unsplit = [sample.name for sample in catalog.samples if not sample.split]
    names = {sample.split for sample in catalog.samples}
    if unsplit and len(unsplit) < len(catalog.samples):
        raise InputError(f"{len(unsplit)} images have no split ({listing(unsplit, 3)}); give all a split or none")
    if unsplit:
        samples = _hold_out(catalog.samples, {"test": test, "val": val}, "train", seed)
    elif "train" in names and "val" not in names:
        held = _hold_out([s for s in catalog.samples if s.split == "train"], {"val": val}, "train", seed)
        samples = (*held, *(s for s in catalog.samples if s.split != "train"))
    else:
        samples = catalog.samples
    if refuse_leaks:
        _refuse_leaks(samples)
    return replace(catalog, samples=tuple(samples))


def _hold_out(samples: Iterable[Sample], shares: dict[str, float], rest: str, seed: int) -> tuple[Sample, ...]:
    """Stratified by class, whole groups at a time; a group with several classes counts for its first."""
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
        split_of.update(dict.fromkeys(keys, rest))
    return tuple(replace(s, split=split_of[s.group or s.name]) for s in (m for g in groups.values() for m in g))


def _refuse_leaks(samples: Iterable[Sample]) -> None:
    splits: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        if sample.group is not None:
            splits[sample.group].add(sample.split)
    leaks = sorted(group for group, found in splits.items() if len(found) > 1)
    if leaks:
        raise InputError(f"{len(leaks)} groups lie in several splits: {listing(leaks, 5)}; keep each in one split")


def require_training_images(catalog: Catalog) -> None:
    """Each class needs an image in the train split, or its prototypes could never be real patches.

    Raises:
        InputError: a class has none, or there is only one class.
    """
    counts = Counter(sample.label for sample in catalog.split("train"))
    missing = [name for label, name in enumerate(catalog.classes) if not counts[label]]
    if missing:
        raise InputError(f"classes without a training image: {listing(missing)}; add some or leave the class out")
    if len(catalog.classes) < 2:
        raise InputError(f"only one class ({catalog.classes[0]}) under {catalog.root}; expected at least two")
