"""Crops of a local model: the very pixels that its prototypes are made of, which give them back without the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from protopush.data.files import write_atomic
from protopush.data.regions import Region
from protopush.data.transforms import to_tensor
from protopush.errors import InputError
from protopush.models.stored_run import Run, picture_name
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state
from protopush.push.certificate import AnchorCheck

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel

REAL = 0.999  # the cosine from which a prototype is its patch
TOLERANCE = 1e-5  # of the cosine between a prototype and its crop: what rounding may change


def has_crops(model: ProtoModel) -> bool:
    """Whether prototypes depend on crops alone: windows are compared, each seen alone."""
    return getattr(model.backbone, "is_local", False) and model.head.match == "local"


def crop_name(class_index: int, prototype: int) -> str:
    """The file of an anchor's crop in ``prototypes/``."""
    return picture_name(class_index, prototype, "png")


def save_crop(run: Run, slot: tuple[int, int], anchor: Anchor, picture: Image.Image) -> None:
    """Write the crop of an anchor, at the scale of the model's input and without loss, from its upright picture."""
    crop = run.transform.visible(picture).crop(_pixels(anchor.region))
    write_atomic(run.folder / "prototypes" / crop_name(*slot), lambda file: crop.save(file, format="PNG"))


def crop_features(run: Run, slot: tuple[int, int]) -> Tensor | None:
    """The backbone's feature (C,) of the crop of a prototype; None where the file is not there or cannot be read."""
    crop = run.crop(*slot)
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
    _check(run)
    manager, checks = run.head.proto_manager, list[AnchorCheck]()
    for c, k in manager.used_slots():
        anchor, name, measured = manager.anchor(c, k), run.class_names[c], None
        if anchor is None:
            checks.append(AnchorCheck(name, k, "", None, None, "no_anchor"))
            continue
        fault, features = "crop_missing", crop_features(run, (c, k))
        if features is not None:
            prototype = manager.prototypes[manager.index(c, k)].detach().double()
            measured = float(F.normalize(prototype, dim=0) @ _unit(run, features).double())
            fault = "" if abs(measured - anchor.similarity_after) <= tolerance else "similarity_off"
        checks.append(AnchorCheck(name, k, anchor.file or "", anchor.similarity_after, measured, fault))
    return checks


@torch.no_grad()
def rebuild_prototypes(run: Run) -> None:
    """Make each prototype of a run from its crop alone, in place.

    Raises:
        InputError: a crop is missing, or a prototype is no patch (a push with momentum); nothing is changed.
    """
    _check(run)
    manager, found = run.head.proto_manager, dict[tuple[int, int], Tensor]()
    for c, k in manager.used_slots():
        anchor, features = manager.anchor(c, k), crop_features(run, (c, k))
        if anchor is None or features is None or anchor.similarity_after < REAL:
            raise InputError(
                f"cannot rebuild {run.class_names[c]}:{k}: its crop is missing, or it is no patch (a push with "
                "momentum moved it); expected a PNG in prototypes/, and live anchors or a hard push"
            )
        found[c, k] = features
    for (c, k), features in found.items():
        row = manager.index(c, k)
        manager.prototypes[row] = _unit(run, features).to(manager.prototypes)
        if manager.anchor_features is not None:
            manager.anchor_features[row] = features.to(manager.anchor_features)


def _check(run: Run) -> None:
    if not has_crops(run.model):
        raise InputError(
            f"the prototypes of {run.folder} depend on whole images, so that no crop can prove them; expected a run on "
            "windows (model.windows); protopush verify without --crops reads the images instead"
        )


def _unit(run: Run, features: Tensor) -> Tensor:
    with preserve_state(run.model):
        return run.head.embed(features)


def _pixels(region: Region) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = region
    return int(x0), int(y0), int(x1), int(y1)
