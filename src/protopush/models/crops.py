"""Crops of a local model: the very pixels that its prototypes are made of, which give them back without the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from protopush.data.files import write_atomic
from protopush.data.images import read_image
from protopush.data.regions import Region
from protopush.data.transforms import to_tensor
from protopush.errors import InputError, listing
from protopush.models.stored_run import Run
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.certificate import AnchorCheck, Fault

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

TOLERANCE = 1e-5  # of the cosine between a prototype and its crop: what rounding may change


def has_crops(model: ProtoModel) -> bool:
    """Whether prototypes depend on crops alone: windows are compared, each seen alone."""
    return getattr(model.backbone, "is_local", False) and model.head.match == "local"


def crop_name(class_index: int, prototype: int) -> str:
    """The file of an anchor's crop in ``prototypes/``."""
    return f"class{class_index:02d}-prototype{prototype:02d}.png"


def save_crop(run: Run, slot: tuple[int, int], anchor: Anchor, picture: Image.Image) -> None:
    """Write the crop of an anchor, at the scale of the model's input and without loss, from its upright picture."""
    crop = run.transform.visible(picture).crop(_pixels(anchor.region))
    write_atomic(run.folder / "prototypes" / crop_name(*slot), lambda file: crop.save(file, format="PNG"))


def crop_features(run: Run, slot: tuple[int, int]) -> Tensor | None:
    """The backbone's feature (C,) of the crop of a prototype; None where the file is not there or cannot be read."""
    file = run.folder / "prototypes" / crop_name(*slot)
    try:
        crop = read_image(file) if file.is_file() else None
    except InputError:
        crop = None
    if crop is None:
        return None
    pixels = to_tensor(crop, run.transform.preprocessing).unsqueeze(0)
    with preserve_state(run.model):
        return run.model.backbone.embed_crops(pixels.to(run.head.bias.device))[0]


def verify_crops(run: Run, tolerance: float = TOLERANCE) -> list[AnchorCheck]:
    """Embed the crop of each anchor, and compare it with the prototype; no training image is read.

    Raises:
        InputError: the run's prototypes are not crops.
    """
    if not has_crops(run.model):
        raise InputError(
            f"the prototypes of {run.folder} depend on whole images, so that no crop can prove them; expected a run on "
            "windows (model.windows); verify it without --crops"
        )
    manager, checks = run.head.proto_manager, list[AnchorCheck]()
    for c, k in manager.used_slots():
        anchor, name = manager.anchor(c, k), run.class_names[c]
        if anchor is None:
            checks.append(AnchorCheck(name, k, "", None, None, "no_anchor"))
            continue
        features = crop_features(run, (c, k))
        measured: float | None = None
        fault: Fault = "crop_missing"
        if features is not None:
            prototype = manager.prototypes[manager.index(c, k)].detach().double()
            measured = float(F.normalize(prototype, dim=0) @ _unit(run, features).double())
            held = abs(measured - anchor.similarity_after) <= tolerance
            fault = "" if held else "similarity_off"
        checks.append(AnchorCheck(name, k, anchor.file or "", anchor.similarity_after, measured, fault))
    return checks


@torch.no_grad()
def rebuild_prototypes(run: Run) -> None:
    """Make each prototype of a run from its crop alone, in place.

    Raises:
        InputError: crops are missing, or prototypes are no patches (a push with momentum moved them); nothing is changed.
    """
    manager, found = run.head.proto_manager, dict[tuple[int, int], Tensor]()
    checks = {(check.class_name, check.prototype): check for check in verify_crops(run)}
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        features = crop_features(run, (c, k))
        if anchor is None or features is None or anchor.similarity_after < 1 - 1e-3:
            continue
        found[c, k] = features
    missing = [f"{run.class_names[c]}:{k}" for c, k in manager.used_slots() if (c, k) not in found]
    if missing:
        raise InputError(
            f"cannot rebuild {listing(missing)} of {len(checks)} prototypes: their crop is missing, or they are no patch "
            "(a push with momentum moved them); expected a PNG in prototypes/ and a hard push or live anchors"
        )
    for (c, k), features in found.items():
        row = manager.index(c, k)
        manager.prototypes[row] = _unit(run, features).to(manager.prototypes)
        if manager.anchor_features is not None:
            manager.anchor_features[row] = features.to(manager.anchor_features)


def _unit(run: Run, features: Tensor) -> Tensor:
    with preserve_state(run.model):
        return run.head.embed(features)


def _pixels(region: Region) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = region
    return int(x0), int(y0), int(x1), int(y1)
