"""Run as it is handed from room to room, and the versions of the libraries that it was saved with.

It imports nothing heavy, so that the command line can read its methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush import __version__
from protopush.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from protopush.data.transforms import EvalTransform
    from protopush.explain.figure_canvas import Source
    from protopush.models.model import ProtoModel
    from protopush.nn.head import HeadOptimal


# What builds the model and names its weights, and what decodes and resizes the images.
PACKAGES = ("torch", "timm", "transformers", "pillow")


@dataclass(frozen=True)
class Run:
    """A trained model with what is needed to use it.

    Attributes:
        model: in eval mode.
        class_names: in label order.
        transform: what the model's images go through.
        root: the folder that anchor files are relative to.
        data: path and source of the training data, as they were given.
        folder: where it was read from or written to.
    """

    model: ProtoModel
    class_names: list[str]
    transform: EvalTransform
    root: Path
    data: dict[str, Any]
    folder: Path

    @property
    def head(self) -> HeadOptimal:
        """The prototype head."""
        from protopush.nn.head import HeadOptimal

        head = self.model.head
        if not isinstance(head, HeadOptimal):
            raise InputError(f"the head is a {type(head).__name__}; a run folder holds a HeadOptimal")
        return head

    def picture(self, class_index: int, prototype: int) -> Image.Image | None:
        """The source picture of an anchor, downscaled; None if the prototype was never pushed."""
        from protopush.data.images import read_image

        file = self.folder / "prototypes" / picture_name(class_index, prototype)
        return read_image(file) if file.is_file() else None

    def crop(self, class_index: int, prototype: int) -> Image.Image | None:
        """The crop of a local prototype; None if the file is not there or cannot be read."""
        from protopush.data.images import read_image

        file = self.folder / "prototypes" / picture_name(class_index, prototype, "png")
        with suppress(InputError):
            return read_image(file) if file.is_file() else None
        return None

    def source(self, class_index: int, prototype: int) -> Source:
        """What a prototype is drawn from: the source picture of its anchor; where that is not shared, its crop."""
        from protopush.explain.figure_canvas import Crop

        picture, crop = self.picture(class_index, prototype), self.crop(class_index, prototype)
        return Crop(crop) if picture is None and crop is not None else picture


def picture_name(class_index: int, prototype: int, ending: str = "jpg") -> str:
    """The file of an anchor's picture in ``prototypes/``."""
    return f"class{class_index:02d}-prototype{prototype:02d}.{ending}"


def current_versions() -> dict[str, str]:
    """Version of protopush and of each of :data:`PACKAGES` that is installed.

    Example:
        >>> list(current_versions())[:2]
        ['protopush', 'torch']
    """
    found = {"protopush": __version__}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def recorded_versions(config: Mapping[str, Any]) -> dict[str, str]:
    """Versions that a run's ``config.json`` names; of runs from before versions were recorded, protopush's alone.

    Example:
        >>> recorded_versions({"protopush": "0.1.0"})
        {'protopush': '0.1.0'}
    """
    return dict(config.get("versions") or {"protopush": str(config.get("protopush", "of unknown version"))})


def version_change(recorded: Mapping[str, str]) -> str:
    """What differs between the versions that saved something and those that read it; empty where nothing does.

    Args:
        recorded: package to version.

    Example:
        >>> version_change(current_versions())
        ''
        >>> version_change({"timm": "0.0.1"})  # doctest: +ELLIPSIS
        'saved with timm 0.0.1, read with timm ...; pip install timm==0.0.1 reads it as it was saved'
    """
    here = current_versions()
    other = {name: saved for name, saved in recorded.items() if _release(here.get(name, "")) != _release(saved)}
    if not other:
        return ""
    saved = ", ".join(f"{name} {release}" for name, release in other.items())
    read = ", ".join(f"{name} {here[name]}" if name in here else f"no {name}" for name in other)
    pins = " ".join(f"{name}=={_release(release)}" for name, release in other.items())
    return f"saved with {saved}, read with {read}; pip install {pins} reads it as it was saved"


def _release(version: str) -> str:
    """A version without the name of its build: 2.13.0+cpu is 2.13.0, and only that can be installed by its name."""
    return version.partition("+")[0]
