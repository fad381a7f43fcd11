"""``prototypes.json``: what each prototype stands for, and the check that it still does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from protopush.data.images import read_image, sha256_of
from protopush.data.shards import is_file
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError
from protopush.nn.prototypes import Anchor, PrototypeManager
from protopush.preserve_state import preserve_state
from protopush.push.protocol import Pushable, exact_dtype

FORMAT = 1
TOLERANCE = 1e-4

PROBLEMS = {
    "": "",
    "no_anchor": "never pushed: no anchor",
    "no_file": "the anchor names no file",
    "outside_root": "the file lies outside the data folder",
    "file_missing": "file missing",
    "file_changed": "file changed",
    "file_unreadable": "file unreadable",
    "weights_changed": "weights changed",
    "no_such_cell": "no such cell in the image",
    "crop_missing": "no crop in prototypes/",
    "similarity_off": "similarity is off",
}


def certificate(manager: PrototypeManager, class_names: Sequence[str], weights_sha256: str) -> dict[str, Any]:
    """The anchors of all prototypes in use, as plain values for JSON.

    ``margin`` is how much nearer than its runner-up an anchor was before the push; None where there was no other.
    """
    rows = []
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        margin = None if anchor is None or anchor.runner_up is None else anchor.similarity - anchor.runner_up
        plain = None if anchor is None else anchor.to_dict()
        rows.append({"class_index": c, "class": class_names[c], "prototype": k, "margin": margin, "anchor": plain})
    return {"format": FORMAT, "weights_sha256": weights_sha256, "prototypes": rows}


def refuse_newer(values: Any, known: int, name: str) -> None:
    """Refuse a file (its values) of a format beyond the newest known one: what it means could only be guessed.

    Raises:
        InputError: it is newer, or says no format.
    """
    found = values.get("format") if isinstance(values, dict) else None
    if not isinstance(found, int):
        raise InputError(f"damaged file: {name} (it says no format); take it from a copy of the run")
    if found > known:
        raise InputError(f"{name} has format {found}, newer than {known}, the newest known here; update protopush")


def restore_anchors(manager: PrototypeManager, values: dict[str, Any]) -> None:
    """Give a manager the anchors of a certificate.

    Raises:
        InputError: the certificate isn't one of this model's, or of a newer format.
    """
    refuse_newer(values, FORMAT, "prototypes.json")
    try:
        for entry in values["prototypes"]:
            anchor = Anchor.from_dict(entry["anchor"]) if entry["anchor"] is not None else None
            manager.set_anchor(int(entry["class_index"]), int(entry["prototype"]), anchor)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"prototypes.json does not fit the model ({error!r}); take it from a copy of the run"
        ) from error


@dataclass(frozen=True)
class AnchorCheck:
    """Whether one anchor still holds.

    Attributes:
        class_name, prototype: whose anchor.
        file: relative to the data's root; empty where there is none.
        recorded, measured: cosine of prototype and patch; None where there is none.
        fault: a key of :data:`PROBLEMS`, for machines; empty if the anchor holds. What is wrong with the file counts
            first, then other weights; ``similarity_off`` is what remains where both are as recorded.
    """

    class_name: str
    prototype: int
    file: str
    recorded: float | None
    measured: float | None
    fault: str

    @property
    def problem(self) -> str:
        """The fault in words; empty if the anchor holds."""
        return PROBLEMS[self.fault]

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.fault

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"problem": self.problem, "holds": self.holds}


def anchors_verdict(checks: Sequence[AnchorCheck]) -> tuple[str, str]:
    """What the checks come to: ``good``, ``warn`` or ``bad``, and that in words; never pushed is no broken record.

    Example:
        >>> held = AnchorCheck("cat", 0, "a.png", 1.0, 1.0, "")
        >>> anchors_verdict([held, AnchorCheck("cat", 1, "", None, None, "no_anchor")])
        ('warn', '1 of 2 anchors hold, 1 was never pushed')
    """
    total, holding = len(checks), sum(check.holds for check in checks)
    never = sum(check.fault == "no_anchor" for check in checks)
    if never == total:
        return "warn", "Never pushed"
    if broken := total - holding - never:
        return "bad", f"{broken} of {total} anchors do not hold"
    if never:
        return "warn", f"{holding} of {total} anchors hold, {never} {'was' if never == 1 else 'were'} never pushed"
    return "good", f"All {total} anchors hold"


def verify_anchors(
    model: Pushable,
    manager: PrototypeManager,
    transform: EvalTransform,
    root: Path,
    class_names: Sequence[str],
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
    same_weights: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> list[AnchorCheck]:
    """Embed the file of every anchor again and compare; of a model of windows, the anchor's window alone.

    Args:
        model, device: with ``extract_features`` and ``head.proj``, and where it is.
        manager: its prototypes and anchors.
        transform: as in training without augmentation.
        root: the folder that the anchors' files are relative to.
        class_names: for the table.
        tolerance: of the cosine between prototype and patch.
        same_weights: whether the model's weights are those that the anchors were recorded with.
        advance: called with 1 as the turn comes to each anchor (a progress bar's step).
    """
    read: dict[str, tuple[Tensor | None, str]] = {}  # a file once, however many anchors it has
    whole: dict[tuple[str, bool], Tensor] = {}
    checks = []
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        advance(1)
        if anchor is None:
            checks.append(AnchorCheck(class_names[c], k, "", None, None, "no_anchor"))
            continue
        name = str(anchor.file)
        if name not in read:
            read[name] = _read(transform, root, anchor)
        image, fault = read[name]
        measured = None
        if image is not None:
            patch = _embed(model, image.to(device), anchor, whole)
            if patch is not None:
                prototype = manager.prototypes[manager.index(c, k)].detach()
                measured = float(patch @ F.normalize(prototype.to(patch.dtype), dim=0))
                measured = measured if math.isfinite(measured) else None
            if not same_weights:
                fault = "weights_changed"
            elif patch is None:
                fault = "no_such_cell"
            elif measured is None or not abs(measured - anchor.similarity_after) <= tolerance:
                fault = "similarity_off"
        checks.append(AnchorCheck(class_names[c], k, anchor.file or "", anchor.similarity_after, measured, fault))
    return checks


def file_within(root: Path, name: str) -> Path | None:
    """The file of an anchor; None where the name would lead out of the data's root."""
    pure = PurePosixPath(name)
    return None if pure.is_absolute() or ".." in pure.parts else root / name


def _read(transform: EvalTransform, root: Path, anchor: Anchor) -> tuple[Tensor | None, str]:
    """The image (1, 3, H, W) of an anchor, or what is wrong with its file."""
    if anchor.file is None:
        return None, "no_file"
    file = file_within(root, anchor.file)
    if file is None:
        return None, "outside_root"
    if not is_file(file):
        return None, "file_missing"
    if anchor.sha256 is not None and sha256_of(file) != anchor.sha256:
        return None, "file_changed"
    try:
        return transform(read_image(file)).unsqueeze(0), ""
    except InputError:
        return None, "file_unreadable"


def _embed(model: Pushable, image: Tensor, anchor: Anchor, whole: dict[tuple[str, bool], Tensor]) -> Tensor | None:
    """The unit embedding (D,) of an anchor's patch; None where its image has no such patch.

    What a model makes of whole images is kept in ``whole``, for other anchors of the same one.
    """
    alone: Callable[[Tensor, int], Tensor | None] = getattr(model, "embed_cell", lambda *_: None)
    key = (str(anchor.file), anchor.pooled)
    with preserve_state(model):  # type: ignore[arg-type]
        features = None if anchor.pooled else alone(image, anchor.cell)
        if features is None:
            if key not in whole:
                whole[key] = model.extract_features(image)[0 if anchor.pooled else 1][0]
            if not 0 <= anchor.cell < len(whole[key]):
                return None
            features = whole[key][anchor.cell]
        projected = model.head.proj(features)
    return F.normalize(projected.to(exact_dtype(projected.device)), dim=-1)
