"""What the model saw in one picture, as data: every term of every logit, and where in the file it comes from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from protopush.data.transforms import Box, View
from protopush.errors import InputError, listing
from protopush.nn.prototypes import Anchor


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
        map: cosine of the prototype and every cell, ``grid`` rows of columns; its largest is ``similarity``.
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
    map: tuple[tuple[float, ...], ...] = ()


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
    """

    file: str
    image_size: tuple[int, int]
    predicted: int
    predicted_name: str
    probability: float
    classes: list[ClassEvidence]
    view: View

    @property
    def seen(self) -> Box:
        """The part of the original picture that the model saw."""
        return self.view.cell_box(0, (1, 1))

    def of(self, class_name: str) -> ClassEvidence:
        """The evidence for a class.

        Raises:
            InputError: the class isn't among those that were explained.
        """
        for evidence in self.classes:
            if evidence.class_name == class_name:
                return evidence
        known = listing([evidence.class_name for evidence in self.classes])
        raise InputError(f"no evidence for class {class_name!r}; expected one of: {known}; explain it with also=[...]")

    def why_not(self, class_name: str) -> WhyNot:
        """Why the predicted class and not another one.

        Raises:
            InputError: the class is the predicted one, or isn't among those that were explained.
        """
        if class_name == self.predicted_name:
            raise InputError(f"why not {class_name!r}? It is the predicted class of {self.file}; ask for another one")
        return WhyNot(self.classes[0], self.of(class_name))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that a trip through JSON does not change."""
        plain: dict[str, Any] = _plain(asdict(self))
        for values, evidence in zip(plain["classes"], self.classes, strict=True):
            values["contributions_sum"] = evidence.contributions_sum
        return plain


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
