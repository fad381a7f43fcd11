"""Image files, read upright and in RGB, or named in one error that lists them all."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from protopush.data.shards import in_shard, is_file, member, open_file
from protopush.errors import InputError, first_line, listing

# What Pillow raises for files that are no image, truncated, damaged, or too large for the memory.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, MemoryError)
AHEAD = 4096  # items whose results may wait for the reader
SIXTEEN_BITS = {("I", "PNG"), ("I", "PPM")}  # besides I;16 and its kin: formats whose mode "I" holds 16 bits

T = TypeVar("T")
R = TypeVar("R")


class _PillowLimit:
    """Pillow's limit of pixels, which is one for the whole process, suspended while any thread reads with ours."""

    def __init__(self) -> None:
        self.lock, self.readers, self.pixels = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self.lock:
            if not self.readers:
                self.pixels, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self.readers += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.readers -= 1
            if not self.readers:
                Image.MAX_IMAGE_PIXELS = self.pixels


_SUSPENDED = _PillowLimit()


@contextmanager
def opened(
    file: str | Path | IO[bytes], max_megapixels: float = inf, formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """An image of which the header alone was read; a ValueError beyond the limit. Pillow's own does not count."""
    source = (member(file) or file) if isinstance(file, (str, Path)) else file
    with _SUSPENDED, Image.open(source, formats=formats) as image:
        if image.width * image.height > max_megapixels * 1e6:
            what = f"{image.width} x {image.height} pixels"
            raise ValueError(f"{what}, more than data.max_megapixels {max_megapixels:g}")
        yield image


def read_image(path: str | Path | IO[bytes], max_megapixels: float = inf) -> Image.Image:
    """The picture in a file (a path, or one that is open), upright (EXIF), in RGB with 8 bits a channel.

    The limit is for files that :func:`check_images` has not seen.

    What becomes of pixels depends on the file's mode, never on their values: transparent ones are laid on white
    (whatever colour is hidden below), and 16-bit grey is divided by 257.

    Raises:
        InputError: the file is missing, truncated, too large or no image, or it is not known which of its values is
            white.
    """
    try:
        if isinstance(path, (str, Path)):
            refuse_device(path)
        with opened(path, max_megapixels) as image:
            image.load()
            refuse_unknown_scale(image)
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                values = np.asarray(upright, dtype=np.float64) / 257.0
                upright = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
            if upright.has_transparency_data:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert("RGB")
    except _UNREADABLE as error:
        raise InputError(f"unreadable image: {path} ({first_line(error)}); expected a whole image file") from error


def refuse_unknown_scale(image: Image.Image) -> None:
    """Refuse, in a ValueError, numbers whose largest could be anything: floats, and integers of 32 bits."""
    known = not image.mode.startswith(("I", "F")) or image.mode.startswith("I;16")
    if not known and (image.mode, image.format) not in SIXTEEN_BITS:
        kind = "floating point numbers" if image.mode.startswith("F") else "integers of 32 bits"
        raise ValueError(f"{kind}, of which it is not known what is white; save it with 8 or 16 bits")


def refuse_device(path: str | Path) -> None:
    """Refuse, in an OSError, what isn't there, and pipes and devices (CON or NUL on Windows): they may never end."""
    if in_shard(path):
        return
    mode = os.stat(path).st_mode  # noqa: PTH116 - strings are paths as well
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError("a pipe or device, no file")


def read_mask_file(path: str | Path) -> NDArray[np.bool_]:
    """A mask, bool (height, width): upright, as :func:`protopush.data.dataset.read_mask` says.

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    try:
        refuse_device(path)
        with opened(path) as image:
            image.load()
            upright, lossy = ImageOps.exif_transpose(image), image.format in ("JPEG", "MPO")
    except _UNREADABLE as error:
        raise InputError(f"unreadable mask: {path} ({error}); expected a whole image file") from error
    if upright.has_transparency_data:
        *colours, alpha = upright.convert("RGBA").split()
        if all(low == high for low, high in (colour.getextrema() for colour in colours)):
            return np.asarray(alpha) > 0
    values = np.asarray(
        upright.convert("RGB") if upright.mode not in ("L", "1", "F") and upright.mode[0] != "I" else upright
    )
    on: NDArray[np.bool_] = values.reshape(*values.shape[:2], -1).max(axis=2) > (127 if lossy else 0)
    return on


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright picture, read from the file's header alone."""
    with opened(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_images(
    paths: Sequence[Path], advance: Callable[[], None] = lambda: None, max_megapixels: float = inf
) -> list[str]:
    """Decode every file once, before any long work, and return their SHA-256; ``advance`` is called once a file.

    Raises:
        InputError: some files can't be read, or are too large; all of them are named at once.
    """
    digests, bad, large = list[str](), list[str](), False
    for path, (digest, reason) in zip(paths, in_threads(lambda path: _check(path, max_megapixels), paths), strict=True):
        digests.append(digest)
        if reason:
            bad.append(f"{path} ({reason})")
            large = large or "data.max_megapixels" in reason
        advance()
    if bad:
        count = "1 unreadable image" if len(bad) == 1 else f"{len(bad)} unreadable images"
        advice = "remove or replace them" + (", or raise data.max_megapixels" if large else "")
        raise InputError(f"{count}: {listing(bad, limit=50)}; expected whole image files; {advice}")
    return digests


def in_threads(read: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """What is read of each item, in order, some ahead; Pillow decodes outside the interpreter's lock."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), AHEAD):  # a million at once would take the memory of a million results
            yield from pool.map(read, items[start : start + AHEAD])


def _check(path: Path, max_megapixels: float) -> tuple[str, str]:
    try:
        refuse_device(path)
        with open_file(path) as file:
            data = file.read()
        with opened(io.BytesIO(data), max_megapixels) as image:
            image.draft("RGB", (64, 64))  # JPEG: the whole stream is still parsed, but decoded small
            image.load()
            refuse_unknown_scale(image)
    except _UNREADABLE as error:
        return "", why_unreadable(path, error)
    return hashlib.sha256(data).hexdigest(), ""


def why_unreadable(path: str | Path, error: BaseException) -> str:
    """A few words for what reading an image raised, the same each time."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    with suppress(OSError, InputError):  # a pipe would never open
        if is_file(path):
            with open_file(path) as file:
                if not file.read(1):
                    return "empty file"
    text = str(error)
    if "cannot identify" in text:
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text.splitlines()[0] if text else type(error).__name__
