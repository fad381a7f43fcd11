"""Names of the metrics and what they mean, in one sentence that needs no statistics; measured numbers under them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Term(NamedTuple):
    """A metric.

    Attributes:
        name, meaning: in words.
        better: ``higher``, ``lower`` or empty where neither is.
        chance: what guessing would give: a number, or the key of the metric that holds it (``one_of_classes``: a
            class drawn at random).
        share: whether it lies between 0 and 1.
    """

    name: str
    meaning: str
    better: str = "higher"
    chance: float | str | None = None
    share: bool = True


GROUPS = {
    "classification": ("Classification", "How often the answer is right."),
    "prototypes": ("Prototypes", "Whether the prototypes are real, different from each other, and used."),
    "localization": ("Where the evidence lies", "Whether it lies on the marked region (the masks of the data)."),
    "faithfulness": ("Faithfulness", "Whether the parts that are shown are those that decide."),
}

# Keys of nested values are joined with dots.
TERMS: dict[str, dict[str, Term]] = {
    "classification": {
        "accuracy": Term("accuracy", "The share of images whose answer is right."),
        "balanced_accuracy": Term(
            "balanced accuracy",
            "The mean of the classes' sensitivities: rare classes count as much as common ones.",
            chance="one_of_classes",
        ),
        "macro_f1": Term("macro F1", "The mean over classes of F1, which weighs misses and false alarms alike."),
        "auroc": Term(
            "AUROC",
            "How often an image of a class gets a higher probability for it than one of another class; mean over "
            "classes.",
            chance=0.5,
        ),
        "ece": Term(
            "calibration error", "The mean gap between how sure the answers are and how often they are right.", "lower"
        ),
    },
    "prototypes": {
        "count": Term("prototypes", "How many there are in all classes.", "", share=False),
        "anchor_similarity.mean": Term(
            "similarity to the anchor, mean", "How like its training patch a prototype is: 1 is the very patch."
        ),
        "anchor_similarity.min": Term("similarity to the anchor, lowest", "The same for the least true prototype."),
        "duplicates.same_patch": Term(
            "same patch as another",
            "Prototypes that stand for a patch that another one stands for as well.",
            "lower",
            share=False,
        ),
        "duplicates.alike": Term(
            "all but equal to another",
            "Prototypes that are all but equal to another one of their class.",
            "lower",
            share=False,
        ),
        "diversity.mean": Term("diversity", "How unlike each other the prototypes of a class are, mean over classes."),
        "usage_entropy": Term(
            "evenness of use",
            "1 where all prototypes of a class are equally often its strongest, 0 where one always "
            "is; mean over classes.",
        ),
        "never_used": Term(
            "never the strongest", "The share of prototypes that lead in no image of their class.", "lower"
        ),
        "coverage.share": Term(
            "coverage", "The share of images that are much like a prototype of their class; mean over classes."
        ),
        "coverage.mean_similarity": Term(
            "similarity of the best prototype", "Of each image to its class's nearest prototype; mean over classes."
        ),
        "sparsity.global_size": Term("prototypes that weigh", "How many have any weight at all.", "", share=False),
        "sparsity.local_size": Term(
            "prototypes for 90 % of an answer",
            "How many make up nine tenths of the evidence for the answer; mean over images.",
            "lower",
            share=False,
        ),
        "sparsity.local_size_median": Term(
            "the same, in half of the images", "So many or fewer suffice in half of the images.", "lower", share=False
        ),
        "sparsity.local_size_p95": Term(
            "the same, in 95 % of the images", "So many or fewer suffice in 95 of 100 images.", "lower", share=False
        ),
        "sparsity.relevant_predicted": Term(
            "prototypes that add to the answer",
            "How many add anything at all to the answer; mean over images.",
            "lower",
            share=False,
        ),
        "sparsity.relevant_overall": Term(
            "prototypes that add to any class",
            "How many add anything at all to any class; mean over images.",
            "lower",
            share=False,
        ),
    },
    "localization": {
        "images": Term("images with a mask", "How many were measured.", "", share=False),
        "mask_area": Term("size of the marked region", "Its share of what the model sees; mean over images.", ""),
        "activation_on_mask": Term(
            "similarity on the region",
            "The share of the strongest prototype's similarity map that lies on the marked region.",
            chance="mask_area",
        ),
        "pointing_game": Term(
            "strongest part on the region",
            "How often the most similar part lies on the marked region.",
            chance="mask_area",
        ),
        "peaks_on_mask": Term(
            "box of the strongest part on the region",
            "The share of the most similar part's box that lies on the marked region; mean over images.",
            chance="mask_area",
        ),
        "outside_inside_ratio": Term(
            "outside to inside",
            "Mean similarity outside the marked region, divided by that inside; median over images.",
            "lower",
            1.0,
            share=False,
        ),
        "anchors": Term("prototypes with a mask", "Prototypes whose training image has a mask.", "", share=False),
        "anchors_on_mask": Term(
            "prototypes on the region",
            "The share of the prototypes' own parts that lies on the marked region.",
            chance="anchors_mask_area",
        ),
        "anchors_mask_area": Term(
            "size of the region in their images", "Its share of what the model sees of the prototypes' images.", ""
        ),
        "consistency": Term("consistency", "How often a prototype finds the same thing in different images."),
        "stability": Term("stability", "How often a prototype stays where it was when noise is added to the image."),
        "purity": Term("purity", "How much the parts that a prototype likes best are of one kind."),
    },
    "faithfulness": {
        "images": Term("images", "How many were measured.", "", share=False),
        "insertion": Term(
            "insertion",
            "Mean probability of the answer while parts appear one by one, the most important first.",
            chance="random_insertion",
        ),
        "random_insertion": Term("insertion in random order", "The same with the parts in random order.", ""),
        "relevance_ordering": Term(
            "relevance ordering",
            "Insertion, less insertion in random order: above 0, the parts shown do matter.",
            chance=0.0,
            share=False,
        ),
        "deletion": Term(
            "deletion",
            "Mean probability of the answer while parts vanish one by one, the most important first.",
            "lower",
        ),
        "location_change": Term(
            "peak leaves its part",
            "How often small changes elsewhere in the image, chosen to do just that, move the strongest part.",
            "lower",
        ),
        "activation_change": Term(
            "similarity lost by changes elsewhere",
            "The share of the strongest similarity that small changes elsewhere, chosen to do just that, take away.",
            "lower",
        ),
    },
}

PER_CLASS = {
    "sensitivity": ("sensitivity", "of the images of this class, the share that is recognised"),
    "specificity": ("specificity", "of all other images, the share that is not taken for this class"),
    "precision": ("precision", "of the answers that name this class, the share that is right"),
    "f1": ("F1", "sensitivity and precision in one number"),
    "auroc": ("AUROC", "how well its probability ranks images of this class above all others"),
}
HEADLINE = ("balanced_accuracy", "auroc", "accuracy")
APART = {"n", "confusion", "per_class", "intervals"}  # shown elsewhere, at any depth


def metric_name(key: str, kind: str = "classification") -> str:
    """The words for a metric; one that the glossary doesn't know keeps its key.

    Example:
        >>> metric_name("balanced_accuracy"), metric_name("novel")
        ('balanced accuracy', 'novel')
    """
    return TERMS[kind][key].name if key in TERMS.get(kind, {}) else key


def metric_text(value: Any, digits: int = 3) -> str:
    """A measured number for people: three digits, counts as they are, a dash where there is none.

    Example:
        >>> metric_text(0.12345), metric_text(7), metric_text(None), metric_text([0.5, None])
        ('0.123', '7', '–', '0.500, –')
    """
    if isinstance(value, (list, tuple)):
        return ", ".join(metric_text(one, digits) for one in value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def number_groups(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All metrics by kind: ``title``, ``about`` and ``numbers``; a kind that was not measured is left out.

    Example:
        >>> (group,) = number_groups({"classification": {"n": 9, "accuracy": 0.5, "novel": 2.0}, "faithfulness": None})
        >>> [(number["name"], number["text"]) for number in group["numbers"]]
        [('accuracy', '0.500'), ('novel', '2.000')]
    """
    found = []
    for kind, values in numbers.items():
        if isinstance(values, Mapping):
            title, about = GROUPS.get(kind, (kind, ""))
            found.append({"title": title, "about": about, "numbers": list(named_numbers(values, kind).values())})
    return found


