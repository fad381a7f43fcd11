"""What is compared, windows or cells or whole images: accuracy, diversity, localisation and faithfulness, over seeds.

    python benchmarks/evidence.py manifest.csv --seeds 0 1 2
    python benchmarks/evidence.py manifest.csv --seeds 0 --arms windows-112 windows-64-full

Trains the recipe of each arm with each seed, where the run isn't there yet, and measures it on the test split as
``protopush compare`` does. Results grow run by run in the JSON file; what is there isn't measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import save, spread

from protopush.cli import main as protopush
from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.evaluation.compare import compare
from protopush.evaluation.measure import measure
from protopush.runs.run import open_run, open_split

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_MASKS = ["--loss.off_mask", "0", "--push.min_mask_share", "0"]
ONE_PLACE = ["--model.top_patches", "1", "--train.ema", "null"]
TEN = ["--model.num_prototypes", "10", "--push.rows", "null"]
# The recipe of each arm, and what is changed in it.
ARMS: dict[str, tuple[str, list[str]]] = {
    "whole-image": ("ham10000-global", []),
    "last-map": ("ham10000-live", []),
    "stage": ("ham10000-live", ["--model.stage", "blocks.3"]),
    "windows": ("ham10000-windows", [*WITHOUT_MASKS, *TEN, *ONE_PLACE]),
    "windows-masks": ("ham10000-windows", [*TEN, *ONE_PLACE]),
}
MORE: dict[str, tuple[str, list[str]]] = {
    "stage-2": ("ham10000-live", ["--model.stage", "blocks.2"]),
    "stage-4": ("ham10000-live", ["--model.stage", "blocks.4"]),
    "windows-112": ("ham10000-live", ["--model.windows.size", "112"]),
    "windows-64-112": ("ham10000-live", ["--model.windows.size", "[64,112]"]),
    "windows-64-full": ("ham10000-live", ["--model.windows.size", "[64,full]"]),
    "windows-anchors": ("ham10000-windows", ["--loss.off_mask", "0", *TEN, *ONE_PLACE]),
    "windows-short": ("ham10000-windows", [*WITHOUT_MASKS, *ONE_PLACE]),
    "windows-masks-short": ("ham10000-windows", ONE_PLACE),
    "windows-masks-places": ("ham10000-windows", TEN),
    "windows-masks-short-places": ("ham10000-windows", []),
    "last-map-short": ("ham10000-live", ["--model.num_prototypes", "20", "--push.rows", "2"]),
}


def main(words: Sequence[str] | None = None) -> int:
    """Train and measure what the JSON file doesn't hold yet."""
    options = _options(words)
    logging.basicConfig(level=logging.WARNING)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.out.read_text()) if options.out.is_file() else {"rows": []}
    found["setup"] = {"manifest": Path(options.manifest).name, "faithfulness": options.faithfulness, "set": options.set}
    done = {(row["arm"], row["seed"]) for row in found["rows"]}
    try:
        for seed in options.seeds:
            for arm in options.arms:
                if (arm, seed) not in done:
                    found["rows"].append({"arm": arm, "seed": seed, "compared": measured(arm, seed, options)})
                    save(found, options.out)
    except InputError as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 2
    print(markdown(found["rows"]))
    return 0


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", help="CSV image,label,split,mask")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS | MORE, default=list(ARMS), help="what is trained")
    parser.add_argument("--faithfulness", type=int, default=96, help="images that faithfulness is measured on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="words for protopush train, such as --train.epochs=2")
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="where runs are, or are written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evidence.json")
    return parser.parse_args(words)


def measured(arm: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of ``protopush compare`` for one run, trained where it isn't there."""
    folder = options.runs / f"{arm}-{seed}"
    if not (folder / "config.json").is_file():
        recipe, changes = (ARMS | MORE)[arm]
        words = ["train", "--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *changes, *options.set]
        code = protopush([*words, "--data.path", options.manifest, "--train.seed", str(seed), "--out", str(folder)])
        if code:
            raise InputError(f"training {folder} ended with exit code {code}; see above")
    run = open_run(folder)
    data = DataConfig(**run.data | {"path": options.manifest})
    dataset, catalog = open_split(data, "test", run.class_names, run.transform, run.folder)
    known = {sample.name: sample for sample in catalog.samples}
    found = measure(
        run, dataset, "test", known, num_workers=options.workers, resamples=0, faithfulness=options.faithfulness
    )
    rows: list[dict[str, Any]] = compare([(run, found)])["rows"]
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: mean (deviation) over seeds, a column for each arm, a row for each metric that any run has."""
    arms = [arm for arm in ARMS | MORE if any(row["arm"] == arm for row in rows)]
    lines = ["| | better | " + " | ".join(arms) + " |", "| --- | --- |" + " --- |" * len(arms)]
    metrics = {told["metric"]: told for row in rows for told in row["compared"]}
    for group in dict.fromkeys(told["group"] for told in metrics.values()):
        lines.append(f"| **{group}** | |" + " |" * len(arms))
        for metric, told in metrics.items():
            if told["group"] == group:
                cells = [_cell([_value(row, metric) for row in rows if row["arm"] == arm]) for arm in arms]
                lines.append(f"| {metric.strip()} | {told['better']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _value(row: dict[str, Any], metric: str) -> float | None:
    return next((told["values"][0] for told in row["compared"] if told["metric"] == metric), None)


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean, deviation = spread(known)
    return f"{mean:.3f}" + (f" ({deviation:.3f})" if len(known) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
