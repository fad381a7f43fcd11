"""A few images that show how the model works and fails, each with the reasons for its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from protopush.data.images import read_image
from protopush.data.transforms import View
from protopush.evaluation.measure import Measured
from protopush.explain import ClassEvidence, Explanation, Match, explain_batch
from protopush.explain.figure_style import COLOURS, Rect, drawn_sees, file_name, window_shares
from protopush.report.prototype_cards import Cards, Picture, embed, framed, heat, ident, part

EACH = 3  # cases of a kind
ROWS = 5  # prototypes in a case
LARGE, PART, SIDE = 380, 104, 200  # CSS pixels of the image, of a part, and of the similarity map
TITLES = {"right": "Right, and sure of it", "wrong": "Wrong, and sure of it", "unsure": "Not sure"}


def select_cases(probabilities: Tensor, labels: Tensor, each: int = EACH) -> dict[str, list[int]]:
    """The surest right images, the surest wrong ones, the least sure ones; of different classes where that goes.

    No image is named twice: one that is right or wrong for sure isn't among the least sure. Of probabilities (N, C) and
    labels (N,), ``each`` of a kind are selected.

    Example:
        >>> probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.5, 0.5], [0.3, 0.7]])
        >>> select_cases(probabilities, torch.tensor([0, 0, 0, 0]), each=1)
        {'right': [0], 'wrong': [3], 'unsure': [2]}
    """
    top, predicted = probabilities.max(dim=1)
    right, truth = (predicted == labels).tolist(), labels.tolist()
    surest = top.argsort(descending=True, stable=True).tolist()
    found = {
        "right": _varied([i for i in surest if right[i]], truth, each),
        "wrong": _varied([i for i in surest if not right[i]], truth, each),
    }
    taken = {i for some in found.values() for i in some}
    return found | {"unsure": _varied([i for i in surest[::-1] if i not in taken], truth, each)}


def _varied(ranked: Sequence[int], labels: Sequence[int], each: int) -> list[int]:
    """The first of each class, then the first of the others; in their order."""
    firsts = sorted({labels[i]: i for i in reversed(ranked)}.values(), key=ranked.index)
    return sorted((firsts + [i for i in ranked if i not in firsts])[:each], key=ranked.index)


def make_cases(measured: Measured, cards: Cards, device: str | torch.device = "cpu") -> list[dict[str, Any]]:
    """The selected cases, each image decoded once; the model of the cards' run is on ``device``."""
    selected = select_cases(measured.probabilities, measured.labels)
    return [_case(TITLES[kind], measured, i, cards, device) for kind, some in selected.items() for i in some]


def _case(title: str, measured: Measured, number: int, cards: Cards, device: str | torch.device) -> dict[str, Any]:
    run, sample = cards.run, measured.dataset.samples[number]
    image, name, truth = read_image(sample.image), sample.name, run.class_names[int(measured.labels[number])]
    pixels, view = run.transform(image).unsqueeze(0).to(device), run.transform.view(image.size)
    (found,) = explain_batch(run.model, pixels, [view], [name], run.class_names, also=[truth])
    first = found.classes[0]
    shown, rest = first.matches[:ROWS], first.matches[ROWS:]
    even, alt = found.reach == "box", f"where {name} is like the first prototype"
    warm, counted = heat(image, shown[0].map, view, SIDE, alt, even), [shown[0].box, *shown[0].more]
    return {
        "title": title,
        "file": name,
        "truth": truth,
        "predicted": first.class_name,
        "probability": first.probability,
        "right": first.class_name == truth,
        "picture": _numbered(image, name, shown, cards.reach),
        "heat": framed(warm, counted, image.size, ["1"] + [""] * len(shown[0].more)) if len(shown[0].map) > 1 else None,
        "heat_range": (min(map(min, shown[0].map)), max(map(max, shown[0].map))),
        "rows": [_with_pictures(row, image, view, name, cards) for row in contribution_rows(first)[:ROWS]],
        "others": len(rest),
        "others_sum": math.fsum(match.contribution for match in rest),
        "scores": _scores(found, truth),
    }


def contribution_rows(evidence: ClassEvidence) -> list[dict[str, Any]]:
    """What each prototype of a class adds to its score, the largest first; ``share`` of the longest bar."""
    longest = max((abs(match.contribution) for match in evidence.matches), default=0.0) or 1.0
    return [
        {
            "number": i + 1,
            "colour": i % len(COLOURS),
            "name": f"{evidence.class_name} #{match.prototype}",
            "file": file_name(match.anchor),
            "similarity": match.similarity,
            "places": 1 + len(match.more),
            "weight": match.weight,
            "contribution": match.contribution,
            "share": abs(match.contribution) / longest,
            "match": match,
        }
        for i, match in enumerate(evidence.matches)
    ]


def _with_pictures(row: dict[str, Any], image: Image.Image, view: View, name: str, cards: Cards) -> dict[str, Any]:
    """A row with this part of the image, that part of the training image, and the training image."""
    match = row["match"]
    there, source = cards.pictures(match.class_index, match.prototype)
    sees = drawn_sees(match, cards.reach, image.size, image.size)
    shares, alt = window_shares(match, view, cards.reach), f"part {row['number']} of {name}"
    here = part(image, match.box, round(PART * shares[0]), alt, row["colour"], sees=sees)
    if there is not None and shares[1] < 1:
        there = there._replace(width=round(PART * shares[1]), height=round(PART * shares[1]))
    return row | {"ident": ident(match.class_index, match.prototype), "here": here, "there": there, "source": source}


def _numbered(image: Image.Image, name: str, matches: Sequence[Match], reach: str) -> Picture:
    """The image with the numbers of the matches; those of one cell share a box."""
    places: dict[Rect, list[int]] = {}
    for i, match in enumerate(matches):
        places.setdefault(match.box, []).append(i)
    sees = [drawn_sees(matches[some[0]], reach, image.size, image.size) for some in places.values()]
    labels = [", ".join(str(i + 1) for i in some) for some in places.values()]
    colours = [some[0] % len(COLOURS) for some in places.values()]
    return framed(embed(image, LARGE, LARGE, f"image {name}"), list(places), image.size, labels, colours, sees)


def _scores(found: Explanation, truth: str) -> list[dict[str, Any]]:
    """The answer, the runner-up, and the true class where it is neither, each with its score's terms."""
    first = found.classes[0]
    roles = {evidence.class_name: role for evidence, role in zip(found.classes, ("answer", "runner-up"), strict=False)}
    roles[truth] = f"{roles[truth]}, true class" if truth in roles else "true class"
    return [
        {
            "name": evidence.class_name,
            "role": roles[evidence.class_name],
            "probability": evidence.probability,
            "contributions": evidence.contributions_sum,
            "bias": evidence.bias,
            "logit": evidence.logit,
            "behind": first.logit - evidence.logit,
        }
        for evidence in found.classes
        if evidence.class_name in roles
    ]
