"""Sources of images in shards: WebDataset's tar files and Parquet tables, their labels and splits."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from protopush.data.manifest import Catalog, Sample, numbering, split_name
from protopush.data.shards import is_shard, open_shard, shards_below
from protopush.data.sources.folder import is_split
from protopush.data.table import plain
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.data")

CLASSES = ("classes.txt", "classes.json")
EXPECTED = "shards: .tar files (WebDataset) or .parquet files, or a folder of them"


def shards(path: str, classes: Sequence[str] | None = None) -> Catalog:
    """Images in tar or Parquet files (:mod:`protopush.data.shards`): a file, or all below a folder.

    Numbers as labels are the lines of ``classes.txt`` (or the values of ``classes.json``) beside the shards, where it
    is there. Without a split of its own an image is in that which the name of its shard has (``train-0001.tar``,
    ``validation-00000-of-00002.parquet``), or of the nearest folder (``val/0001.tar``).

    Raises:
        InputError: no shards or no images, an image without a label, or a shard that can't be read.
    """
    place = Path(path)
    root = place if place.is_dir() else place.parent
    files = shards_below(root, alone=False) if place.is_dir() else [place] if path and is_shard(place) else []
    if not files:
        raise InputError(f"no shards: {place if path else '(none given)'}; expected {EXPECTED}")
    names, found, lacking = _class_names(root), list[tuple[Sample, str]](), list[str]()
    ordered = dict.fromkeys(names)
    for file in files:
        shard, inner = open_shard(file), file.relative_to(root).as_posix()
        ordered |= dict.fromkeys(map(plain, shard.classes))
        default = _split_of(inner)
        for record in shard.records():
            name, label = f"{inner}/{record.name}", _named(plain(record.label), names, file)
            split, group = split_name(record.split) if record.split else default, plain(record.group) or None
            mask = file / record.mask if record.mask else None
            found.append((Sample(file / record.name, name, -1, split, group, mask), label))
            if not label:
                lacking.append(name)
    if not found:
        raise InputError(f"no images in {listing(files, 3)}; expected files that Pillow reads, such as .jpg or .png")
    if lacking:
        raise InputError(
            f"{len(lacking)} of {len(found)} images have no label: {listing(lacking, 3)}; expected abc.cls, or "
            "abc.json with a key label, beside abc.jpg; in Parquet a column label"
        )
    labels = {label for _, label in found}
    if unused := [name for name in ordered if name not in labels]:
        logger.warning("%s: no image is of the classes %s, which are left out", place, listing(unused, 5))
    others = sorted(labels - ordered.keys(), key=lambda label: label.zfill(9) if label.isdecimal() else label)
    own = [name for name in ordered if name in labels] + others
    number = numbering(own, own if classes is None else classes, place)
    return Catalog(tuple(replace(sample, label=number[label]) for sample, label in found), tuple(number), root)


def is_shards(root: Path) -> bool:
    """Whether a folder holds shards and no images beside them."""
    return bool(shards_below(root))


def _class_names(root: Path) -> list[str]:
    """The class names in the order of their numbers, of a file beside the shards; none where there is no such file."""
    file = next((root / name for name in CLASSES if (root / name).is_file()), None)
    if file is None:
        return []
    try:
        text = file.read_text(encoding="utf-8-sig")
        values = json.loads(text) if file.suffix == ".json" else text.splitlines()
        if isinstance(values, dict):  # a name to its number, or a number to its name
            numbered = {str(number): name for name, number in values.items()} | values
            values = [numbered[str(number)] for number in range(len(values))]
        names = [plain(str(name)) for name in values if plain(str(name))]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"no list of classes: {file} ({error!r}); expected a name for each number from 0 on"
        ) from error
    if len(set(names)) < len(names):
        raise InputError(f"{file} has a class twice; expected each once, in the order of their numbers")
    return names


def _named(label: str, names: Sequence[str], shard: Path) -> str:
    """A label's class; a number is that of a line of ``classes.txt``."""
    if not names or label in names or not label:
        return label
    if label.isdecimal() and int(label) < len(names):
        return names[int(label)]
    raise InputError(f"{shard} has the label {label!r}; expected one of the {len(names)} classes: {listing(names)}")


def _split_of(name: str) -> str:
    """The split that a shard's path names, by words in its name, else in that of the nearest folder; "": none.

    Example:
        >>> _split_of("data/validation-00000-of-00002.parquet"), _split_of("Test/0001.tar"), _split_of("0001.tar")
        ('val', 'test', '')
    """
    for part in reversed(name.split("/")):
        found = {split_name(word) for word in re.split(r"[^A-Za-z]+", part) if is_split(word)}
        if len(found) == 1:
            return found.pop()
    return ""
