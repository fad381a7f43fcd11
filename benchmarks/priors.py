"""Balanced accuracy / accuracy of a run on shifted tests, with three priors: the data's, balanced, and cross-fitted.

    python benchmarks/priors.py RUN --column localization

The tests are made of the run's own test split: parts of it by a column of the manifest, classes drawn alike, pictures
saved as JPEG of quality 30 or with a colour cast; and biases that are off by chance. Cross-fitted: biases and
temperature fitted on the validation split for the balanced prior, as ``train.prior balanced`` does it. One forward pass
for each image; ``--logits FILE`` keeps what it gave.
"""

from __future__ import annotations

import csv
import io
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from showing import Parser, count
from torch import Tensor

from protopush.data.images import read_image
from protopush.data.manifest import Sample
from protopush.data.sources import load_catalog
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.models.model_folder import Run
from protopush.nn.priors import with_prior
from protopush.runs.progress import bar
from protopush.runs.run import open_run
from protopush.training.prior_fit import PriorFit, fit_prior

BATCH = 16
CAST = (0.85, 1.0, 1.12)  # of red, green and blue
DRAWS, OFF = 20, 0.5
TITLES = ("images", "data's prior", "balanced", "cross-fitted")


def jpeg(picture: Image.Image) -> Image.Image:
    """The picture as JPEG of quality 30 leaves it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=30)
    return Image.open(file).convert("RGB")


def cast(picture: Image.Image) -> Image.Image:
    """The picture a little too blue."""
    values = np.asarray(picture, dtype=np.float32) * np.array(CAST, dtype=np.float32)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def logits_of(
    run: Run, samples: Sequence[Sample], change: Callable[[Image.Image], Image.Image] | None = None
) -> Tensor:
    """Logits (N, C) of the samples' pictures, changed before the transform."""
    found = []
    with bar("Reading images", len(samples)) as advance:
        for start in range(0, len(samples), BATCH):
            pictures = [read_image(sample.image) for sample in samples[start : start + BATCH]]
            images = torch.stack([run.transform(change(one) if change else one) for one in pictures])
            found.append(run.model(images).logits.float())
            advance(len(pictures))
    return torch.cat(found)


def labels_of(samples: Sequence[Sample]) -> Tensor:
    """Their labels, (N,)."""
    return torch.tensor([sample.label for sample in samples])


class Judge:
    """A run's three kinds of probabilities, and what they are worth."""

    def __init__(self, run: Run, val: Tensor, samples: Sequence[Sample]) -> None:
        if run.model.prior is None or run.model.train_shares is None:
            raise InputError(f"{run.folder} does not say which prior it assumes; expected one of this version")
        self.run, self.assumed, self.shares = run, run.model.prior, run.model.train_shares
        self.even = [1 / len(self.assumed)] * len(self.assumed)
        self.bias, self.val, self.samples = run.head.bias.detach(), val, samples
        self.fit = self.fitted(self.bias)

    def fitted(self, bias: Tensor) -> PriorFit:
        """The fit for the balanced prior, from these biases on."""
        groups = [sample.group for sample in self.samples]
        return fit_prior(self.val - self.bias, bias, labels_of(self.samples), groups, self.assumed, self.even)

    def scores(self, logits: Tensor, labels: Tensor, fitted: Tensor | None = None) -> list[tuple[float, float]]:
        """Balanced accuracy and accuracy with each prior; ``fitted``: the probabilities of the third, where known."""
        probabilities = logits.softmax(dim=1)
        if fitted is None:
            fitted = (self.fit.scale * (logits - self.bias) + self.fit.biases).softmax(dim=1)
        moved = [with_prior(probabilities, self.assumed, prior) for prior in (self.shares, self.even)]
        found = [classification_metrics(one, labels, self.run.class_names) for one in (*moved, fitted)]
        return [(one["balanced_accuracy"], one["accuracy"]) for one in found]

    def off(self, logits: Tensor, labels: Tensor) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
        """The means and the lowest of :data:`DRAWS` of biases off by normal numbers of deviation :data:`OFF`."""
        generator, rows = torch.Generator().manual_seed(0), []
        for _ in range(DRAWS):
            bias = self.bias + OFF * torch.randn(len(self.bias), generator=generator)
            fit = self.fitted(bias)
            fitted = (fit.scale * (logits - self.bias) + fit.biases).softmax(dim=1)
            rows.append(self.scores(logits - self.bias + bias, labels, fitted))
        drawn = torch.tensor(rows)
        return drawn.mean(dim=0).tolist(), drawn.amin(dim=0).tolist()


