"""What an explanation costs: cell boxes, maps and every term of three classes' logits, beside the bare forward pass.

    python benchmarks/explain_speed.py

Both sides see the same batch in memory, in turn. The bare forward pass is that of the backbone alone (of all windows,
where there are some). For information: the checked region of one prototype, which hides parts of the picture and looks
again, hundreds of times. The time is the processors': others may use them as
well; on a GPU it is the clock's.
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from measuring import Comparison, Goal, clock_of, paired, save, timed
from PIL import Image
from rich.console import Console
from showing import Parser, count, device_name, surroundings, table

from protopush.data.transforms import EvalTransform
from protopush.explain import explain_batch
from protopush.explain.checked_region import checked_regions
from protopush.models.model import ProtoModel

SIZES = {"backbone": "tf_efficientnet_lite0", "classes": 7, "prototypes": 10}
WINDOWS = {"size": 64, "stride": 32}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=count, default=32, metavar="N", help="images (default: 32)")
    parser.add_argument("--repetitions", type=count, default=11, metavar="N", help="(default: 11)")
    parser.add_argument("--pixels", type=count, default=224, metavar="N", help="of a side (default: 224)")
    parser.add_argument("--device", type=device_name, default="cpu", help="(default: cpu)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "explain_speed.json")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    sizes = SIZES | {"windows": WINDOWS, "batch": options.batch, "pixels": options.pixels}
    record = surroundings(options.device) | {"sizes": sizes}
    comparisons = [
        explaining(options.batch, options.pixels, options.repetitions, options.device, Goal(1.5)),
        explaining(options.batch, options.pixels, options.repetitions, options.device, Goal(1.1), WINDOWS),
    ]
    comparisons.append(region(options.pixels, min(options.repetitions, 3), options.device))
    Console(width=None if sys.stdout.isatty() else 120).print(table("explanations", comparisons))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(record | {"comparisons": [comparison.to_dict() for comparison in comparisons]}, options.out)
    return 0


def model_of(pixels: int, device: str, windows: dict[str, int] | None = None) -> tuple[ProtoModel, EvalTransform]:
    """A model whose weights are random: how fast it is, doesn't depend on them."""
    head = {"num_prototypes": int(SIZES["prototypes"])}
    name, classes = str(SIZES["backbone"]), int(SIZES["classes"])
    model = ProtoModel.create(name, classes, pretrained=False, windows=windows, **head).eval().to(device)
    preprocessing = type(model.backbone.preprocessing)(size=(pixels, pixels))
    return model, EvalTransform(preprocessing)


def explaining(
    batch: int, pixels: int, repetitions: int, device: str, goal: Goal, windows: dict[str, int] | None = None
) -> Comparison:
    """A batch, explained, beside the bare forward pass of its images."""
    model, transform = model_of(pixels, device, windows)
    names = [f"class {c}" for c in range(int(SIZES["classes"]))]
    images = torch.rand(batch, 3, pixels, pixels).to(device)
    views, files = [transform.view((600, 450))] * batch, [f"{i}.jpg" for i in range(batch)]

    @torch.no_grad()
    def forward() -> None:
        model.backbone(images)

    works = {
        "forward": forward,
        "explained": lambda: explain_batch(model, images, views, files, names),
    }
    sides = {side: timed(work, per=batch / 1000, clock=clock_of(device)[1]) for side, work in works.items()}
    setting = f"batch of {batch}, {pixels} pixels" + (
        f", {len(model.backbone.regions_of((pixels, pixels)))} windows" if windows else ""
    )
    found = paired(setting, "ms/image", sides, repetitions)
    return found.add("explained / forward", lambda took: took["explained"] / took["forward"], goal=goal)


def region(pixels: int, repetitions: int, device: str) -> Comparison:
    """The checked region of one prototype of one picture, 7 x 7 blocks."""
    model, transform = model_of(pixels, device)
    noise = np.random.default_rng(0).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    names = [f"class {c}" for c in range(int(SIZES["classes"]))]
    tensor, view = transform(picture).unsqueeze(0).to(device), transform.view(picture.size)
    match = explain_batch(model, tensor, [view], ["noise"], names)[0].classes[0].matches[0]
    side = timed(lambda: checked_regions(model, picture, transform, [match]), clock=clock_of(device)[1])
    return paired("checked region of one prototype", "s", {"region": side}, repetitions, warm_up=False)


if __name__ == "__main__":
    sys.exit(main())
