"""Threshold of similarity, below which nothing in training is like an image, set on images not trained on."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from protopush.data.features import inference_batch_size
from protopush.data.files import default_cache_dir, read_json, write_json
from protopush.data.images import sha256_of
from protopush.data.manifest import DataConfig, Sample
from protopush.distributed import all_gather_objects, broadcast_from_rank_zero, raise_on_all_ranks
from protopush.errors import InputError, first_line
from protopush.models.model_folder import Run
from protopush.predict.inputs import DIGITS, Outputs, Strings, own_share, run_over
from protopush.runs.progress import bar
from protopush.runs.split_record import open_catalog

logger = logging.getLogger("protopush.predict")

MOST = 2000  # images that a threshold is set on, and as many that it is measured on


@dataclass(frozen=True)
class Threshold:
    """An image none of whose similarities reaches ``value`` is like nothing in training.

    Attributes:
        value: a cosine, in the digits of the table; None where none could be set.
        source: given, validation or none.
        share: of the images in ``set_on`` that may be flagged.
        set_on, set_images, set_flagged: which images it was set on, how many, how many of them are flagged.
        measured_on, measured_images, measured_flagged: the same for images that it was not set on, where there are
            some: false alarms, as they are of the same kind as those of training.
        problem: why there is none.
    """

    value: float | None
    source: str
    share: float | None = None
    set_on: str = ""
    set_images: int = 0
    set_flagged: int = 0
    measured_on: str = ""
    measured_images: int = 0
    measured_flagged: int = 0
    problem: str = ""

    @property
    def false_alarms(self) -> float | None:
        """The share of images flagged among those that it was not set on."""
        return self.measured_flagged / self.measured_images if self.measured_images else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"false_alarms": self.false_alarms}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Threshold:
        """The inverse of :meth:`to_dict`.

        Raises:
            InputError: it is another's.
        """
        try:
            return cls(**{key: value for key, value in values.items() if key != "false_alarms"})
        except TypeError as error:
            raise InputError(f"damaged record of a threshold ({error}); add --overwrite to start again") from error


def largest_threshold(similarities: Sequence[float], share: float) -> float:
    """The largest threshold with at most ``share`` (in [0, 1)) of the similarities below it: one of them.

    Example:
        >>> largest_threshold([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], share=0.2)  # 0.1 and 0.2 are below
        0.3
    """
    allowed = math.floor(share * len(similarities) + 1e-9)  # 0.29 * 100 is a little less than 29
    return sorted(similarities)[allowed]


def calibrate(
    run: Run, data: DataConfig, share: float, device: torch.device | str = "cpu", num_workers: int = 0
) -> Threshold:
    """Set a threshold on a run's validation images, and measure it on others.

    It is measured on the test split; without one, it is set on half of the groups (lesions, patients) of the
    validation images and measured on the other half. At most ``MOST`` images are drawn of each. The similarities are
    kept in the cache folder.

    Args:
        run: its model is on ``device``.
        data: where its images are.
        share: of validation images that may be flagged, in [0, 1).

    Returns:
        Without ``value``, and with the reason, where the images can't be had.
    """
    drawn = broadcast_from_rank_zero(lambda: _drawn(run, data))
    if isinstance(drawn, str):
        return Threshold(None, "none", problem=drawn)
    (set_on, first), (measured_on, second) = drawn
    best = _similarities(run, [*first, *second], device, num_workers)
    below = [value for value in best[: len(first)] if value is not None]
    beyond = [value for value in best[len(first) :] if value is not None]
    if not below:
        return Threshold(None, "none", problem=f"no image of {set_on} can be read")
    value = largest_threshold(below, share)
    flagged, alarms = (sum(similarity < value for similarity in some) for some in (below, beyond))
    measured = (measured_on if beyond else "", len(beyond), alarms)
    return Threshold(value, "validation", share, set_on, len(below), flagged, *measured)


def _drawn(run: Run, data: DataConfig) -> list[tuple[str, list[str]]] | str:
    """The images that a threshold is set on and measured on, in words and as files; or why there are none."""
    try:
        catalog = open_catalog(data, run.class_names, run.folder)
        val = catalog.split("val")
    except (InputError, OSError) as error:
        return first_line(error)
    test, (first, second) = [sample for sample in catalog.samples if sample.split == "test"], halved(val)
    sets = {"the validation images": val, "the test images" if test else "": test}
    if second and not test:
        sets = {"half of the validation images": first, "the other half of the validation images": second}
    drawn = {name: some if len(some) <= MOST else Random(0).sample(some, MOST) for name, some in sets.items()}
    return [(name, [str(sample.image) for sample in samples]) for name, samples in drawn.items()]


def halved(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Two halves that share no group; the first has one group more where their number is odd."""
    groups = sorted({sample.group or sample.name for sample in samples})
    Random(0).shuffle(groups)
    chosen = set(groups[: -(-len(groups) // 2)])
    halves: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        halves[(sample.group or sample.name) not in chosen].append(sample)
    return halves


def _similarities(run: Run, files: Sequence[str], device: torch.device | str, num_workers: int) -> list[float | None]:
    """The largest similarity of each image, None where it can't be read; from the cache where it is known."""
    cache, known = broadcast_from_rank_zero(lambda: _cached(run, files))
    if known is not None:
        return known
    size = inference_batch_size(torch.device(device))
    batches = own_share([range(len(files))[start : start + size] for start in range(0, len(files), size)])
    found: list[float | None] = []

    def take(_: range, problems: Sequence[str], outputs: Outputs) -> None:
        good = [not problem and bool(finite) for problem, finite in zip(problems, outputs.finite, strict=True)]
        found.extend(value if ok else None for value, ok in zip(outputs.best.tolist(), good, strict=True))
        advance(1)

    with bar("Similarity of validation images", len(batches)) as advance:
        raise_on_all_ranks(lambda: run_over(run, Strings(files), batches, 0, device, num_workers, take))
    best = [value for some in all_gather_objects(found) for value in some]

    def keep() -> None:
        try:
            write_json(cache, best)
        except InputError as error:  # it is computed again another time
            logger.warning("%s", error)

    broadcast_from_rank_zero(keep)
    return best


def _cached(run: Run, files: Sequence[str]) -> tuple[Path, list[float | None] | None]:
    """The file of the similarities, another for other weights, transforms or images; and what it holds."""

    def digest(file: str) -> str:
        try:
            return sha256_of(file)
        except OSError:
            return "unreadable"

    decides = {
        "format": 1,
        "digits": DIGITS,
        "weights": read_json(run.folder / "config.json")["weights_sha256"],
        "preprocessing": run.transform.preprocessing.to_dict(),
        "crop_pct": run.transform.crop_pct,
        "max_megapixels": DataConfig(**run.data).max_megapixels,
        "files": [digest(file) for file in files],
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]
    file = default_cache_dir() / f"similarities-{key}.json"
    try:
        values = read_json(file)
    except InputError:
        return file, None
    good = isinstance(values, list) and len(values) == len(files)
    return file, values if good and all(value is None or isinstance(value, float) for value in values) else None
