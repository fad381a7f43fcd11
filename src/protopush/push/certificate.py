"""``prototypes.json``: what each prototype stands for, and the check that it still does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.data.images import read_image, sha256_of
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError
from protopush.prototypes import Anchor, PrototypeManager
from protopush.push.contract import Pushable, exact_dtype
from protopush.untouched import untouched

FORMAT = 1
TOLERANCE = 1e-4


def certificate(manager: PrototypeManager, class_names: Sequence[str], weights_sha256: str) -> dict[str, Any]:
    """The anchors of all prototypes in use, as plain values for JSON."""
    slots = manager.max_prototypes
    return {
        "format": FORMAT,
        "weights_sha256": weights_sha256,
        "prototypes": [
            {
                "class_index": row // slots,
                "class": class_names[row // slots],
                "prototype": row % slots,
                "anchor": anchor.to_dict() if anchor is not None else None,
            }
            for row, anchor in enumerate(manager.anchors)
            if manager.valid_mask[row]
        ],
    }


def restore_anchors(manager: PrototypeManager, values: dict[str, Any]) -> None:
    """Give a manager the anchors of a certificate.

    Raises:
        InputError: the certificate isn't one of this model's.
    """
    try:
        for entry in values["prototypes"]:
            row = int(entry["class_index"]) * manager.max_prototypes + int(entry["prototype"])
            manager.anchors[row] = Anchor.from_dict(entry["anchor"]) if entry["anchor"] is not None else None
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"prototypes.json does not fit the model ({error!r}); take it from a copy of the run"
        ) from error


@dataclass(frozen=True)
class AnchorCheck:
    """Whether one anchor still holds; ``problem`` is empty if it does."""

    class_name: str
    prototype: int
    file: str
    recorded: float | None
    measured: float | None
    problem: str

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problem


def verify_anchors(
    model: Pushable,
    manager: PrototypeManager,
    transform: EvalTransform,
    root: Path,
    class_names: Sequence[str],
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
) -> list[AnchorCheck]:
    """Embed the file of every anchor again and compare.

    Args:
        model: with ``extract_features``, ``head.proj``.
        manager: its prototypes and anchors.
        transform: as in training without augmentation.
        root: the folder that the anchors' files are relative to.
        class_names: for the table.
        device: where the model is.
        tolerance: of the cosine between prototype and patch.
    """
    embedded: dict[tuple[str, bool], Tensor | str] = {}  # a file is embedded once, however many anchors it has
    checks = []
    for row in manager.valid_mask.nonzero().flatten().tolist():
        anchor, (c, k) = manager.anchors[row], divmod(row, manager.max_prototypes)
        measured, problem = None, "never pushed: no anchor"
        if anchor is not None:
            key = (str(anchor.file), anchor.grid != (1, 1))
            if key not in embedded:
                embedded[key] = _embed(model, transform, root, anchor, torch.device(device))
            measured, problem = _compare(anchor, manager.prototypes[row].detach(), embedded[key], tolerance)
        file, recorded = (anchor.file or "", anchor.similarity_after) if anchor else ("", None)
        checks.append(AnchorCheck(class_names[c], k, file, recorded, measured, problem))
    return checks


def _embed(model: Pushable, transform: EvalTransform, root: Path, anchor: Anchor, device: torch.device) -> Tensor | str:
    """Unit embeddings (L, D) of the anchor's image, or what is wrong with the file."""
    if anchor.file is None:
        return "the anchor names no file"
    if PurePosixPath(anchor.file).is_absolute() or ".." in PurePosixPath(anchor.file).parts:
        return "the file lies outside the data folder"
    file = root / anchor.file
    if not file.is_file():
        return "file missing"
    if anchor.sha256 is not None and sha256_of(file) != anchor.sha256:
        return "file changed"
    with untouched(model):  # type: ignore[arg-type]
        images = transform(read_image(file)).unsqueeze(0).to(device)
        pooled, patches = model.extract_features(images)
        projected = model.head.proj(pooled if anchor.grid == (1, 1) else patches)[0]
    return F.normalize(projected.to(exact_dtype(projected.device)), dim=-1)


def _compare(anchor: Anchor, prototype: Tensor, embeddings: Tensor | str, tolerance: float) -> tuple[float | None, str]:
    """The measured similarity, and what is wrong (nothing: an empty string)."""
    if isinstance(embeddings, str):
        return None, embeddings
    if not 0 <= anchor.cell < len(embeddings):
        return None, f"no cell {anchor.cell} in the image"
    measured = float(embeddings[anchor.cell] @ F.normalize(prototype.to(embeddings.dtype), dim=0))
    return measured, "similarity is off" if abs(measured - anchor.similarity_after) > tolerance else ""
