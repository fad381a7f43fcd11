"""From pictures to explanations: one forward pass, whose terms are taken apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from protopush.backbones.create import Features
from protopush.data.images import read_image
from protopush.data.transforms import EvalTransform, View
from protopush.errors import InputError, listing
from protopush.explain.explanation import ClassEvidence, Explanation, Match
from protopush.nn.head import HeadOptimal, HeadOutput
from protopush.preserve_state import preserve_state

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel


def explain_image(
    model: ProtoModel,
    path: str | Path,
    transform: EvalTransform,
    class_names: Sequence[str],
    device: str | torch.device = "cpu",
    top_classes: int = 3,
    also: Sequence[str] = (),
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
        also: names of classes to explain besides, however improbable.

    Raises:
        InputError: the file cannot be read, names and classes differ in number, ``also`` names an unknown class, or the
            model's logits are not finite.

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
    _check(model.head, class_names, top_classes, also)  # before the file is read
    image = read_image(path)
    pixels = transform(image).unsqueeze(0).to(device)
    view = transform.view(image.size)
    return explain_batch(model, pixels, [view], [str(path)], class_names, top_classes, also)[0]


def explain_batch(
    model: ProtoModel,
    images: Tensor,
    views: Sequence[View],
    files: Sequence[str],
    class_names: Sequence[str],
    top_classes: int = 3,
    also: Sequence[str] = (),
) -> list[Explanation]:
    """The same for a batch that is read already, on the model's device.

    Args:
        model: as for :func:`explain_image`.
        images: (B, 3, H, W), what the transform made of the files.
        views: B, the geometry of each picture (``transform.view``).
        files: B names, for the record.
        class_names, top_classes, also: as for :func:`explain_image`.
    """
    head = model.head
    _check(head, class_names, top_classes, also)
    with preserve_state(model):
        features: Features = model.backbone(images)
        output: HeadOutput = head(features)
        terms = _Terms.of(head, output, features.grid)
    chosen = {class_names.index(name) for name in also}
    return [
        _explanation(terms, i, file, view, class_names, top_classes, chosen)
        for i, (file, view) in enumerate(zip(files, views, strict=True))
    ]


class _Terms(NamedTuple):
    """All of a batch's explanations, brought over from the device at once; K slots for each of C classes."""

    head: HeadOptimal
    grid: tuple[int, int]
    logits: Tensor  # (B, C) float64
    weights: Tensor  # (C, K)
    similarities: Tensor  # (B, C, K)
    contributions: Tensor  # (B, C, K)
    cells: Tensor  # (B, C, K)
    maps: Tensor  # (B, C, K, L)

    @classmethod
    def of(cls, head: HeadOptimal, output: HeadOutput, grid: tuple[int, int]) -> _Terms:
        values = (head.weights(), output.similarities, output.contributions, output.cells, output.maps)
        grid = grid if head.match == "local" else (1, 1)
        return cls(head, grid, output.logits.double().cpu(), *(value.cpu() for value in values))


def _explanation(
    terms: _Terms, i: int, file: str, view: View, class_names: Sequence[str], top_classes: int, chosen: set[int]
) -> Explanation:
    logits = terms.logits[i]
    if not logits.isfinite().all():
        raise InputError(
            f"the logits of {file} are {logits.tolist()}; expected finite numbers; look at the model's weights"
        )
    probabilities = logits.softmax(dim=0).tolist()
    # stable, so that equal logits name the same class as argmax
    ranked = logits.argsort(descending=True, stable=True).tolist()
    classes = [
        ClassEvidence(
            class_index=c,
            class_name=class_names[c],
            probability=probabilities[c],
            logit=float(logits[c]),
            bias=float(terms.head.bias[c].detach()),
            matches=_matches(terms, i, c, view),
        )
        for place, c in enumerate(ranked)
        if place < top_classes or c in chosen
    ]
    first = classes[0]
    return Explanation(file, view.original, first.class_index, first.class_name, first.probability, classes, view)


def _matches(terms: _Terms, i: int, c: int, view: View) -> list[Match]:
    """The prototypes in use of class ``c``, by contribution, the lower slot first among equals."""
    manager = terms.head.proto_manager
    columns = (terms.similarities[i, c], terms.weights[c], terms.contributions[i, c], terms.cells[i, c])
    rows = zip(*(values.tolist() for values in columns), terms.maps[i, c].tolist(), strict=True)
    found = [
        Match(
            class_index=c,
            prototype=k,
            similarity=similarity,
            weight=weight,
            contribution=contribution,
            cell=cell,
            grid=terms.grid,
            box=view.cell_box(cell, terms.grid),
            anchor=manager.anchors[c * manager.max_prototypes + k],
            map=_rows(values, terms.grid[1]),
        )
        for k, (used, (similarity, weight, contribution, cell, values)) in enumerate(
            zip(manager.mask()[c].tolist(), rows, strict=True)
        )
        if used
    ]
    return sorted(found, key=lambda match: -match.contribution)


def _rows(values: list[float], columns: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(values[start : start + columns]) for start in range(0, len(values), columns))


def _check(head: HeadOptimal, class_names: Sequence[str], top_classes: int, also: Sequence[str]) -> None:
    if len(class_names) != head.proto_manager.num_classes:
        raise InputError(
            f"{len(class_names)} class names for a model of {head.proto_manager.num_classes} classes; "
            "expected one for each, in label order"
        )
    if top_classes < 1:
        raise InputError(f"top_classes is {top_classes}; expected at least 1")
    unknown = [name for name in also if name not in class_names]
    if unknown:
        raise InputError(f"unknown class {unknown[0]!r}; expected one of: {listing(class_names)}")
