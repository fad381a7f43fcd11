"""Shards of images: what lies in a tar (WebDataset) or Parquet file is a file below it, as ``train-03.tar/abc.jpg``."""

from __future__ import annotations

import io
import json
import os
import posixpath
import re
import tarfile
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from protopush.data.walk import extensions, is_dropping, walk_images
from protopush.errors import InputError, did_you_mean, first_line, listing

ENDINGS = (".tar", ".parquet")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")  # no place in them can be read alone
INSIDE = re.compile(r"\.(?:tar|parquet)(?=[\\/])" if os.sep == "\\" else r"\.(?:tar|parquet)(?=/)", re.IGNORECASE)
LABELS = ("label", "cls")
FIELDS = ("label", "split", "group")
METADATA = "metadata.parquet"  # of a folder of images


class Record(NamedTuple):
    """An image in a shard: its name there, and what the shard says of it ("": nothing); ``mask`` is a name as well."""

    name: str
    label: str = ""
    split: str = ""
    group: str = ""
    mask: str = ""


class Member(io.BytesIO):
    """The bytes of a file in a shard; in messages it has the path."""

    def __init__(self, data: bytes, path: str | Path) -> None:
        super().__init__(data)
        self.path = str(path)

    def __repr__(self) -> str:
        return repr(self.path)


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
                raise _packed(path, kind) from error
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
                said |= {key: _text(values.get(key)) for key in FIELDS[1:] if key in values} | {"label": _text(label)}
            except (ValueError, AttributeError) as error:
                raise InputError(
                    f"{self.path}/{parts[ending]} is no label ({first_line(error)}); expected a class, or a JSON "
                    "object with a key label or cls"
                ) from error
        return said


class Table:
    """A Parquet file with a column ``image``: bytes, or Hugging Face's {bytes, path}; one of its row groups in memory.

    An image is called by its path (column ``path`` or ``image.path``) where all have one of their own, else by its row.
    Classes of numbers are those of Hugging Face's metadata.

    Raises:
        InputError: pyarrow is not there, the file is damaged, or it has no such column.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with self._open() as file:
            schema, rows = file.schema_arrow, file.metadata
            kind = schema.field("image").type if "image" in schema.names else None
            parts = [kind.field(i).name for i in range(kind.num_fields)] if kind is not None else []
            if kind is None or (parts and "bytes" not in parts) or (not parts and "binary" not in str(kind)):
                what = "no column 'image'" if kind is None else f"images of type {kind}"
                hint = did_you_mean("image", schema.names, "", cutoff=0.5) if kind is None else ""
                raise InputError(
                    f"{path} has {what}; expected bytes, or {{bytes, path}}; it has: {listing(schema.names)}"
                    f"{hint and f'; {hint} rename it'}"
                )
            self.column, self.fields = "image.bytes" if parts else "image", [n for n in FIELDS if n in schema.names]
            called = "path" if "path" in schema.names else "image.path" if "path" in parts else None
            given = self._columns(file, called)[0] if called else []
            self.starts = np.cumsum([0, *(rows.row_group(i).num_rows for i in range(rows.num_row_groups))]).tolist()
            self.classes = _class_names(schema)
        numbers = [f"{row:06d}" for row in range(self.starts[-1])]
        paths = [name for name in given if isinstance(name, str) and _is_below(name)]
        self.names = Names(paths if len(set(map(posixpath.normpath, paths))) == len(numbers) else numbers, path)

    def read(self, name: str) -> bytes | None:
        """The bytes of an image; None: there is no such row.

        Raises:
            InputError: the row has no bytes.
        """
        row = self.names.place(name)
        if row is None:
            return None
        group = bisect_right(self.starts, row) - 1
        with _ONE_READER:
            column = _row_group(self, group)
        value = column[row - self.starts[group]].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if value is None:
            raise InputError(f"{self.path} has no bytes in row {row}; expected the image itself, not its path alone")
        return bytes(value)

    def images(self) -> Iterator[str]:
        """The names of the images, in order."""
        return iter(self.names)

    def records(self) -> Iterator[Record]:
        """The images, in order, with their label, split and group."""
        with self._open() as file:
            columns = self._columns(file, *self.fields)
        for name, *values in zip(self.names, *columns, strict=True):
            said = dict(zip(self.fields, values, strict=True))
            label = said.get("label")
            if self.classes and isinstance(label, int):
                said["label"] = self.classes[label] if 0 <= label < len(self.classes) else ""
            yield Record(name, **{key: _text(value) for key, value in said.items()})

    def _open(self) -> Any:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise InputError(f"{self.path} needs pyarrow to be read; pip install 'protopush[shards]'") from error
        try:
            return ParquetFile(self.path)
        except (ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _columns(self, file: Any, *names: str) -> list[list[Any]]:
        """The values of columns, or of the fields of one that is a struct."""
        table = self._reading(lambda: file.read(columns=list(names), use_threads=False).flatten())
        return [table[name].to_pylist() for name in names]

    def row_group(self, number: int) -> Any:
        """The images of a row group."""
        with self._open() as file:
            return self._reading(lambda: file.read_row_group(number, [self.column], use_threads=False)["image"])

    def _reading(self, read: Any) -> Any:
        from pyarrow import ArrowException

        try:
            return read()
        except (ArrowException, OSError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> InputError:
        return InputError(f"damaged shard: {self.path} ({first_line(error)}); expected a whole Parquet file")


_ONE_READER = threading.Lock()  # a row group may be large: threads wait for it rather than read it each


@lru_cache(maxsize=2)
def _row_group(table: Table, number: int) -> Any:
    return table.row_group(number)


_KNOWN: dict[str, tuple[tuple[int, int], Tar | Table]] = {}


def open_shard(path: str | Path) -> Tar | Table:
    """A shard, of which this process has read once what is where in it.

    Raises:
        InputError: it is compressed, damaged, or has no images that could be read.
    """
    text = os.path.abspath(path)
    if text.lower().endswith(PACKED):
        raise _packed(text, "compressed")
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


def shards_below(folder: Path) -> list[Path]:
    """The shards anywhere below a folder, in order; none where there are images as well: then these are meant."""
    found = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_dropping(name)]
        found += [Path(top, name) for name in names if not is_dropping(name) and is_shard(Path(top, name))]
    return sorted(found) if found and next(walk_images(folder), None) is None else []


def _inner(name: str, shard: str) -> str:
    if not _is_below(name):
        raise InputError(f"{shard} holds {name!r}, which leads out of it; expected names below it; write it again")
    return posixpath.normpath(name)


def _is_below(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/")


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in extensions()


def _is_mask(name: str) -> bool:
    return _is_image(name) and name.rpartition("/")[2].lower().partition(".")[2].startswith("mask.")


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return bytes(name).decode("utf-8", "surrogateescape")


def _text(value: Any) -> str:
    if isinstance(value, (list, dict)):
        raise ValueError(f"{value} is no single value")
    return "" if value is None else str(value).strip()


def _compression(path: str) -> str:
    with open(path, "rb") as file:
        start = file.read(6)
    kinds = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    return next((kind for magic, kind in kinds.items() if start.startswith(magic)), "")


def _packed(path: str, kind: str) -> InputError:
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


def _class_names(schema: Any) -> tuple[str, ...]:
    """The names of a ``ClassLabel`` in the metadata that Hugging Face's library writes."""
    try:
        features: Sequence[str] = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(map(str, features))
    except (TypeError, KeyError, ValueError):
        return ()
