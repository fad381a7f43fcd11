"""Audit of a data set before a model learns it: leaks between splits, duplicates, damaged and tiny files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any

import numpy as np

from protopush.data.images import in_threads, read_image, sha256_of, why_unreadable
from protopush.data.manifest import SPLITS, Catalog, Sample, groups_in_several_splits
from protopush.data.similar import SIDE, THRESHOLD, Array, near_pairs, thumbnail
from protopush.errors import InputError

SMALL = 32  # pixels: one of 7x7 cells of a 224-pixel input; a smaller image is blown up so far that cells show nothing
CLOSEST = 5  # pairs below the threshold that are reported
MARGIN = 0.1  # below the threshold, where those are searched
MANY = 0.02  # near duplicates an image, across splits, above which they are doubted


@dataclass(frozen=True)
class Pair:
    """Two images that show the same.

    Attributes:
        first, second: their names.
        splits, labels: of the first and of the second.
        same_group: they are known to belong together (one lesion, one patient).
        identical: the files have the same bytes; otherwise they only seem alike.
        similarity: 1 for identical files, else as :func:`protopush.data.similar.near_pairs` gives it.
    """

    first: str
    second: str
    splits: tuple[str, str]
    labels: tuple[str, str]
    same_group: bool
    identical: bool
    similarity: float

    @property
    def across(self) -> bool:
        """They lie in different splits."""
        return self.splits[0] != self.splits[1]

    @property
    def contradicts(self) -> bool:
        """They have different labels."""
        return self.labels[0] != self.labels[1]

    def __str__(self) -> str:
        return f"{self.first} = {self.second}"


@dataclass(frozen=True)
class Audit:
    """What an audit has found.

    Attributes:
        counts: images by split and class.
        shared_groups: groups in several splits: images by group and split.
        duplicates: pairs that show the same, identical ones first. Of files with the same bytes each is paired with the
            first, and only that one is compared with other pictures.
        closest: the pairs across splits that came nearest to the threshold without reaching it, to be viewed: known to
            be apart if their groups say so, yet perhaps the same thing photographed twice.
        unreadable: images that can't be read, and why.
        small: images with a side of less than 32 pixels: (width, height).
        threshold: the similarity from which two images count as duplicates.
    """

    counts: dict[str, dict[str, int]]
    shared_groups: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: tuple[Pair, ...] = ()
    closest: tuple[Pair, ...] = ()
    unreadable: dict[str, str] = field(default_factory=dict)
    small: dict[str, tuple[int, int]] = field(default_factory=dict)
    threshold: float = THRESHOLD

    @property
    def images(self) -> int:
        """How many images were read."""
        return sum(sum(row.values()) for row in self.counts.values())

    @property
    def across(self) -> tuple[Pair, ...]:
        """The duplicates in different splits."""
        return tuple(pair for pair in self.duplicates if pair.across)

    @property
    def contradictions(self) -> tuple[Pair, ...]:
        """The duplicates with different labels."""
        return tuple(pair for pair in self.duplicates if pair.contradicts)

    @property
    def leaks(self) -> bool:
        """Whether something of one split is in another: a score on that split would be too good."""
        return bool(self.shared_groups or self.across)

    @property
    def alike_by_nature(self) -> bool:
        """So many near duplicates across splits are hardly copies: a machine's pictures in one pose are all alike."""
        return sum(not pair.identical for pair in self.across) > max(MANY * self.images, 20)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        return {"images": self.images, "leaks": self.leaks, "alike_by_nature": self.alike_by_nature, **asdict(self)}


@dataclass(frozen=True)
class Finding:
    """One check of an audit: its words, the pairs or names found, their number, and whether that is a leak."""

    name: str
    pairs: list[Pair] | list[str]
    count: int
    is_leak: bool


def audit_findings(found: Audit) -> list[Finding]:
    """All checks of an audit, the gravest first; a pair is counted once, and again where its labels differ."""
    groups = [f"{name} ({', '.join(splits)})" for name, splits in found.shared_groups.items()]
    near = [pair for pair in found.duplicates if not pair.identical]
    same = [pair for pair in found.duplicates if pair.identical]
    checks: list[tuple[str, list[Pair] | list[str], bool]] = [
        ("groups (lesions, patients) in several splits", groups, True),
        ("identical files across splits", [pair for pair in same if pair.across], True),
        ("near duplicates across splits", [pair for pair in near if pair.across], True),
        ("identical files in one split", [pair for pair in same if not pair.across], False),
        ("near duplicates in one split", [pair for pair in near if not (pair.across or pair.same_group)], False),
        ("near duplicates in one group", [pair for pair in near if pair.same_group and not pair.across], False),
        ("duplicates with different labels", list(found.contradictions), False),
        ("unreadable files", [f"{name} ({reason})" for name, reason in found.unreadable.items()], False),
        (f"images with a side below {SMALL} pixels", list(found.small), False),
    ]
    return [Finding(name, pairs, len(pairs), leak and bool(pairs)) for name, pairs, leak in checks]


