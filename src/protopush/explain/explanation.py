"""Explanations of what the model said of a picture: every term of every logit, and where in the file it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from protopush.backbones.create import Features
from protopush.data.images import read_image
from protopush.data.regions import Regions
from protopush.data.transforms import Box, EvalTransform, View
from protopush.errors import InputError, listing
from protopush.nn.head import HeadOptimal, HeadOutput
from protopush.nn.prototypes import Anchor
from protopush.preserve_state import preserve_state

if TYPE_CHECKING:
    from protopush.models.model import ProtoModel


@dataclass(frozen=True)
class Match:
    """One prototype of a class and the patch of the picture that is most similar to it.

    Attributes:
        class_index: the class that owns the prototype.
        prototype: its slot within the class, from 0.
        similarity: cosine of the prototype and the patch, [-1, 1]; its mean over this patch and those of ``more``.
        weight: what a similarity of 1 would add to the logit.
        contribution: what it does add: ``similarity * weight``.
        cell: the patch's number, from 0.
        box: the patch, (x0, y0, x1, y1) in pixels of the upright original picture, x1 and y1 exclusive.
        sees: likewise, all that the patch's cosine can depend on; no more than the box where the model is local.
        anchor: the training patch that the prototype stands for; None before the first push.
        values: cosine of the prototype and every patch, in the order of ``regions``; the largest is the patch's. One
            value for a model that matches the pooled feature.
        regions: of the patches, the same for all matches of a picture.
        more: the boxes of the other patches that count, the most similar first; none unless ``top_patches`` is above 1.
    """

    class_index: int
    prototype: int
    similarity: float
    weight: float
    contribution: float
    cell: int
    box: Box
    sees: Box
    anchor: Anchor | None
    values: tuple[float, ...] = ()
    regions: Regions | None = None
    more: tuple[Box, ...] = ()

    @cached_property
    def map(self) -> tuple[tuple[float, ...], ...]:
        """The values in rows of columns over the part that the model saw: each square the largest that cover it."""
        if self.regions is None:
            return ()
        return tuple(map(tuple, self.regions.map(torch.tensor(self.values, dtype=torch.float64)).tolist()))


@dataclass(frozen=True)
class ClassEvidence:
    """All that the model holds for one class; ``contributions_sum + bias == logit`` up to float32 rounding.

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
class WhyNot:
    """Why one class and not another: the difference of their logits, term by term.

    ``difference == said.contributions_sum - other.contributions_sum + bias`` up to float32 rounding, and the first
    class is ``exp(difference)`` times as probable as the other.

    Attributes:
        said: evidence for the predicted class.
        other: evidence for the other one.
    """

    said: ClassEvidence
    other: ClassEvidence

    @property
    def difference(self) -> float:
        """The logit of the predicted class less that of the other."""
        return self.said.logit - self.other.logit

    @property
    def bias(self) -> float:
        """The part of the difference that no prototype explains."""
        return self.said.bias - self.other.bias

    def to_dict(self) -> dict[str, Any]:
        """The sums of the difference; its terms are the matches of the two classes."""
        return {
            "class": self.said.class_name,
            "not": self.other.class_name,
            "difference": self.difference,
            "contributions": self.said.contributions_sum,
            "contributions_not": self.other.contributions_sum,
            "bias": self.bias,
            "times_as_probable": math.exp(min(self.difference, 700.0)),
        }


