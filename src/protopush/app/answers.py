"""Answers of the service, as OpenAPI describes them; an explanation is what ``protopush explain --json`` prints."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from protopush.explain.explanation import Explanation
from protopush.nn.prototypes import Anchor

Box = tuple[int, int, int, int]
Region = tuple[float, float, float, float]


class Answer(BaseModel):
    """What all have in common: there is nothing in them but what is said here."""

    model_config = ConfigDict(extra="forbid")


class Error(Answer):
    """Why a request was not answered."""

    error: str = Field(description="the fact, and what was expected")


class Health(Answer):
    """Whether the service answers."""

    ready: bool


class Version(Answer):
    """What answers."""

    versions: dict[str, str] = Field(description="of protopush and of what it computes with")
    weights_sha256: str = Field(description="of the run's model.safetensors")
    device: str
    classes: list[str] = Field(description="in label order")
    prior: dict[str, float] | None = Field(
        description="the shares of the classes that probabilities assume; null: unknown"
    )
    preprocessing: dict[str, Any] = Field(description="of the model's input, as in the run's config.json")
    crop_pct: float = Field(description="the share of the short side that is kept before the resize")
    threshold: float | None = Field(
        description="similarity below which nothing in training is like an image; null: unknown"
    )


class Prediction(Answer):
    """What the model says of one image."""

    file: str = Field(description="as the client called it, without folders")
    predicted: str = Field(description="the most probable class")
    probability: float = Field(description="of this class")
    probabilities: dict[str, float] = Field(description="of every class; their sum is 1")
    best_similarity: float = Field(description="the largest cosine of any prototype and any patch")
    nothing_similar: bool | None = Field(description="whether that is below the threshold; null where there is none")
    note: str = Field(description="what should be known of how the file was read, mostly nothing")


class Predictions(Answer):
    """One for each image, in their order."""

    predictions: list[Prediction]


class MatchAnswer(Answer):
    """One prototype of a class, and the patch of the image that is most similar to it."""

    class_index: int
    prototype: int = Field(description="its slot within the class, from 0")
    similarity: float = Field(description="cosine of the prototype and the patch")
    weight: float = Field(description="what a similarity of 1 would add to the logit")
    contribution: float = Field(description="similarity * weight")
    cell: int = Field(description="the patch's number, from 0")
    box: Box = Field(description="the patch in pixels of the upright image; x1 and y1 exclusive")
    sees: Box = Field(description="all that its similarity can depend on")
    anchor: Anchor | None = Field(description="the training patch that the prototype stands for")
    values: list[float] = Field(description="cosine of the prototype and every patch, in the order of regions")
    more: list[Box] = Field(description="the other patches that count")


class ClassAnswer(Answer):
    """All that the model holds for one class: contributions_sum + bias is the logit."""

    class_index: int
    class_name: str
    probability: float
    logit: float
    bias: float = Field(description="the part of the logit that no prototype explains")
    matches: list[MatchAnswer] = Field(description="the largest contribution first")
    contributions_sum: float


class ViewAnswer(Answer):
    """Where in the image the pixels lie that the model saw; all sizes are (width, height)."""

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    crop: tuple[int, int]


class RegionsAnswer(Answer):
    """Where the patches lie, in pixels of the model's input."""

    size: tuple[int, int] = Field(description="(height, width)")
    boxes: list[Region]
    sees: list[Region]


class WhyNotAnswer(Answer):
    """Why the predicted class and not the one that was asked for: the difference of their logits."""

    said: str = Field(alias="class")
    other: str = Field(alias="not")
    difference: float
    contributions: float
    contributions_not: float
    bias: float
    times_as_probable: float


class ExplanationAnswer(Answer):
    """Why the model says what it says of one image."""

    file: str = Field(description="as the client called it, without folders")
    image_size: tuple[int, int] = Field(description="(width, height) of the upright image")
    predicted: int = Field(description="index of the most probable class")
    predicted_name: str
    probability: float
    classes: list[ClassAnswer] = Field(description="the predicted class first")
    view: ViewAnswer
    reach: Literal["box", "more", "all"] = Field(
        description="what decides a similarity: the box alone, sees, or the image"
    )
    regions: RegionsAnswer | None
    why_not: WhyNotAnswer | None = Field(
        None, description="left out where it was not asked for, or is the predicted class"
    )


def explanation_values(found: Explanation, why_not: str | None) -> dict[str, Any]:
    """An explanation as plain values, with the difference to another class where there is one."""
    asked = why_not is not None and why_not != found.predicted_name
    return found.to_dict() | ({"why_not": found.why_not(str(why_not)).to_dict()} if asked else {})
