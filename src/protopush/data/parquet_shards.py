"""Parquet tables as shards: images in a column, one of their row groups in memory."""

from __future__ import annotations

import json
import posixpath
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from protopush.data.tar_shards import FIELDS, Names, Record, is_below, text_of
from protopush.errors import InputError, did_you_mean, first_line, listing


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
            self.starts = [0, *accumulate(rows.row_group(i).num_rows for i in range(rows.num_row_groups))]
            self.classes = _class_names(schema)
        numbers = [f"{row:06d}" for row in range(self.starts[-1])]
        paths = [name for name in given if isinstance(name, str) and is_below(name)]
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
            yield Record(name, **{key: text_of(value) for key, value in said.items()})

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

    def _reading(self, read: Callable[[], Any]) -> Any:
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


def _class_names(schema: Any) -> tuple[str, ...]:
    """The names of a ``ClassLabel`` in the metadata that Hugging Face's library writes."""
    try:
        features: Sequence[str] = json.loads(schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
        return tuple(map(str, features))
    except (TypeError, KeyError, ValueError):
        return ()
