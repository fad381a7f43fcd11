"""What a dataset can say about one of its items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class CellBoxes(Protocol):
    """Where cells lie in the original picture of size (width, height), as :class:`protopush.data.transforms.View`."""

    @property
    def original(self) -> tuple[int, int]: ...

    def cell_box(self, cell: int, grid: tuple[int, int]) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True)
class Provenance:
    """Where one item of a dataset comes from.

    Attributes:
        sample_id: what the dataset calls the item.
        file: path of the image file, relative to the data's root.
        sha256: of the file's bytes.
        group: lesion, patient, module, ...
        view: where its cells lie in the file (None: unknown, then an anchor has no box).
    """

    sample_id: int | str
    file: str | None = None
    sha256: str | None = None
    group: str | None = None
    view: CellBoxes | None = None
