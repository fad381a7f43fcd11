"""Tar files as shards: members by their offset, samples as WebDataset has them."""

from __future__ import annotations

import json
import posixpath
import tarfile
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from protopush.data.walk import extensions, is_dropping
from protopush.errors import InputError, first_line, listing

LABELS = ("label", "cls")
FIELDS = ("label", "split", "group")


class Record(NamedTuple):
    """An image in a shard: its name there, and what the shard says of it ("": nothing); ``mask`` is a name as well."""

    name: str
    label: str = ""
    split: str = ""
    group: str = ""
    mask: str = ""


class Names:
    """Names in a shard, in order, found in little memory: their bytes, and eight for the place of each.

    Raises:
        InputError: a name is there twice, or leads out of the shard.

    Example:
        >>> names = Names(["b.jpg", "./a.jpg"], "x.tar")
        >>> list(names), names.place("a.jpg"), names.place("c.jpg")
        (['b.jpg', 'a.jpg'], 1, None)
    """

    def __init__(self, names: Iterable[str], shard: str) -> None:
        found = np.array([_encoded(_inner(name, shard)) for name in names] or [b""], dtype=np.bytes_)
        self.order = np.argsort(found, kind="stable")
        self.sorted = found[self.order]
        if (twice := self.sorted[1:][self.sorted[1:] == self.sorted[:-1]]).size:
            raise InputError(f"{shard} holds {_decoded(twice[0])} twice; expected each name once; write it again")

    def __iter__(self) -> Iterator[str]:
        places = np.argsort(self.order, kind="stable")
        return (_decoded(self.sorted[place]) for place in places if self.sorted[place])

    def place(self, name: str) -> int | None:
        """The number of a name, counted as it was given; None: there is none."""
        wanted = _encoded(name)
        at = bisect_left(self.sorted, wanted)
        there = wanted and at < len(self.sorted) and self.sorted[at] == wanted
        return int(self.order[at]) if there else None


class Tar:
    """A tar file without compression: its members by offset, and samples as WebDataset has them.

    ``abc.jpg`` has its label in ``abc.cls``, or in ``abc.json`` as ``label`` or ``cls`` (there also ``group`` and
    ``split``), and its mask in ``abc.mask.png``.

    Raises:
        InputError: the file is compressed, cut off or damaged, or a name in it is twice or leads out of it.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, path: str) -> None:
        self.path = path
        names, self.starts, self.sizes = list[str](), array("q"), array("q")
        try:
            with tarfile.open(path, "r:") as tar:
                while (entry := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # a million of its objects take a gigabyte
                    name = _inner(entry.name, path)
                    if entry.isreg() and not any(map(is_dropping, name.split("/"))):
                        if entry.sparse is not None:
                            raise InputError(f"{path} holds the sparse file {name}; write it again without")
                        names.append(name)
                        self.starts.append(entry.offset_data)
                        self.sizes.append(entry.size)
                _require_end(path, tar.offset)
        except (tarfile.TarError, OSError) as error:
            if isinstance(error, tarfile.ReadError) and (kind := _compression(path)):
                raise compressed(path, kind) from error
            raise InputError(f"damaged shard: {path} ({first_line(error)}); expected a whole tar file") from error
        self.names = Names(names, path)

    def read(self, name: str) -> bytes | None:
        """The bytes of a member; None: there is none."""
        place = self.names.place(name)
        if place is None:
            return None
        with open(self.path, "rb") as file:
            return self._read(file, place)

    def _read(self, file: BinaryIO, place: int) -> bytes:
        file.seek(self.starts[place])
        return file.read(self.sizes[place])

    def images(self) -> Iterator[str]:
        """The names of the images, in order, without masks."""
        return (name for name in self.names if _is_image(name) and not _is_mask(name))

    def records(self) -> Iterator[Record]:
        """The images, in order, with what the members of the same name up to the first dot say of them."""
        samples: dict[str, dict[str, str]] = {}
        for name in self.names:
            folder, _, base = name.rpartition("/")
            stem, _, ending = base.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[ending.lower()] = name
        with open(self.path, "rb") as file:
            for parts in samples.values():
                images = [name for name in parts.values() if _is_image(name) and not _is_mask(name)]
                if len(images) > 1:
                    raise InputError(f"{self.path} has several images in one sample: {listing(images)}; expected one")
                masks = [name for name in parts.values() if _is_mask(name)]
                if images:
                    said = self._said(file, parts)
                    yield Record(images[0], **{"mask": masks[0] if len(masks) == 1 else ""} | said)

    def _said(self, file: BinaryIO, parts: dict[str, str]) -> dict[str, str]:
        said = dict[str, str]()
        for ending in ("json", "cls"):
            place = self.names.place(parts[ending]) if ending in parts else None
            if place is None:
                continue
            try:
                text = self._read(file, place).decode()
                values = {"label": text} if ending == "cls" else json.loads(text)
                label = next((values[key] for key in LABELS if values.get(key) is not None), "")
                said |= {key: text_of(values[key]) for key in FIELDS[1:] if key in values}
                said["label"] = text_of(label) or said.get("label", "")
            except (ValueError, AttributeError) as error:
                raise InputError(
                    f"{self.path}/{parts[ending]} is no label ({first_line(error)}); expected a class, or a JSON "
                    "object with a key label or cls"
                ) from error
        return said


def _inner(name: str, shard: str) -> str:
    if not is_below(name):
        raise InputError(f"{shard} holds {name!r}, which leads out of it; expected names below it; write it again")
    return posixpath.normpath(name)


def is_below(name: str) -> bool:
    """Whether a name in a shard stays in it."""
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in extensions()


def _is_mask(name: str) -> bool:
    return _is_image(name) and name.rpartition("/")[2].lower().partition(".")[2].startswith("mask.")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return bytes(name).decode("utf-8", "surrogateescape")


def text_of(value: Any) -> str:
    """A single value as text, "" for None; a ValueError for others."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"{value} is no single value")
    return "" if value is None else str(value).strip()


def _compression(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(6)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), "")


def compressed(path: str, kind: str) -> InputError:
    """The refusal of a tar file in which no place can be read alone."""
    return InputError(
        f"{path} is compressed ({kind}): no image in it can be read alone; expected a plain .tar; unpack it (gunzip, "
        "bunzip2, unxz, zstd -d), since images don't become smaller"
    )


def _require_end(path: str, offset: int) -> None:
    """Refuse a tar that does not end as tar files do: it was cut off, has damage, or another one was put behind it."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        whole = len(block) == tarfile.BLOCKSIZE
        while whole and block:
            whole, block = not block.strip(b"\0"), file.read(1 << 20)
    if not whole:
        raise tarfile.ReadError(f"no end of a tar file at byte {offset}")
