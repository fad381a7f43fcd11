"""Receptive fields of common backbones: which pixels can change the middle cell of each stage, measured.

    python benchmarks/receptive_fields.py

Weights are random, as in every such measurement (``Backbone.measure``): what a cell can depend on is a matter of
layers, not of weights. Results grow row by row in the JSON file; what is there isn't measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from measuring import save

from protopush import create_backbone

PIXELS = 224
# name -> its stages, as model.stage takes them; None: the whole model
STAGES: dict[str, Sequence[int | str | None]] = {
    "tf_efficientnet_lite0": (0, 1, 2, "blocks.3", 3, "blocks.5", 4, None),
    "efficientnet_b0": (0, 1, 2, 3, 4, None),
    "mobilenetv3_large_100": (0, 1, 2, "blocks.3", 3, 4, None),
    "regnety_008": (0, 1, 2, 3, 4),
    "resnet18": (0, 1, 2, 3, 4),
    "resnet50": (0, 1, 2, 3, 4),
    "densenet121": (0, 1, 2, 3, 4),
    "convnext_atto": (0, 1, 2, 3),
    "swin_tiny_patch4_window7_224": (0, 1, 2, 3),
    "vit_tiny_patch16_224": tuple(range(12)),
}


def main(words: Sequence[str] | None = None) -> int:
    """Measure what the JSON file doesn't hold yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=list(STAGES), default=list(STAGES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "receptive_fields.json")
    options = parser.parse_args(words)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"pixels": PIXELS, "rows": []}
    done = {(row["backbone"], row["stage"]) for row in found["rows"]}
    for name in options.backbones:
        for stage in STAGES[name]:
            if (name, stage) not in done:
                found["rows"].append(measured(name, stage))
                save(found, options.out)
    print(markdown(found["rows"]))
    return 0


def measured(name: str, stage: int | str | None) -> dict[str, Any]:
    """What the middle cell of a stage sees, (x0, y0, x1, y1) in pixels of the image."""
    torch.manual_seed(0)
    given = {} if stage is None else {"stage": stage}
    backbone = create_backbone(name, pretrained=False, size=(PIXELS, PIXELS), **given).measure()
    rows, columns = backbone.regions.raster
    sees = backbone.regions.sees[rows // 2 * columns + columns // 2]
    return {
        "backbone": name, "stage": stage, "channels": backbone.channels, "cells": [rows, columns], "sees": list(sees)
    }  # fmt: skip


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table; stages of a backbone that are alike share a line."""
    lines = ["| backbone | `model.stage` | channels | cells | the middle cell sees |", "|" + " --- |" * 5]
    for name in STAGES:
        own = [row for row in rows if row["backbone"] == name]
        own.sort(key=lambda row: STAGES[name].index(row["stage"]))
        for (channels, cells, sees), some in groupby(own, key=lambda row: (row["channels"], row["cells"], row["sees"])):
            stages = ["whole model" if row["stage"] is None else str(row["stage"]) for row in some]
            shown = stages[0] if len(stages) == 1 else f"{stages[0]} to {stages[-1]}"
            lines.append(f"| {name} | {shown} | {channels} | {cells[0]} x {cells[1]} | {_pixels(sees)} |")
    return "\n".join(lines)


def _pixels(sees: Sequence[float]) -> str:
    x0, y0, x1, y1 = map(int, sees)
    return "all" if (x1 - x0, y1 - y0) == (PIXELS, PIXELS) else f"{x1 - x0} x {y1 - y0} px"


if __name__ == "__main__":
    sys.exit(main())