@dataclass(frozen=True)
class Explanation:
    """Why the model said what it said of one picture.

    Attributes:
        file: the picture's path, as it was given.
        image_size: (width, height) of the upright original picture, in which all boxes are.
        predicted: index of the most probable class.
        predicted_name: its name.
        probability: its softmax probability.
        classes: evidence for the most probable classes, the predicted one first, then for those asked for.
        view: where in the original the pixels lie that the model saw.
        reach: what decides a similarity: the ``"box"`` alone, ``"more"`` (``sees``), or ``"all"`` of the picture.
    """

    file: str
    image_size: tuple[int, int]
    predicted: int
    predicted_name: str
    probability: float
    classes: list[ClassEvidence]
    view: View
    reach: str = "all"

    @property
    def seen(self) -> Box:
        """The part of the original picture that the model saw."""
        return self.view.seen

    def of(self, class_name: str) -> ClassEvidence:
        """The evidence for a class.

        Raises:
            InputError: the class isn't among those that were explained.
        """
        found = {evidence.class_name: evidence for evidence in reversed(self.classes)}
        if class_name not in found:
            known = listing([evidence.class_name for evidence in self.classes])
            raise InputError(
                f"no evidence for class {class_name!r}; expected one of: {known}; explain it with also=[...]"
            )
        return found[class_name]

    def why_not(self, class_name: str) -> WhyNot:
        """Why the predicted class and not another one.

        Raises:
            InputError: the class is the predicted one, or isn't among those that were explained.
        """
        if class_name == self.predicted_name:
            raise InputError(f"why not {class_name!r}? It is the predicted class of {self.file}; ask for another one")
        return WhyNot(self.classes[0], self.of(class_name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that a trip through JSON does not change; ``regions`` stand once, for all matches."""
        matches = [match for evidence in self.classes for match in evidence.matches]
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        plain["regions"] = next((one.regions.to_dict() for one in matches if one.regions is not None), None)
        for values, evidence in zip(plain["classes"], self.classes, strict=True):
            values["contributions_sum"] = evidence.contributions_sum
            for match in values["matches"]:
                del match["regions"]
        return json.loads(json.dumps(plain))  # type: ignore[no-any-return]


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
        >>> from protopush.models.model import ProtoModel
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
    return explain_batch(model, pixels, [transform.view(image.size)], [str(path)], class_names, top_classes, also)[0]


def explain_batch(
    model: ProtoModel,
    images: Tensor,
    views: Sequence[View],
    files: Sequence[str],
    class_names: Sequence[str],
    top_classes: int = 3,
    also: Sequence[str] = (),
) -> list[Explanation]:
    """The same for a batch that is read already, on the model's device: one forward pass.

    Args:
        model, class_names, top_classes, also: as for :func:`explain_image`.
        images: (B, 3, H, W), what the transform made of the files.
        views: B, the geometry of each picture (``transform.view``).
        files: B names, for the record.
    """
    _check(model.head, class_names, top_classes, also)
    with preserve_state(model):
        features: Features = model.backbone(images)
        output: HeadOutput = model.head(features)
    return explain_output(model.head, output, features.regions, views, files, class_names, top_classes, also)


def explain_output(
    head: HeadOptimal,
    output: HeadOutput,
    regions: Regions,
    views: Sequence[View],
    files: Sequence[str],
    class_names: Sequence[str],
    top_classes: int = 3,
    also: Sequence[str] = (),
) -> list[Explanation]:
    """The same for what the head said already of a batch; ``regions`` are those of the patches that it saw."""
    regions, weights = head.compared(regions), head.weights().tolist()
    logits, biases = output.logits.double().cpu(), head.bias.tolist()
    # (B, C, K) each, brought over from the device at once
    terms = [some.cpu() for some in (output.similarities, output.contributions, output.cells, output.maps)]
    used = head.proto_manager.mask().tolist()
    explanations = []
    for i, (file, view) in enumerate(zip(files, views, strict=True)):
        if not logits[i].isfinite().all():
            found = logits[i].tolist()
            raise InputError(f"the logits of {file} are {found}; expected finite numbers; check the model's weights")
        probabilities = logits[i].softmax(dim=0).tolist()
        # stable, so that equal logits name the same class as argmax
        ranked = logits[i].argsort(descending=True, stable=True).tolist()
        classes = []
        for c in [c for place, c in enumerate(ranked) if place < top_classes or class_names[c] in also]:
            columns = zip(weights[c], *(some[i, c].tolist() for some in terms), strict=True)
            matches = [
                Match(
                    class_index=c,
                    prototype=k,
                    similarity=similarity,
                    weight=weight,
                    contribution=contribution,
                    cell=cell,
                    box=view.original_box(regions.boxes[cell]),
                    sees=view.original_box(regions.sees[cell]),
                    anchor=head.proto_manager.anchor(c, k),
                    values=tuple(values),
                    regions=regions,
                    more=tuple(view.original_box(regions.boxes[i]) for i in _counted(values, cell, head.top_patches)),
                )
                for k, (weight, similarity, contribution, cell, values) in enumerate(columns)
                if used[c][k]
            ]
            matches.sort(key=lambda match: -match.contribution)  # stable: the lower slot first among equals
            classes.append(ClassEvidence(c, class_names[c], probabilities[c], float(logits[i, c]), biases[c], matches))
        first = classes[0]
        answer = first.class_index, first.class_name, first.probability, classes
        explanations.append(Explanation(file, view.original, *answer, view, regions.reach))
    return explanations


def _counted(values: Sequence[float], best: int, top_patches: int) -> list[int]:
    """The patches that count besides the best one, the most similar first."""
    others = [i for i in range(len(values)) if i != best]
    return sorted(others, key=lambda i: -values[i])[: top_patches - 1]


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
