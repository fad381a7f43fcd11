"""Image files, read upright and in RGB, or named in one error that lists them all."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from protopush.errors import InputError, listing

# What Pillow raises for files that are no image, truncated, damaged, or bombs.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


SIXTEEN_BITS = {("I", "PNG"), ("I", "PPM")}  # besides I;16 and its kin: formats whose mode "I" holds 16 bits


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, upright (EXIF), in RGB with 8 bits a channel.

    What becomes of pixels depends on the file's mode, never on their values: transparent ones are laid on white
    (whatever colour is hidden below), and 16-bit grey is divided by 257.

    Raises:
        InputError: the file is missing, truncated or no image, or it is not known which of its values is white.
    """
    try:
        refuse_device(path)
        with Image.open(path) as image:
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
        raise InputError(f"unreadable image: {path} ({error}); expected a whole image file") from error


def refuse_unknown_scale(image: Image.Image) -> None:
    """Refuse, in a ValueError, numbers whose largest could be anything: floats, and integers of 32 bits."""
    known = not image.mode.startswith(("I", "F")) or image.mode.startswith("I;16")
    if not known and (image.mode, image.format) not in SIXTEEN_BITS:
        kind = "floating point numbers" if image.mode.startswith("F") else "integers of 32 bits"
        raise ValueError(f"{kind}, of which it is not known what is white; save it with 8 or 16 bits")


def refuse_device(path: str | Path) -> None:
    """Refuse, in an OSError, what isn't there, and pipes and devices (CON or NUL on Windows): they may never end."""
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
        with Image.open(path) as image:
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
    with Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (height, width) if turned else (width, height)


def sha256_of(path: str | Path) -> str:
    """The file's SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_images(paths: Sequence[Path], advance: Callable[[], None] = lambda: None) -> list[str]:
    """Decode every file once, before any long work, and return their SHA-256; ``advance`` is called once a file.

    Raises:
        InputError: some files can't be read; all of them are named at once.
    """
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        found = []
        for result in pool.map(_check, paths):
            found.append(result)
            advance()
    if bad := [f"{path} ({reason})" for path, (_, reason) in zip(paths, found, strict=True) if reason]:
        count = "1 unreadable image" if len(bad) == 1 else f"{len(bad)} unreadable images"
        raise InputError(f"{count}: {listing(bad, limit=50)}; expected whole image files; remove or replace them")
    return [digest for digest, _ in found]


def _check(path: Path) -> tuple[str, str]:
    try:
        refuse_device(path)
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
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
    if os.path.isfile(path) and Path(path).stat().st_size == 0:  # noqa: PTH113 - of Path it raises for long names
        return "empty file"
    text = str(error)
    if "cannot identify" in text:
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text.splitlines()[0] if text else type(error).__name__
