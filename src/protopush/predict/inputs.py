"""Inputs of a prediction: folders, manifests and single files in an order that is always the same, read in batches."""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from protopush.data.images import EXTENSIONS, read_image, why_unreadable
from protopush.data.manifest import rows_of
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, listing

logger = logging.getLogger("protopush.predict")

TABLES = {".csv", ".tsv", ".tab"}


class Strings:
    """Many strings in one block of memory: a million file names take their bytes and eight each.

    Processes that read images share the block, which a list of Python's strings would not let them: counting its
    references copies it.

    Example:
        >>> names = Strings(["a.jpg"])
        >>> names[0], len(names)
        ('a.jpg', 1)
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q")
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one at the end; what the file system has beyond UTF-8 (surrogateescape) is kept as it is."""
        self._bytes += text.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        place = range(len(self._ends))[index]
        start = self._ends[place - 1] if place else 0
        return self._bytes[start : self._ends[place]].decode("utf-8", "surrogateescape")

    def sha256(self) -> str:
        """Changes when any of them does, or their order."""
        digest = hashlib.sha256(self._ends.tobytes())
        digest.update(self._bytes)
        return digest.hexdigest()


class Inputs:
    """The images, in order.

    Attributes:
        names: a path for each image, that opens from the current folder.
        labels: what a manifest calls each image, "" for others; None where no manifest has labels.
    """

    def __init__(self) -> None:
        self.names = Strings()
        self.labels: Strings | None = None

    def add(self, name: str, label: str | None = None) -> None:
        """One more image; from the first label on there are labels."""
        if label is not None and self.labels is None:
            self.labels = Strings("" for _ in range(len(self.names)))
        self.names.append(name)
        if self.labels is not None:
            self.labels.append(label or "")


def list_inputs(paths: Sequence[str]) -> Inputs:
    """The images of folders (with all folders in them, sorted), manifests (in their order) and files, path by path.

    Hidden files and folders are left out. Links to folders inside a folder are not followed, so that a loop of links
    does no harm; the log names them.

    Args:
        paths: folders, manifests (.csv, .tsv or .tab, with a column ``image``, relative to the manifest, and
            perhaps ``label``), and image files; of the latter any name will do.

    Raises:
        InputError: a path that isn't there, a folder without images, or no manifest.
    """
    found = Inputs()
    for path in paths:
        before = len(found.names)
        if Path(path).is_dir():
            _add_folder(found, path)
        elif not os.path.lexists(path):
            raise InputError(f"no such file: {path}; expected a folder, a manifest (CSV) or an image")
        elif Path(path).suffix.lower() in TABLES:
            _add_manifest(found, Path(path))
        else:
            found.add(path)
        if len(found.names) == before:
            raise InputError(f"no images in {path}; expected files that end in {', '.join(sorted(EXTENSIONS))}")
    return found


def _add_folder(found: Inputs, folder: str) -> None:
    links: list[str] = []
    for name in _walk(folder, links):
        found.add(name)
    if links:
        logger.warning("links to folders are not followed: %s; name them to have them", listing(links, 3))


def _walk(folder: str, links: list[str]) -> Iterator[str]:
    """Image files below a folder, as ``sorted`` has their paths; memory for one folder's names at a time."""
    try:
        with os.scandir(folder) as entries:
            here = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder} ({error.strerror}); make it readable or move it") from error
    for entry in here:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, links)
        elif Path(entry.name).suffix.lower() in EXTENSIONS and not _leads_to_folder(entry):
            yield entry.path
        elif _leads_to_folder(entry):
            links.append(entry.path)


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False


def _add_manifest(found: Inputs, path: Path) -> None:
    empty = list[int]()
    for line, row in enumerate(rows_of(path, ("image",), "a manifest (CSV with a column image)"), start=2):
        if not row["image"]:
            empty.append(line)
        found.add(str(path.parent / row["image"].replace("\\", "/")), row.get("label"))
    if empty:
        raise InputError(f"{path}: no image in lines {listing(empty)}; fill them in or remove them")


# Pixels that a picture may have when it is resized to cover the model's input: a line of 1 x 100,000 has billions.
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)


class Pictures(Dataset[tuple[Tensor, str]]):
    """Items are (image (3, H, W), why it could not be read); the image is all zeros where there is a reason."""

    def __init__(self, names: Strings, transform: EvalTransform) -> None:
        self.names = names
        self.transform = transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        name = self.names[index]
        try:
            picture = read_image(name)
            width, height = self.transform.view(picture.size).resized
            if width * height > MOST_PIXELS:
                return self._empty(), f"too long and narrow: {picture.width} x {picture.height} pixels"
            return self.transform(picture), ""
        except InputError as error:
            return self._empty(), why_unreadable(name, error.__cause__ or error)
        except Exception as error:  # whatever one damaged file does to a decoder, the others are still to be predicted
            return self._empty(), why_unreadable(name, error)

    def _empty(self) -> Tensor:
        return torch.zeros(3, *self.transform.preprocessing.size)
