"""Measures of a run on a split: one pass for most of them, more forward passes for faithfulness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.backbones.create import Features
from protopush.data.dataset import ImageDataset, read_mask, seen_mask
from protopush.data.features import inference_batch_size
from protopush.data.manifest import Sample
from protopush.metrics.classification import classification_metrics
from protopush.metrics.faithfulness import area_under, blur, deletion_curve, location_misalignment, relevance_ordering
from protopush.metrics.localization import activation_share, box_share, outside_inside_ratio, pointing_game
from protopush.metrics.prototype_quality import prototype_metrics
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOutput
from protopush.preserve_state import iterate_outputs, preserve_state
from protopush.runs.progress import bar

STEPS = 10
RANDOM_ORDERS = 2
PASSES = (RANDOM_ORDERS + 2) * (STEPS + 1) + STEPS + 3  # over each image: four curves, the peak, and the descent
CHANGE = 0.02  # of the range of a pixel: about 5 of 255 levels, which nobody sees
BATCH = 8


def measure_faithfulness(
    run: Run, dataset: ImageDataset, seen: Observed, device: torch.device | str, count: int, seed: int
) -> dict[str, Any] | None:
    """Insertion, deletion, relevance ordering and misalignment, each the mean over ``count`` images.

    Args:
        seen: what was observed on the N images: the evidence and the box of the strongest prototype are tested.
        count: how many of the images, drawn once for all runs of a seed; 0: None is returned.
        seed: of the choice and of the random orders.
    """
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    if not len(chosen):
        return None
    view, rows, predicted = dataset.eval_view(), list[Tensor](), seen.probabilities.argmax(dim=1)
    with preserve_state(run.model), bar("Faithfulness", PASSES * len(chosen)) as advance:
        for some in torch.split(chosen, BATCH):
            images = torch.stack([view[i][0] for i in some.tolist()]).to(device)
            answers = predicted[some].to(device), seen.strongest[some].to(device)
            rows.append(_of_batch(run, images, seen.evidence[some], *answers, seed, advance))
    names = ("insertion", "deletion", "random_insertion", "relevance_ordering", "location_change", "activation_change")
    means = torch.cat(rows, dim=1).mean(dim=1).tolist()
    return {"images": len(chosen), **dict(zip(names, means, strict=True))}


def _of_batch(
    run: Run, images: Tensor, evidence: Tensor, predicted: Tensor, strongest: Tensor, seed: int,
    advance: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """The six numbers (6, B) of a batch; each pass over its images advances by as many."""

    def probability(images: Tensor, places: Tensor) -> Tensor:
        """(B,) of the class that was predicted for the whole image."""
        output: HeadOutput = run.model(images)
        advance(len(images))
        return output.logits.float().softmax(dim=1)[torch.arange(len(images)), predicted[places]]

    def similarities(images: Tensor, places: Tensor) -> Tensor:
        """(B, L): the similarity of every patch to the strongest prototype."""
        features: Features = run.model.backbone(images)
        advance(len(images))
        prototypes = run.head.prototypes()[predicted[places], strongest[places]]
        return (run.head.embed(features.patches) @ prototypes.unsqueeze(-1)).squeeze(-1)

    hidden = blur(images)
    ordering, chance = relevance_ordering(probability, images, evidence, STEPS, RANDOM_ORDERS, seed, hidden)
    deletion = area_under(deletion_curve(probability, images, evidence, STEPS, hidden))
    peaks = similarities(images, torch.arange(len(images))).argmax(dim=1)
    boxes = _whole_pixels(torch.tensor(run.model.backbone.regions.boxes)[peaks.cpu()])
    moved = location_misalignment(similarities, images, boxes, CHANGE / max(run.transform.preprocessing.std))
    numbers = (ordering + chance, deletion, chance, ordering, moved["location_change"], moved["activation_change"])
    return torch.stack([values.double() for values in numbers])


@dataclass(frozen=True)
class Measured:
    """What was measured of a run on a split.

    Attributes:
        dataset: the images of ``split``.
        probabilities, labels: (N, C), (N,).
        numbers: plain values for JSON: ``classification``, ``prototypes``, ``localization`` (None without masks),
            ``faithfulness`` (None where it wasn't asked for).
    """

    split: str
    dataset: ImageDataset
    probabilities: Tensor
    labels: Tensor
    numbers: dict[str, Any]


class Observed(NamedTuple):
    """What a model has seen in a data set of N images, on the CPU.

    Attributes:
        probabilities, labels: (N, C), (N,).
        similarities, contributions: (N, C, K).
        strongest: (N,), the predicted class's prototype with the largest contribution.
        peaks: (N, 4), the box of its best patch, in pixels of the model's input.
        maps: (N, h, w), its map as a picture draws it: from its lowest value up.
        evidence: (N, h, w), the maps of all prototypes of the predicted class, weighted as in its logit.
    """

    probabilities: Tensor
    similarities: Tensor
    contributions: Tensor
    labels: Tensor
    strongest: Tensor
    peaks: Tensor
    maps: Tensor
    evidence: Tensor


def measure(
    run: Run, dataset: ImageDataset, split: str, known: Mapping[str, Sample], device: torch.device | str = "cpu",
    num_workers: int = 0, resamples: int = 1000, faithfulness: int = 48, seed: int = 0,
) -> Measured:  # fmt: skip
    """How good a run is on a split, and its prototypes.

    Args:
        run: its model is on ``device``.
        dataset: the images of ``split``.
        known: samples by name, for the masks of the anchors' images.
        resamples: of the bootstrap; 0: no intervals.
        faithfulness: how many of the images faithfulness is measured on; 0: none.
        seed: of the bootstrap and of the choice of these images.
    """
    seen = observe(run, dataset, device, num_workers)
    groups, answers = dataset.groups if any(dataset.groups) else None, (seen.probabilities, seen.labels)
    predicted, manager = seen.probabilities.argmax(dim=1), run.head.proto_manager
    anchors = manager.anchors
    with bar("Metrics", 2) as advance:
        classification = classification_metrics(*answers, run.class_names, groups, resamples, seed)
        advance(1)
        prototypes = prototype_metrics(
            run.head.prototypes().detach().cpu(),
            manager.mask().cpu(),
            [None if anchor is None else (anchor.file or anchor.sample_id, anchor.cell) for anchor in anchors],
            [None if anchor is None else anchor.similarity_after for anchor in anchors],
            seen.similarities,
            seen.contributions,
            seen.labels,
            predicted,
        )
        advance(1)
    numbers = {
        "classification": classification,
        "prototypes": prototypes,
        "localization": _localization(run, dataset, known, seen),
        "faithfulness": measure_faithfulness(run, dataset, seen, device, faithfulness, seed),
    }
    return Measured(split, dataset, seen.probabilities, seen.labels, numbers)


def observe(run: Run, dataset: ImageDataset, device: torch.device | str = "cpu", num_workers: int = 0) -> Observed:
    """One forward pass over a data set."""
    device, batches = torch.device(device), list[list[Tensor]]()
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=inference_batch_size(device), num_workers=num_workers)
    features: Features
    with (
        bar("Reading images", len(dataset)) as advance,
        iterate_outputs(run.model, loader, device, advance, call=run.model.backbone) as outputs,
    ):
        weights = run.head.weights()
        for features, labels, _ in outputs:
            output: HeadOutput = run.head(features)
            of_class, every = output.logits.argmax(dim=1), torch.arange(len(labels))
            values, draw = drawn_values(run, features, output, of_class), features.regions.map
            strongest = output.contributions[every, of_class].argmax(dim=1)
            boxes = torch.tensor(features.regions.boxes, device=values.device)
            observed = Observed(
                probabilities=output.logits.float().softmax(dim=1),
                similarities=output.similarities.float(),
                contributions=output.contributions.float(),
                labels=labels,
                strongest=strongest,
                peaks=boxes[values[every, strongest].argmax(dim=1)],
                maps=draw(values[every, strongest]),
                evidence=draw((values * weights[of_class].unsqueeze(-1)).sum(dim=1)),
            )
            batches.append([values.cpu() for values in observed])
    return Observed(*map(torch.cat, zip(*batches, strict=True)))


def drawn_values(run: Run, features: Features, output: HeadOutput, of_class: Tensor) -> Tensor:
    """The values (B, K, L) of the maps of one class's prototypes for each image, each from its lowest value up.

    A model that compares prototypes with the pooled feature has no map. The cosine of its prototypes and every patch is
    what people draw in that place; whether it is right is for the measures of faithfulness to say.
    """
    every = output._replace(embeddings=run.head.embed(features.patches)).maps
    values = every[torch.arange(len(every)), of_class]
    return values - values.amin(dim=2, keepdim=True)


def _localization(
    run: Run, dataset: ImageDataset, known: Mapping[str, Sample], seen: Observed
) -> dict[str, Any] | None:
    """Where maps and anchors lie, on the images that have a mask."""
    rows = []
    masked = [i for i, sample in enumerate(dataset.samples) if sample.mask is not None]
    with bar("Masks", len(masked)) as advance:
        for i in masked:
            mask = seen_mask(dataset.samples[i], run.transform).unsqueeze(0)
            maps, peak = seen.maps[i : i + 1], seen.peaks[i : i + 1]
            on_mask = box_share(_whole_pixels(peak), mask)
            found = activation_share(maps, mask), pointing_game(peak, mask), on_mask, outside_inside_ratio(maps, mask)
            rows.append([*(float(value) for value in found), float(mask.double().mean())])
            advance(1)
    if not rows:
        return None
    shares, hits, peaks, ratios, areas = torch.tensor(rows, dtype=torch.float64).unbind(dim=1)
    return {
        "images": len(rows),
        "activation_on_mask": _defined(shares).mean().item(),
        "pointing_game": _defined(hits).mean().item(),
        "peaks_on_mask": peaks.mean().item(),
        "outside_inside_ratio": _defined(ratios).median().item(),
        "mask_area": areas.mean().item(),
    } | _anchors_on_mask(run, known)


def _anchors_on_mask(run: Run, known: Mapping[str, Sample]) -> dict[str, Any]:
    placed = [anchor for anchor in run.head.proto_manager.anchors if anchor is not None and anchor.box is not None]
    with_mask = [(anchor, sample) for anchor in placed if (sample := known.get(str(anchor.sample_id))) and sample.mask]
    if not with_mask:
        return {"anchors": 0, "anchors_on_mask": None, "anchors_mask_area": None}
    masks = [torch.from_numpy(read_mask(sample)) for _, sample in with_mask]
    shares = box_share(torch.tensor([anchor.box for anchor, _ in with_mask]), masks)
    areas = [float(seen_mask(sample, run.transform).double().mean()) for _, sample in with_mask]
    return {
        "anchors": len(with_mask),
        "anchors_on_mask": float(shares.mean()),
        "anchors_mask_area": sum(areas) / len(areas),
    }


def _whole_pixels(boxes: Tensor) -> Tensor:
    """Boxes (N, 4) outward to whole pixels."""
    return torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).long()


def _defined(values: Tensor) -> Tensor:
    return values[~values.isnan()]
