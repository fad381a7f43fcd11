"""What exact live anchors cost in fine-tuning: prototypes embedded from their crops in every step, or now and then.

    python benchmarks/live_speed.py

The whole model on windows is trained, live, by the same steps on the same images in memory, side by side:

- "crops" embeds the pixels of all anchors in every step, with gradients, as ``protopush train`` does.
- "stored" compares with the anchors' features as they were at the last refresh, which embeds their images again.

Both are refreshed every 100 steps (``push.anchor_refresh``): a hundredth of a refresh is charged to each step. The
limit is the forward and backward pass of the images through the backbone alone. The time is the processors': others may
use them as well; on a GPU it is the clock's.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import Comparison, Repetition, clock_of, paired, save, timed
from ready_maps import labelled, plain_loader
from rich.console import Console
from showing import Parser, count, device_name, surroundings, table

from protopush import HeadOptimal, ProtoModel, create_backbone, refresh_anchors
from protopush.backbones import Backbone
from protopush.nn.losses import PrototypeLoss

SIZES = {"classes": 7, "prototypes": 10, "window": 64, "stride": 32, "refresh": 100}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    backbones = ["tf_efficientnet_lite0", "resnet18"]
    parser.add_argument("--backbones", nargs="+", default=backbones, help=f"(default: {' '.join(backbones)})")
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="images of a step (default: 32)")
    parser.add_argument("--repetitions", type=count, default=7, metavar="N", help="(default: 7)")
    parser.add_argument("--pixels", type=count, default=224, metavar="N", help="of a side (default: 224)")
    parser.add_argument("--device", type=device_name, default="cpu", help="(default: cpu)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "live_speed.json")
    options = parser.parse_args(argv)
    record = surroundings(options.device) | {"sizes": SIZES | {"batch": options.batch, "pixels": options.pixels}}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    comparisons: list[Comparison] = []
    for name in options.backbones:
        comparisons.append(fine_tuning(name, options.batch, options.pixels, options.repetitions, options.device))
        save(record | {"comparisons": [comparison.to_dict() for comparison in comparisons]}, options.out)
    Console(width=None if sys.stdout.isatty() else 120).print(table("live anchors in fine-tuning", comparisons))
    return 0


def fine_tuning(name: str, batch: int, pixels: int, repetitions: int, device: str) -> Comparison:
    """A step of each side, its refresh, and the bare pass of the images."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels).to(device)
    labels = (torch.arange(batch) % SIZES["classes"]).to(device)
    anchored = torch.randn(SIZES["classes"] * SIZES["prototypes"], 3, pixels, pixels)
    loader = plain_loader(labelled(anchored, SIZES["classes"]))

    def backbone_of() -> Backbone:
        windows = {"size": SIZES["window"], "stride": SIZES["stride"]}
        return create_backbone(name, pretrained=False, size=(pixels, pixels), windows=windows).eval().to(device)

    def model_of(crop_size: int | None) -> ProtoModel:
        backbone, sizes = backbone_of(), (SIZES["classes"], SIZES["prototypes"])
        head = HeadOptimal(backbone.channels, *sizes, anchoring="live", crop_size=crop_size)
        model = ProtoModel(backbone, head).eval().to(device)
        model.push_prototypes(loader, device, unique="image")  # each anchor on an image of its own
        refresh_anchors(model, loader, device)
        return model

    def step_of(model: ProtoModel) -> Callable[[], None]:
        optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-4), PrototypeLoss(grounding=1.0)

        def step() -> None:
            model.train()
            model.backbone.eval()  # norms keep their statistics, as in train.freeze_norms
            optimizer.zero_grad()
            loss(model(images), labels, model.head.proto_manager)[0].backward()
            optimizer.step()

        return step

    crops, stored, bare = model_of(SIZES["window"]), model_of(None), backbone_of()
    works = {
        "crops: step": step_of(crops),
        "stored: step": step_of(stored),
        "images alone": lambda: bare(images).patches.sum().backward(),
        "crops: refresh": partial(refresh_anchors, crops, loader, device),
        "stored: refresh": partial(refresh_anchors, stored, loader, device),
    }
    of, clock = clock_of(device)
    sides = {side: timed(work, clock=clock) for side, work in works.items()}
    found = paired(f"{name}, batches of {batch}, {len(anchored)} crops, {of}", "s", sides, repetitions)

    def seconds(side: str, took: Repetition) -> float:
        return took[f"{side}: step"] + took[f"{side}: refresh"] / SIZES["refresh"]

    for side in ("crops", "stored"):
        found.add(f"images a second, {side}", lambda took, side=side: batch / seconds(side, took), "/s")
    found.add("images a second, images alone", lambda took: batch / took["images alone"], "/s")
    found.add("crops / stored", lambda took: seconds("crops", took) / seconds("stored", took))
    return found.add("crops / images alone", lambda took: seconds("crops", took) / took["images alone"])


if __name__ == "__main__":
    sys.exit(main())