def tests(
    run: Run, judge: Judge, test: Sequence[Sample], logits: dict[str, Tensor], options: object
) -> Iterator[tuple]:
    """Name, number of images and scores of each test."""
    labels, val = labels_of(test), labels_of(judge.samples)
    yield "validation", len(val), judge.scores(logits["val"], val, judge.fit.probabilities)
    yield "test", len(labels), judge.scores(logits["test"], labels)
    values = column(run, test, options.column) if options.column else []
    for value, number in Counter(values).most_common():
        if number >= options.least:
            here = torch.tensor([one == value for one in values])
            yield f"test, {options.column} {value}", number, judge.scores(logits["test"][here], labels[here])
    generator, each = torch.Generator().manual_seed(0), len(labels) // len(judge.even)
    places = [(labels == c).nonzero().flatten() for c in range(len(judge.even))]
    drawn = [some[torch.randint(len(some), (each,), generator=generator)] for some in places if len(some)]
    alike = torch.cat(drawn)
    yield "test, classes drawn alike", len(alike), judge.scores(logits["test"][alike], labels[alike])
    some = chosen(len(test), options.images)
    yield "some of the test", len(some), judge.scores(logits["test"][some], labels[some])
    for name in ("jpeg", "cast"):
        words = {"jpeg": "the same, JPEG of quality 30", "cast": "the same, a colour cast"}[name]
        yield words, len(some), judge.scores(logits[name], labels[some])
    for words, scores in zip(("mean", "lowest"), judge.off(logits["test"], labels), strict=True):
        yield f"test, biases off by chance: {words} of {DRAWS}", len(labels), scores


def column(run: Run, test: Sequence[Sample], name: str) -> list[str]:
    """What the manifest says of each image in a column."""
    with Path(run.data["path"]).open(encoding="utf-8-sig", newline="") as file:
        rows = {row["image"]: row.get(name, "") for row in csv.DictReader(file)}
    return [rows[sample.name] for sample in test]


def chosen(total: int, number: int) -> list[int]:
    """The images that are changed, the same each time."""
    return sorted(np.random.default_rng(0).permutation(total)[:number].tolist())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table in Markdown."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder whose images are at hand")
    parser.add_argument("--column", default="", help="of the manifest, whose values make tests")
    parser.add_argument("--least", type=count, default=200, metavar="N", help="images of such a test (default: 200)")
    parser.add_argument("--images", type=count, default=300, metavar="N", help="that are changed (default: 300)")
    parser.add_argument("--logits", type=Path, metavar="FILE", help="read, or written where it isn't there")
    options = parser.parse_args(argv)
    try:
        run = open_run(options.run)
        catalog = load_catalog(
            run.data["path"], run.data["source"], classes=run.class_names, seed=run.data["split_seed"]
        )
        val, test = catalog.split("val"), catalog.split("test")
        if options.logits and options.logits.is_file():
            logits = torch.load(options.logits, weights_only=True)
        else:
            some = [test[i] for i in chosen(len(test), options.images)]
            logits = {"val": logits_of(run, val), "test": logits_of(run, test)}
            logits |= {"jpeg": logits_of(run, some, jpeg), "cast": logits_of(run, some, cast)}
            if options.logits:
                torch.save(logits, options.logits)
        judge = Judge(run, logits["val"], val)
    except InputError as error:
        parser.error(str(error))
    print(f"temperature {1 / judge.fit.scale:.2f}, spread {judge.fit.spread}")
    print("\n".join(f"| {' | '.join(row)} |" for row in (("test", *TITLES), ["---"] * 5)))
    for name, number, scores in tests(run, judge, test, logits, options):
        print(f"| {name} | {number} | " + " | ".join(f"{one:.3f} / {other:.3f}" for one, other in scores) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