def audit_verdict(found: Audit) -> tuple[str, str]:
    """What an audit comes to: ``good``, ``warn`` or ``bad``, and that in words."""
    if not found.leaks:
        return "good", "No leak between the splits"
    if found.alike_by_nature and not found.shared_groups and not any(pair.identical for pair in found.across):
        return "warn", "Many images of different splits are alike"
    return "bad", "Leaks: what is in one split is in another"


def audit(
    catalog: Catalog, threshold: float = THRESHOLD, advance: Callable[[int], None] = lambda _: None,
    max_megapixels: float = inf,
) -> Audit:  # fmt: skip
    """Read every image of a catalog once, and compare all with all.

    What is kept of an image is a thumbnail of 4 KB and a signature of 256 bytes.

    Args:
        catalog: from :func:`protopush.data.sources.load_catalog` with ``refuse_leaks=False``.
        threshold: similarity, at most 1, from which two images count as duplicates (see docs/data.md).
        advance: called with a number of steps, two for each image in all (read, compared).
        max_megapixels: of an image; a larger one counts as unreadable.

    Raises:
        InputError: the threshold makes no sense.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> with TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.png")
        ...     Image.radial_gradient("L").save(file)
        ...     Image.radial_gradient("L").resize((90, 90)).save(file.with_name("b.png"))
        ...     samples = (Sample(file, "a", 0, "train"), Sample(file.with_name("b.png"), "b", 0, "test"))
        ...     found = audit(Catalog(samples, ("gradient",), Path(folder)))
        >>> [(pair.first, pair.second, pair.identical) for pair in found.across]
        [('a', 'b', False)]
    """
    check_threshold(threshold)
    samples = catalog.samples
    thumbnails = np.empty((len(samples), SIDE, SIDE), dtype=np.uint8)
    distinct: list[int] = []  # images that are the first with their bytes; their thumbnails, in this order
    same: list[Pair] = []
    unreadable, small = dict[str, str](), dict[str, tuple[int, int]]()
    first_of: dict[str, int] = {}
    for number, read in enumerate(_read_all(samples, max_megapixels)):
        advance(1)
        name = samples[number].name
        if isinstance(read, str):
            unreadable[name] = read
            continue
        digest, picture, size = read
        if min(size) < SMALL:
            small[name] = size
        first = first_of.setdefault(digest, number)
        if first == number:
            thumbnails[len(distinct)] = picture
            distinct.append(number)
        else:
            same.append(_pair(catalog, first, number, 1.0, identical=True))
    advance(len(samples) - len(distinct))  # not compared: they can't be read, or are the same file
    near = [
        _pair(catalog, distinct[first], distinct[second], value, identical=False)
        for first, second, value in near_pairs(thumbnails[: len(distinct)], threshold, MARGIN, advance)
    ]
    duplicates = (*same, *(pair for pair in near if pair.similarity >= threshold))
    below = [pair for pair in near if pair.similarity < threshold and pair.across]
    groups = groups_in_several_splits(samples)
    return Audit(_counts(catalog), groups, duplicates, tuple(below[:CLOSEST]), unreadable, small, threshold)


def check_threshold(threshold: float) -> None:
    """Refuse, with an InputError, what can't be a similarity of duplicates."""
    if not 0.5 <= threshold <= 1:
        raise InputError(f"the threshold is {threshold}; expected a similarity between 0.5 and 1, such as {THRESHOLD}")


def _read_all(samples: Sequence[Sample], max_megapixels: float) -> Iterator[tuple[str, Array, tuple[int, int]] | str]:
    """Digest, thumbnail and size of each image, or why it can't be read."""

    def read(sample: Sample) -> tuple[str, Array, tuple[int, int]] | str:
        try:
            image = read_image(sample.image, max_megapixels)
        except InputError as error:
            return why_unreadable(sample.image, error.__cause__ or error)
        return sha256_of(sample.image), thumbnail(image), image.size

    return in_threads(read, samples)


def _pair(catalog: Catalog, first: int, second: int, similarity: float, identical: bool) -> Pair:
    a, b = sorted((catalog.samples[first], catalog.samples[second]), key=lambda sample: sample.name)
    labels = (catalog.classes[a.label], catalog.classes[b.label])
    same_group = a.group is not None and a.group == b.group
    return Pair(a.name, b.name, (a.split, b.split), labels, same_group, identical, round(similarity, 4))


def _counts(catalog: Catalog) -> dict[str, dict[str, int]]:
    """By split, in the order train, val, test, others; by class, in label order."""
    found = Counter((sample.split, sample.label) for sample in catalog.samples)
    known = {split for split, _ in found}
    splits = [*(split for split in SPLITS if split in known), *sorted(known - set(SPLITS))]
    return {split: {name: found[split, label] for label, name in enumerate(catalog.classes)} for split in splits}
