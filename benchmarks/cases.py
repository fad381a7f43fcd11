"""The six cases; each yields comparisons."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import cabrnet_push
import peak_memory
import straightforward
import torch
from measuring import Comparison, Goal, clock_of, paired, timed
from ranks import Work, team
from ready_maps import BATCH, ReadyMaps, labelled, plain_loader, read_all, training_loader
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from protopush import ProtoModel, push_prototypes

BACKBONES = {"Lite0": "tf_efficientnet_lite0", "ResNet-18": "resnet18"}
SHAPES = {"7x10": (7, 10), "200x10": (200, 10)}  # classes x prototypes of each
WINDOWS = {"size": 64, "stride": 32}
ROWS, COLUMNS, DIM = 7, 7, 256  # of a ready-made map


@dataclass(frozen=True)
class Sizes:
    """How much of everything, and where."""

    images: int = 512
    pixels: int = 224
    maps: int = 2048
    few: int = 2000
    many: int = 50000
    rank_images: int = 256
    windowed: int = 32
    repetitions: int = 5
    device: str = "cpu"


def forward_pass(sizes: Sizes) -> Iterator[Comparison]:
    """a: push against the bare forward pass of the same backbone."""
    images = torch.randn(sizes.images, 3, sizes.pixels, sizes.pixels)
    for label, name in BACKBONES.items():
        for shape, (classes, prototypes) in SHAPES.items():
            model = ProtoModel.create(name, classes, pretrained=False, num_prototypes=prototypes)
            yield _against_forward(f"{label}, {shape}", model, labelled(images, classes), sizes, Goal(1.03))


def windows(sizes: Sizes) -> Iterator[Comparison]:
    """f: a push of live prototypes on windows against the bare forward pass of all windows."""
    images, (classes, prototypes) = torch.randn(sizes.windowed, 3, sizes.pixels, sizes.pixels), SHAPES["7x10"]
    model = ProtoModel.create(
        BACKBONES["Lite0"], classes, pretrained=False, windows=WINDOWS, num_prototypes=prototypes, anchoring="live"
    )
    of, clock = clock_of(sizes.device)
    setting = f"Lite0, {len(model.backbone.regions_of(images.shape[2:]))} windows, 7x10, {of}"
    yield _against_forward(setting, model, labelled(images, classes), sizes, Goal(1.1), clock)


def _against_forward(
    setting: str, model: ProtoModel, dataset: TensorDataset, sizes: Sizes, goal: Goal,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:  # fmt: skip
    device = sizes.device
    model.eval().to(device)
    works = {
        "push": partial(model.push_prototypes, training_loader(dataset), device),
        "bare forward": partial(_forward, plain_loader(dataset), model.backbone, device),
        "forward and projection": partial(
            _forward, plain_loader(dataset), lambda x: model.head.proj(model.backbone(x).patches), device
        ),
    }
    sides = {side: timed(work, clock=clock) for side, work in works.items()}
    return (
        paired(setting, "s", sides, sizes.repetitions)
        .add("push / bare forward", lambda t: t["push"] / t["bare forward"], goal=goal)
        .add("push / forward and projection", lambda t: t["push"] / t["forward and projection"])
    )


@torch.no_grad()
def _forward(loader: Any, run: Callable[[Tensor], Any], device: str) -> None:
    for images, _ in loader:
        run(images.to(device))


def search_alone(sizes: Sizes) -> Iterator[Comparison]:
    """b: the push fed with ready-made maps, less the time that its loader takes."""
    goals = {"7x10": Goal(0.05), "200x10": Goal(0.10)}
    maps = torch.randn(sizes.maps, ROWS * COLUMNS, DIM)
    for shape, (classes, prototypes) in SHAPES.items():
        dataset = labelled(maps, classes)
        model = ReadyMaps(classes, prototypes, DIM).to(sizes.device)
        for choice, options in push_choices().items():
            push = partial(push_prototypes, model, training_loader(dataset), sizes.device, **options)
            sides = {
                "push": timed(push, sizes.maps / 1000),
                "loader": timed(partial(read_all, plain_loader(dataset), sizes.device), sizes.maps / 1000),
                "one batched product": timed(products(model, maps, dataset.tensors[1]), sizes.maps / 1000),
            }
            yield paired(f"{shape}{choice}", "ms/image", sides, sizes.repetitions).add(
                "search alone (push - loader)", lambda t: t["push"] - t["loader"], "ms/image", goals[shape]
            )


def push_choices() -> dict[str, dict[str, Any]]:
    """How the push is called: every prototype takes its nearest patch, or, where it can, each another image."""
    if "unique" not in inspect.signature(push_prototypes).parameters:
        return {"": {}}
    return {f", unique {of}": {"unique": of} for of in ("none", "image")}


def products(model: ReadyMaps, maps: Tensor, labels: Tensor) -> Callable[[], None]:
    """The least that a search must do: each map times the prototypes of its class, one batched product a batch."""
    prototypes = model.head.proto_manager.unit().detach()
    batches = [
        (prototypes[own], part.mT)
        for own, part in zip(labels.split(BATCH), maps.to(prototypes.device).split(BATCH), strict=True)
    ]

    def work() -> None:
        for own, part in batches:
            torch.bmm(own, part)

    return work


def memory(sizes: Sizes) -> Iterator[Comparison]:
    """c: the peak memory for few and for many images, each in a fresh process."""
    counts = {f"{count} maps": count for count in (sizes.few, sizes.many)}
    sides = {name: partial(peak_memory.in_fresh_process, count, sizes.device) for name, count in counts.items()}
    few, many = counts
    setting = f"{peak_memory.CLASSES}x{peak_memory.PROTOTYPES}"
    comparison = paired(setting, "MB", sides, sizes.repetitions, warm_up=False)
    comparison.add("growth", lambda t: t[many] - t[few], "MB", Goal(10))
    comparison.remarks["maps"] = f"{peak_memory.CELLS}x{peak_memory.DIM}, made when they are read, none kept"
    yield comparison


def ranks(sizes: Sizes) -> Iterator[Comparison]:
    """d: one process against two ranks: of gloo with a thread each, or of NCCL with a GPU each."""
    if sizes.device != "cpu" and (count := torch.cuda.device_count()) < 2:
        yield Comparison("Lite0, 7x10", "s", {}, remarks={"not measured": f"{count} GPU here; two ranks take two"})
        return
    work = Work(BACKBONES["Lite0"], sizes.rank_images, sizes.pixels, *SHAPES["7x10"], sizes.device)
    with team(1, work) as one, team(2, work) as two:
        sides = {"one process": one.push, "two ranks": two.push}
        yield paired("Lite0, 7x10", "s", sides, sizes.repetitions).add(
            "one process / two ranks", lambda t: t["one process"] / t["two ranks"], goal=Goal(1.6, at_least=True)
        )


def others(sizes: Sizes) -> Iterator[Comparison]:
    """e: the push alone beside the straightforward algorithm and cabrnet, on the same ready-made maps."""
    maps = F.normalize(torch.randn(sizes.maps, ROWS * COLUMNS, DIM), dim=-1)
    for shape, (classes, prototypes) in SHAPES.items():
        dataset, model = labelled(maps, classes), ReadyMaps(classes, prototypes, DIM).to(sizes.device)
        parameter = model.head.proto_manager.prototypes
        start = parameter.detach().clone()
        per, again = sizes.maps / 1000, partial(parameter.data.copy_, start)
        sides = {
            "protopush": timed(partial(push_prototypes, model, training_loader(dataset), sizes.device), per, again),
            "straightforward": timed(
                partial(straightforward.push, model, training_loader(dataset), sizes.device), per, again
            ),
        }
        missing, agreement = cabrnet_push.why_not(), {}
        if not missing:
            theirs, agreement = _cabrnet_sides(model, maps, start, classes, per, sizes.device)
            sides |= theirs
        opponents = list(sides)[1:]
        sides["loader"] = timed(partial(read_all, plain_loader(dataset), sizes.device), per)
        comparison = paired(shape, "ms/image", sides, sizes.repetitions)
        comparison.remarks.update({"cabrnet": missing} if missing else agreement)
        comparison.add("protopush alone", lambda t: t["protopush"] - t["loader"], "ms/image")
        for name in opponents:
            goal = None if name == "straightforward" else Goal(5, at_least=True)
            comparison.add(f"{name} / protopush (alone)", partial(_times_slower, name), goal=goal)
        yield comparison


def _times_slower(name: str, took: Any) -> float:
    return (took[name] - took["loader"]) / (took["protopush"] - took["loader"])


def _cabrnet_sides(
    model: ReadyMaps, maps: Tensor, start: Tensor, classes: int, per: float, device: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """cabrnet's pushes, and how often each finds the very patch that protopush finds."""
    # The same maps in the layout that cabrnet's own extractors give, (B, D, h, w)
    upright = maps.mT.unflatten(2, (ROWS, COLUMNS)).contiguous()
    report = push_prototypes(model, plain_loader(labelled(maps, classes)), device, momentum=1.0)
    per_class = len(start) // classes
    ours = {r.class_index * per_class + r.prototype: (r.anchor.sample_id, r.anchor.cell) for r in report.prototypes}
    sides, agreement = {}, {}
    for name, similarity in cabrnet_push.SIMILARITIES.items():
        loader = plain_loader(labelled(upright, classes))
        theirs = cabrnet_push.build(similarity, start, classes).to(device)
        found = cabrnet_push.found_by(theirs, loader, COLUMNS, device)
        same = sum(found[row] == patch for row, patch in ours.items())
        agreement[name] = f"{same} of {len(ours)} nearest patches agree"
        restart = partial(cabrnet_push.restart, theirs, start)
        sides[name] = timed(partial(theirs.project, loader, device), per, restart)
    return sides, agreement


CASES: dict[str, Callable[[Sizes], Iterator[Comparison]]] = {
    "a": forward_pass,
    "b": search_alone,
    "c": memory,
    "d": ranks,
    "e": others,
    "f": windows,
}
