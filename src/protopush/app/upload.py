"""An image that somebody has dropped on the page: checked from outside, then read, or refused in plain words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from protopush.data.images import opened, read_image
from protopush.errors import InputError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM")  # by content, no matter what the name says
KINDS = "JPEG, PNG, TIFF, BMP, WebP or GIF"
SIDE = 1600  # longest side of the copy that pictures are drawn from


@dataclass(frozen=True)
class Limits:
    """What an upload may be at most, in units of 1,000,000 bytes and pixels; larger ones are never decoded."""

    megabytes: float = 20.0
    megapixels: float = 100.0

    def __post_init__(self) -> None:
        if not self.megabytes > 0:
            raise InputError(f"--max_megabytes {self.megabytes:g}; expected a number above 0")


@dataclass(frozen=True)
class Upload:
    """A picture (upright, RGB), its file's name, and what the person should know about how it was read, if anything."""

    name: str
    image: Image.Image
    note: str = ""

    def copy(self) -> Image.Image:
        """A copy to draw on, no larger than pictures need."""
        copy = self.image.copy()
        copy.thumbnail((SIDE, SIDE))
        return copy


def read_upload(file: str | Path | IO[bytes], limits: Limits = Limits(), name: str = "") -> Upload:
    """The picture in an uploaded file: its path, or the file itself and its ``name``.

    Raises:
        InputError: it is empty, too large, no image, has too many pixels, or is damaged; the message is for the person
            who chose the file.
    """
    if isinstance(file, (str, Path)):
        name, size = name or Path(file).name, Path(file).stat().st_size
    else:
        size = file.seek(0, os.SEEK_END)
    if not size:
        raise InputError(f"{name} is empty (0 bytes). Choose another file.")
    if size > limits.megabytes * 1e6:
        raise InputError(
            f"{name} has {size / 1e6:.1f} MB; at most {limits.megabytes:g} MB are allowed. Choose a smaller file."
        )
    picture, note = None, ""
    try:
        with opened(file, formats=FORMATS) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels <= limits.megapixels:
                note, picture = _note(image), read_image(file)
    except UnidentifiedImageError as error:
        raise InputError(f"{name} is not an image. Choose a {KINDS} file.") from error
    except Exception as error:  # whatever a damaged file does to a decoder
        raise InputError(f"{name} is damaged or cut off and can't be read. Choose a whole file.") from error
    if picture is None:
        most = limits.megapixels
        raise InputError(
            f"{name} has {megapixels:,.0f} megapixels; at most {most:g} are allowed. Make it smaller first."
        )
    return Upload(name, picture, note)


def _note(image: Image.Image) -> str:
    notes = []
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a phone's photo with its preview
        what = "several pages" if image.format == "TIFF" else "several pictures (it is animated)"
        notes.append(f"The file holds {what}; only the first is shown and explained.")
    if image.mode.startswith(("I", "F")):
        notes.append("The file has more than 8 bits a pixel; it was scaled to 8.")
    if image.mode == "CMYK":
        notes.append("The file is in CMYK, made for print; its colours were converted and may differ a little.")
    return " ".join(notes)
