"""Image files, read upright and in RGB, or named in one error that lists them all."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from protopush.errors import InputError, listing

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}

# What Pillow raises for files that are no image, truncated, damaged, or bombs.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_image(path: str | Path) -> Image.Image:
    """The picture in a file, upright (EXIF), in RGB with 8 bits a channel.

    16-bit grey files are scaled to 8 bits (Pillow alone would clip them to white).

    Raises:
        InputError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                values = np.asarray(upright, dtype=np.float64)
                eight_bit = values / 257.0 if values.max(initial=0) > 255 else values
                upright = Image.fromarray(np.rint(eight_bit.clip(0, 255)).astype(np.uint8))
            return upright.convert("RGB")
    except _UNREADABLE as error:
        raise InputError(f"unreadable image: {path} ({error}); expected a whole image file") from error


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
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (64, 64))  # JPEG: the whole stream is still parsed, but decoded small
            image.load()
    except _UNREADABLE as error:
        return "", why_unreadable(path, error)
    return hashlib.sha256(data).hexdigest(), ""


def why_unreadable(path: str | Path, error: BaseException) -> str:
    """A few words for what reading an image raised, the same each time."""
    if isinstance(error, FileNotFoundError):
        return "missing"
    if Path(path).is_file() and Path(path).stat().st_size == 0:
        return "empty file"
    text = str(error)
    if "cannot identify" in text:
        return "not an image"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text.splitlines()[0] if text else type(error).__name__
