"""A few images that tell how the model works and fails, each with the reasons for its answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image
from protopush.explain import ClassEvidence, Explanation, explain_image
from protopush.explain.figure_style import COLOURS, Rect
from protopush.models.model_folder import Run
from protopush.report.context import Case, Look, Picture, Score
from protopush.report.inline_pictures import embed, framed, heat, part

EACH = 3  # cases of a kind
ROWS = 5  # prototypes in a panel
LARGE, PART, SIDE = 380, 104, 200  # CSS pixels of the image, of a part, and of the similarity map


class Training(NamedTuple):
    """A prototype's part of its training image, that image, its anchor in the page and its file."""

    part: Picture | None
    source: Picture | None
    ident: str
    name: str
    file: str


def telling(probabilities: Tensor, labels: Tensor, each: int = EACH) -> dict[str, list[int]]:
    """The surest right images, the surest wrong ones, the least sure ones; of different classes where that goes.

    No image is named twice: one that is right or wrong for sure isn't among the least sure.

    Args:
        probabilities: (N, C).
        labels: (N,).
        each: how many of a kind.

    Example:
        >>> telling(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.3, 0.7]]), torch.tensor([0, 0, 0, 0]), each=1)
        {'right': [0], 'wrong': [3], 'unsure': [2]}
    """
    top, predicted = probabilities.max(dim=1)
    right = (predicted == labels).tolist()
    surest = top.argsort(descending=True, stable=True).tolist()
    truth = labels.tolist()
    found = {
        "right": _varied([i for i in surest if right[i]], truth, each),
        "wrong": _varied([i for i in surest if not right[i]], truth, each),
    }
    taken = {i for some in found.values() for i in some}
    return found | {"unsure": _varied([i for i in surest[::-1] if i not in taken], truth, each)}


def _varied(ranked: Sequence[int], labels: Sequence[int], each: int) -> list[int]:
    """The first of each class, in order, then whatever comes first."""
    seen: set[int] = set()
    firsts = [i for i in ranked if labels[i] not in seen and not seen.add(labels[i])]  # type: ignore[func-returns-value]
    return sorted((firsts + [i for i in ranked if i not in set(firsts)])[:each], key=list(ranked).index)


TITLES = {"right": "Right, and sure of it", "wrong": "Wrong, and sure of it", "unsure": "Not sure"}


def make_cases(
    run: Run,
    dataset: ImageDataset,
    probabilities: Tensor,
    labels: Tensor,
    training: Callable[[int, int], Training],
    device: str | torch.device = "cpu",
) -> list[Case]:
    """The telling cases as panels.

    Args:
        run: its model is on ``device``.
        dataset: the images.
        probabilities: (N, C) of them.
        labels: (N,).
        training: (class, prototype) to its part of its training image.
        device: where the model is.
    """
    cases = []
    for kind, numbers in telling(probabilities, labels).items():
        for number in numbers:
            sample = dataset.samples[number]
            truth = run.class_names[int(labels[number])]
            found = explain_image(run.model, sample.image, run.transform, run.class_names, device, also=[truth])
            cases.append(_case(TITLES[kind], sample.image, sample.name, truth, found, training))
    return cases


def _case(
    title: str,
    path: Path,
    name: str,
    truth: str,
    found: Explanation,
    training: Callable[[int, int], Training],
) -> Case:
    image = read_image(path)
    said = found.classes[0]
    shown = said.matches[:ROWS]
    rest = said.matches[ROWS:]
    best = shown[0]
    warm, span = heat(image, found.seen, best.map, SIDE, f"where {name} is like the first prototype")
    return Case(
        title=title,
        file=name,
        truth=truth,
        predicted=said.class_name,
        probability=said.probability,
        right=said.class_name == truth,
        picture=_numbered(image, name, [match.box for match in shown]),
        heat=framed(warm, [best.box], image.size, ["1"]) if best.grid != (1, 1) else None,
        heat_range=span,
        looks=_looks(image, name, said, training),
        others=len(rest),
        others_sum=math.fsum(match.contribution for match in rest),
        scores=_scores(found, truth),
    )


def _numbered(image: Image.Image, name: str, boxes: Sequence[Rect]) -> Picture:
    """The image with the numbers of the matches; those of one cell share a box."""
    places: dict[Rect, list[int]] = {}
    for i, box in enumerate(boxes):
        places.setdefault(box, []).append(i)
    return framed(
        embed(image, LARGE, LARGE, f"image {name}"),
        list(places),
        image.size,
        labels=[", ".join(str(i + 1) for i in some) for some in places.values()],
        colours=[some[0] % len(COLOURS) for some in places.values()],
    )


def _looks(image: Image.Image, name: str, said: ClassEvidence, training: Callable[[int, int], Training]) -> list[Look]:
    strongest = max(abs(match.contribution) for match in said.matches) or 1.0
    looks = []
    for i, match in enumerate(said.matches[:ROWS]):
        there = training(match.class_index, match.prototype)
        looks.append(
            Look(
                number=i + 1,
                colour=i % len(COLOURS),
                here=part(image, match.box, PART, f"part {i + 1} of {name}", i % len(COLOURS)),
                there=there.part,
                source=there.source,
                ident=there.ident,
                prototype=there.name,
                file=there.file,
                similarity=match.similarity,
                weight=match.weight,
                contribution=match.contribution,
                bar=abs(match.contribution) / strongest,
            )
        )
    return looks


def _scores(found: Explanation, truth: str) -> list[Score]:
    """The answer, the runner-up, and the true class where it is neither."""
    first = found.classes[0]
    roles = {first.class_name: "answer"}
    if len(found.classes) > 1:
        roles[found.classes[1].class_name] = "runner-up"
    roles[truth] = f"{roles[truth]}, true class" if truth in roles else "true class"
    return [
        Score(
            name=evidence.class_name,
            role=roles[evidence.class_name],
            probability=evidence.probability,
            contributions=evidence.contributions_sum,
            bias=evidence.bias,
            logit=evidence.logit,
            behind=first.logit - evidence.logit,
        )
        for evidence in found.classes
        if evidence.class_name in roles
    ]
