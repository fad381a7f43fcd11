"""Walks over folders of images: what Pillow reads, in order; what is left out is counted, so that nobody misses it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import Image

from protopush.errors import InputError, listing

# Formats that Pillow only recognises, or hands to other programs.
NO_PICTURES = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "MPEG", "PDF", "WMF"}
# What systems and programs leave behind in folders, in lower case.
DROPPINGS = {
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "thumbs.db",
    "desktop.ini",
}


class LeftOut:
    """What a walk has left out.

    Attributes:
        links: folders that links lead to: not followed, so that a loop does no harm.
        kinds: the number of files by their ending, which no image of Pillow's has.
    """

    def __init__(self) -> None:
        self.links: list[str] = []
        self.kinds: Counter[str] = Counter()

    def in_words(self) -> list[str]:
        """A line for each kind of thing; none where nothing was left out."""
        lines = []
        if self.links:
            lines.append(f"links to folders are not followed: {listing(self.links, 3)}; name them to have them")
        if self.kinds:
            counts = [f"{count} {kind}" for kind, count in sorted(self.kinds.items())]
            lines.append(f"files that are no images by their ending are left out: {listing(counts)}")
        return lines


@lru_cache(maxsize=1)
def extensions() -> frozenset[str]:
    """The endings, in lower case, of the files that Pillow reads pictures from.

    Example:
        >>> {".jpg", ".png", ".tif", ".webp"} <= extensions(), ".pdf" in extensions()
        (True, False)
    """
    known = Image.registered_extensions()
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES)


def is_dropping(name: str) -> bool:
    """Whether a file or folder is none of the user's: hidden, or left behind by a system or a program."""
    return name.startswith(".") or name.lower() in DROPPINGS


def walk_images(folder: str | Path, left_out: LeftOut | None = None) -> Iterator[str]:
    """Image files below a folder, name by name; memory for one folder's names at a time.

    Hidden files and folders, and what systems leave behind, are passed over; what else is left out stands in
    ``left_out``.

    Raises:
        InputError: a folder can't be read.
    """
    left_out = left_out or LeftOut()
    try:
        with os.scandir(folder) as entries:
            here = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder} ({error.strerror}); make it readable or move it") from error
    for entry in here:
        if is_dropping(entry.name):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk_images(entry.path, left_out)
        elif _leads_to_folder(entry):
            left_out.links.append(entry.path)
        elif not (entry.is_file(follow_symlinks=False) or entry.is_symlink()):
            left_out.kinds["pipe or device"] += 1
        elif (ending := Path(entry.name).suffix.lower()) in extensions():
            yield entry.path
        else:
            left_out.kinds[ending or "without an ending"] += 1


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_symlink() and entry.is_dir()
    except OSError:  # a link to itself
        return False
