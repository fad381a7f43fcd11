"""A run as it is handed from room to room. It imports nothing heavy, so that the command line can read its methods."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protopush.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from protopush.data.transforms import EvalTransform
    from protopush.models.model import ProtoModel
    from protopush.nn.head import HeadOptimal


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


def picture_name(class_index: int, prototype: int) -> str:
    """The file of an anchor's picture in ``prototypes/``."""
    return f"class{class_index:02d}-prototype{prototype:02d}.jpg"
