"""What the model saw in one picture, as data: every term of every logit, and where in the file it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from protopush.backbones import Features
from protopush.data.images import read_image
from protopush.data.transforms import Box, EvalTransform, View
from protopush.errors import InputError
from protopush.head_optimal import HeadOptimal, HeadOutput
from protopush.model import ProtoModel
from protopush.prototypes import Anchor
from protopush.untouched import untouched


@dataclass(frozen=True)
class Match:
    """One prototype of a class and the cell of the picture that it likes best.

    Attributes:
        class_index: the class that owns the prototype.
        prototype: its slot within the class, from 0.
        similarity: cosine of the prototype and the cell, [-1, 1].
        weight: what a similarity of 1 would add to the logit.
        contribution: what it does add: ``similarity * weight``.
        cell: row by row from 0 in ``grid`` (rows, columns).
        grid: of the model's last feature map; (1, 1) for a model that matches the pooled feature.
        box: the cell, (x0, y0, x1, y1) in pixels of the upright original picture, x1 and y1 exclusive.
        anchor: the training patch that the prototype stands for; None before the first push.
    """

    class_index: int
    prototype: int
    similarity: float
    weight: float
    contribution: float
    cell: int
    grid: tuple[int, int]
    box: Box
    anchor: Anchor | None


@dataclass(frozen=True)
class ClassEvidence:
    """All that speaks for one class; ``contributions_sum + bias == logit`` up to float32 rounding.

    Attributes:
        class_index: from 0.
        class_name: as in the data.
        probability: softmax over all classes.
        logit: what the model said.
        bias: the part of the logit that no prototype explains.
        matches: all prototypes in use of this class, the largest contribution first.
    """

    class_index: int
    class_name: str
    probability: float
    logit: float
    bias: float
    matches: list[Match]

    @property
    def contributions_sum(self) -> float:
        """The sum over all matches."""
        return math.fsum(match.contribution for match in self.matches)


@dataclass(frozen=True)
class Explanation:
    """Why the model said what it said of one picture.

    Attributes:
        file: the picture's path, as it was given.
        image_size: (width, height) of the upright original picture, in which all boxes are.
        predicted: index of the most probable class.
        predicted_name: its name.
        probability: its softmax probability.
        classes: evidence for the most probable classes, the predicted one first.
    """

    file: str
    image_size: tuple[int, int]
    predicted: int
    predicted_name: str
    probability: float
    classes: list[ClassEvidence]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that a trip through JSON does not change."""
        plain: dict[str, Any] = _plain(asdict(self))
        for values, evidence in zip(plain["classes"], self.classes, strict=True):
            values["contributions_sum"] = evidence.contributions_sum
        return plain


def explain_image(
    model: ProtoModel,
    path: str | Path,
    transform: EvalTransform,
    class_names: Sequence[str],
    device: str | torch.device = "cpu",
    top_classes: int = 3,
) -> Explanation:
    """Run the model on one image file and take its logits apart.

    The model is evaluated without gradients; the mode of every submodule is as before afterwards.

    Args:
        model: a :class:`ProtoModel` whose head is a :class:`HeadOptimal`; it stays where it is.
        path: an image file of any size; EXIF orientation is respected.
        transform: from the file to the model's input, the same as in evaluation.
        class_names: one for each class, in label order.
        device: where the model is.
        top_classes: how many of the most probable classes to explain (all, if there are fewer).

    Raises:
        InputError: the file cannot be read, names and classes differ in number, or the model's logits are not finite.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> model = ProtoModel.create("resnet18", num_classes=2, pretrained=False, num_prototypes=3)
        >>> transform = EvalTransform(model.backbone.preprocessing)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (300, 100)).save(Path(folder, "a.png"))
        ...     found = explain_image(model, Path(folder, "a.png"), transform, ["cat", "dog"])
        >>> found.image_size, len(found.classes), len(found.classes[0].matches)
        ((300, 100), 2, 3)
    """
    head = cast(HeadOptimal, model.head)
    _check(head, class_names, top_classes)
    image = read_image(path)
    pixels = transform(image).unsqueeze(0).to(device)
    with untouched(model):
        features: Features = model.backbone(pixels)
        output: HeadOutput = head(features)
        weights = head.weights().cpu()
    logits = output.logits[0].double().cpu()
    if not logits.isfinite().all():
        raise InputError(
            f"the logits of {path} are {logits.tolist()}; expected finite numbers; look at the model's weights"
        )
    probabilities = logits.softmax(dim=0).tolist()
    # stable, so that equal logits name the same class as argmax
    ranked = logits.argsort(descending=True, stable=True).tolist()[:top_classes]
    grid = features.grid if head.match == "local" else (1, 1)
    view = transform.view(image.size)
    classes = [
        ClassEvidence(
            class_index=c,
            class_name=class_names[c],
            probability=probabilities[c],
            logit=float(logits[c]),
            bias=float(head.bias[c].detach()),
            matches=_matches(head, output, weights, c, grid, view),
        )
        for c in ranked
    ]
    first = classes[0]
    return Explanation(str(path), image.size, first.class_index, first.class_name, first.probability, classes)


def _matches(
    head: HeadOptimal, output: HeadOutput, weights: Tensor, c: int, grid: tuple[int, int], view: View
) -> list[Match]:
    """The prototypes in use of class ``c``, by contribution, the lower slot first among equals."""
    manager = head.proto_manager
    found = []
    for k in manager.mask()[c].nonzero().flatten().tolist():
        cell = int(output.cells[0, c, k])
        found.append(
            Match(
                class_index=c,
                prototype=k,
                similarity=float(output.similarities[0, c, k]),
                weight=float(weights[c, k]),
                contribution=float(output.contributions[0, c, k]),
                cell=cell,
                grid=grid,
                box=view.cell_box(cell, grid),
                anchor=manager.anchors[c * manager.max_prototypes + k],
            )
        )
    return sorted(found, key=lambda match: -match.contribution)


def _check(head: HeadOptimal, class_names: Sequence[str], top_classes: int) -> None:
    if len(class_names) != head.proto_manager.num_classes:
        raise InputError(
            f"{len(class_names)} class names for a model of {head.proto_manager.num_classes} classes; "
            "expected one for each, in label order"
        )
    if top_classes < 1:
        raise InputError(f"top_classes is {top_classes}; expected at least 1")


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
