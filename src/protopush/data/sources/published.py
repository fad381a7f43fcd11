"""Data sets as they are published: tables and image folders, wherever unpacking the archives has put them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from protopush.data.sources.folder import images_of
from protopush.errors import InputError, listing

DEPTH = 2  # archives that are unpacked each into a folder of its own name, and that once more


def published_root(path: str, expected: str) -> Path:
    """The folder of a path.

    Raises:
        InputError: it isn't there.
    """
    root = Path(path)
    if not path or not root.is_dir():
        raise InputError(f"no such folder: {root if path else '(none given)'}; expected {expected}")
    return root


def find_file(root: Path, *names: str, depth: int = DEPTH) -> Path | None:
    """The first file of one of these names in ``root``, or in folders up to ``depth`` below; None: there is none."""
    for level in range(depth + 1):
        for name in names:
            for file in sorted(root.glob("*/" * level + name)):
                if file.is_file():
                    return file
    return None


def find_folders(root: Path, name: str) -> list[Path]:
    """The folders that match ``name`` (upper or lower case) in ``root`` or one level below."""
    found = (entry for pattern in ("*", "*/*") for entry in sorted(root.glob(pattern)))
    return [entry for entry in found if entry.name.casefold() == name.casefold() and entry.is_dir()]


def images_by_id(folders: Iterable[Path]) -> dict[str, Path]:
    """The image files under some folders by their stem; the first where there are copies (Kaggle has some)."""
    found: dict[str, Path] = {}
    for top in folders:
        for image in images_of(top):
            found.setdefault(image.stem, image)
    return found


def refuse_missing(ids: Sequence[str], found: dict[str, Path], table: Path, where: str) -> None:
    """Name all images that a table lists and that aren't there, at once.

    Raises:
        InputError: some aren't there.
    """
    missing = [name for name in ids if name not in found]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(ids)} images listed in {table} are missing: {listing(missing, 20)}; "
            f"expected them under {where}; unpack its archive again"
        )


def refuse_twice(ids: Sequence[str], table: Path) -> None:
    """Name the images that a table lists more than once.

    Raises:
        InputError: there are some.
    """
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"{table} lists {len(twice)} images more than once: {listing(twice)}; keep one row for each")