def named_numbers(values: Mapping[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    """The metrics of one kind by key, in the glossary's order; those that it doesn't know come last.

    Returns:
        ``name``, ``meaning``, ``better`` as in :class:`Term`; ``value``, its ``text``, its 95 % ``interval`` and what
        guessing would give, ``chance``, each None where it is not known; ``share``: whether a bar can show it.
    """
    terms = TERMS.get(kind, {})
    flat, intervals = dict(_flat(values)), dict(_flat(values.get("intervals") or {}))
    chances = flat | {"one_of_classes": 1 / len(values["per_class"]) if values.get("per_class") else None}
    found = {}
    for key in [*(key for key in terms if key in flat), *(key for key in flat if key not in terms)]:
        term = terms.get(key, Term(key, "", "", share=False))
        value = finite(flat[key])
        found[key] = {
            "name": term.name,
            "meaning": term.meaning,
            "better": term.better,
            "value": value,
            "text": metric_text(flat[key]),
            "interval": finite_interval(intervals.get(key)),
            "chance": finite(chances.get(term.chance) if isinstance(term.chance, str) else term.chance),
            "share": term.share and value is not None and 0 <= value <= 1,
        }
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and key not in APART:
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in APART:
            yield f"{prefix}{key}", value


def finite(value: Any) -> float | None:
    """A number, None where there is none or it is not finite."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def finite_interval(value: Any) -> tuple[float, float] | None:
    """Both ends of an interval, None where one is missing."""
    low, high = map(finite, value or (None, None))
    return None if low is None or high is None else (low, high)
