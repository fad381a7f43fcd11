"""What the metrics are called and what they mean, in one sentence that needs no statistics."""

from __future__ import annotations

from typing import NamedTuple


class Term(NamedTuple):
    """A metric.

    Attributes:
        name, meaning: in words.
        better: ``higher``, ``lower`` or empty where neither is.
        chance: what guessing would give: a number, or the key of the metric that tells it (``one_of_classes``: a
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
    "localization": ("Where it looks", "Whether the evidence lies on the marked region (the masks of the data)."),
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
            "coverage", "The share of images that look much like a prototype of their class; mean over classes."
        ),
        "coverage.mean_similarity": Term(
            "similarity of the best prototype", "Of each image to its class's nearest prototype; mean over classes."
        ),
        "sparsity.global_size": Term("prototypes that weigh", "How many have any weight at all.", "", share=False),
        "sparsity.local_size": Term(
            "prototypes for 90 % of an answer",
            "How many make up nine tenths of what speaks for the answer; mean over images.",
            "lower",
            share=False,
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
