"""Shards of images: what lies in a tar (WebDataset) or Parquet file is a file below it, as ``train-03.tar/abc.jpg``."""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from protopush.data.parquet_shards import Table
from protopush.data.tar_shards import Tar, compressed
from protopush.data.walk import extensions, is_dropping

ENDINGS = (".tar", ".parquet")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")  # no place in them can be read alone
INSIDE = re.compile(r"\.(?:tar|parquet)(?=[\\/])" if os.sep == "\\" else r"\.(?:tar|parquet)(?=/)", re.IGNORECASE)
METADATA = "metadata.parquet"  # of a folder of images


class Member(io.BytesIO):
    """The bytes of a file in a shard; in messages it has the path."""

    def __init__(self, data: bytes, path: str | Path) -> None:
        super().__init__(data)
        self.path = str(path)

    def __repr__(self) -> str:
        return repr(self.path)


_KNOWN: dict[str, tuple[tuple[int, int], Tar | Table]] = {}


def open_shard(path: str | Path) -> Tar | Table:
    """A shard, of which this process has read once what is where in it.

    Raises:
        InputError: it is compressed, damaged, or has no images that could be read.
    """
    text = os.path.abspath(path)
    if text.lower().endswith(PACKED):
        raise compressed(text, "compressed")
    status = os.stat(text)  # noqa: PTH116 - once an image
    stamp = (status.st_mtime_ns, status.st_size)
    known = _KNOWN.get(text)
    if known is None or known[0] != stamp:
        known = _KNOWN[text] = stamp, Tar(text) if text.lower().endswith(".tar") else Table(text)
    return known[1]


def in_shard(path: str | Path) -> tuple[str, str] | None:
    """The shard and the name in it of a path below one; None: any other path."""
    text = os.fspath(path)
    for found in INSIDE.finditer(text):
        if os.path.isfile(text[: found.end()]):  # noqa: PTH113 - once an image
            return text[: found.end()], posixpath.normpath(text[found.end() + 1 :].replace(os.sep, "/"))
    return None


def member(path: str | Path) -> Member | None:
    """What lies at a path below a shard; None: it is any other path.

    Raises:
        FileNotFoundError: there is no such member.
        InputError: the shard can't be read.
    """
    place = in_shard(path)
    if place is None:
        return None
    data = open_shard(place[0]).read(place[1])
    if data is None:
        raise FileNotFoundError(f"no such file in {place[0]}: {place[1]}")
    return Member(data, path)


def open_file(path: str | Path) -> BinaryIO:
    """A file, or what lies in a shard, opened to be read."""
    return member(path) or open(path, "rb")


def index_shards(paths: Iterable[str | Path]) -> None:
    """Know what is where in the shards of files before processes that read them are forked: else each finds out."""
    for shard in sorted({place[0] for place in map(in_shard, paths) if place is not None}):
        open_shard(shard)


def is_file(path: str | Path) -> bool:
    """Whether there is a file of this path, or something of this name in a shard."""
    place = in_shard(path)
    if place is None:
        return os.path.isfile(path)  # noqa: PTH113 - Path.is_file raises where a name is too long
    return open_shard(place[0]).names.place(place[1]) is not None


def is_shard(path: str | Path) -> bool:
    """Whether a file is a shard by its ending, or a packed one, which is refused when it is opened."""
    name = os.path.basename(path).lower()  # noqa: PTH119 - of each file of a folder
    return name.endswith((*ENDINGS, *PACKED)) and name != METADATA and os.path.isfile(path)  # noqa: PTH113


def shards_below(folder: Path, alone: bool = True) -> list[Path]:
    """The shards anywhere below a folder, in order.

    ``alone``: none where there are images as well, which are meant then.
    """
    found = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not is_dropping(name)]
        names = [name for name in files if not is_dropping(name)]
        if alone and any(os.path.splitext(name)[1].lower() in extensions() for name in names):  # noqa: PTH122
            return []
        found += [Path(top, name) for name in names if is_shard(os.path.join(top, name))]  # noqa: PTH118
    return sorted(found)
