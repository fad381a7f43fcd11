"""What predicting costs: images a second of ``protopush predict`` against the bare forward pass of its backbone.

    python benchmarks/predict_speed.py RUN FOLDER_OR_MANIFEST --images 500 --repetitions 3

Both sides read the same files through the same DataLoader, with the same workers and the same batches, in turn in one
process. The bare side decodes, transforms and runs the backbone, and drops what comes out; the other side does all that
``predict`` does: it lists the files, runs backbone and head, finds the prototypes, writes the rows, and reads them
again for the summary. Setting the threshold on validation images, which is done once and kept, is on neither side.
On a machine that others use as well, the processors' time (of the process and its readers) tells more than the clock.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import Comparison, Goal, Side, paired, save, timed
from rich.console import Console
from showing import Parser, count, surroundings, table
from torch.utils.data import DataLoader

from protopush.data.features import inference_batch_size
from protopush.errors import InputError
from protopush.models.model_folder import Run
from protopush.predict.inputs import Pictures, list_inputs
from protopush.predict.prediction import predict
from protopush.preserve_state import preserve_state
from protopush.runs.run import make_fabric, open_run

GOAL = Goal(0.9, at_least=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("images_of", metavar="FOLDER_OR_MANIFEST", help="images")
    parser.add_argument("--images", type=count, default=500, metavar="N", help="the first so many (default: 500)")
    parser.add_argument("--repetitions", type=count, default=3, metavar="N", help="(default: 3)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes that read images (default: 2)")
    parser.add_argument("--device", default="auto", help="(default: auto)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "predict_speed.json")
    options = parser.parse_args(argv)
    try:
        run, device = open_run(options.run), make_fabric(options.device).device
        names = list_inputs([options.images_of]).names
    except InputError as error:
        parser.error(str(error))
    run.model.to(device)
    files = [names[i] for i in range(min(options.images, len(names)))]
    found = comparisons(run, files, device, options.workers, options.repetitions)
    record = surroundings(str(device)) | {"images": len(files), "workers": options.workers}
    Console(width=None if sys.stdout.isatty() else 120).print(table("predictions", found))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(record | {"comparisons": [comparison.to_dict() for comparison in found]}, options.out)
    return 0


def comparisons(
    run: Run, files: Sequence[str], device: torch.device, workers: int, repetitions: int
) -> list[Comparison]:
    """Both sides, over all files, by the clock and by the processors' time."""
    size = inference_batch_size(device)

    def forward() -> None:
        pictures = Pictures(list_inputs(files).names, run.transform)
        with preserve_state(run.model):
            for images, _ in DataLoader(pictures, size, num_workers=workers):
                run.model.backbone(images.to(device)).patches.sum().item()  # .item() waits for a GPU

    def predictions() -> None:
        with tempfile.TemporaryDirectory() as folder:
            predict(run, files, Path(folder, "p.csv"), threshold=0.5, device=device, num_workers=workers)

    with preserve_state(run.model):  # what a first batch costs more, is neither side's
        run.model.backbone(torch.zeros(size, 3, *run.transform.preprocessing.size, device=device))
    busy: dict[str, list[float]] = {"bare forward": [], "predict": []}
    sides = {name: _side(work, len(files), busy[name]) for name, work in zip(busy, (forward, predictions), strict=True)}
    name = f"{getattr(run.model.backbone, 'name', 'backbone')}, {len(files)} images"
    clock = paired(f"{name}, clock", "ms/image", sides, repetitions, warm_up=False)
    clock.add("images a second, predict", lambda took: 1000 / took["predict"], unit="/s")
    found = [clock, Comparison(f"{name}, processors", "ms/image", busy)]
    return [
        each.add("predict / bare forward", lambda took: took["bare forward"] / took["predict"], goal=GOAL)
        for each in found
    ]


def _side(work: Callable[[], object], images: int, busy: list[float]) -> Side:
    """The milliseconds that an image takes; those that processors were busy with it go into ``busy``."""
    side = timed(work, per=images / 1000)

    def both() -> float:
        before = sum(os.times()[:4])
        took = side()
        busy.append((sum(os.times()[:4]) - before) / images * 1000)
        return took

    return both


if __name__ == "__main__":
    sys.exit(main())
