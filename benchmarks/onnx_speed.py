"""A run exported to ONNX, beside PyTorch on the CPU: whether it says the same of real images, and how fast it is.

    python benchmarks/onnx_speed.py RUN

Images are those of the run's test split. Both sides get the same batches in memory, in turn, and the same number of
threads; PyTorch computes the whole :class:`HeadOutput`, onnxruntime the outputs of the file.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from measuring import Comparison, Goal, Result, paired, save, timed
from rich.console import Console
from showing import Parser, count, surroundings, table
from torch import Tensor

from protopush.data.manifest import DataConfig
from protopush.errors import InputError
from protopush.models.model_folder import Run
from protopush.runs.onnx_export import export_onnx
from protopush.runs.run import open_run, open_split

GOAL = Goal(1e-4)
BATCHES = (1, 32)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save."""
    parser = Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder whose images are at hand")
    parser.add_argument("--images", type=count, default=100, metavar="N", help="compared one by one (default: 100)")
    parser.add_argument("--repetitions", type=count, default=11, metavar="N", help="(default: 11)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "onnx_speed.json")
    options = parser.parse_args(argv)
    try:
        run = open_run(options.run)
        images = test_images(run, max(options.images, *BATCHES))
    except InputError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as folder:
        done = export_onnx(run, Path(folder) / "model.onnx")
        session = session_of(done.file)
    record = surroundings() | {
        "onnxruntime": onnxruntime.__version__,
        "backbone": run.model.backbone.name,
        "pixels": list(run.transform.preprocessing.size),
        "megabytes": done.megabytes,
    }
    comparisons = [parity(run, session, images[: options.images])]
    comparisons += [speed(run, session, images[:batch], options.repetitions) for batch in BATCHES]
    Console(width=None if sys.stdout.isatty() else 120).print(table("export to ONNX", comparisons))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save(record | {"comparisons": [comparison.to_dict() for comparison in comparisons]}, options.out)
    return 0


def test_images(run: Run, number: int) -> Tensor:
    """The first images of the run's test split, as the model sees them; where they are too few, several times."""
    dataset, _ = open_split(DataConfig(**run.data), "test", run.class_names, run.transform, run.folder)
    seen = [dataset[index][0] for index in range(min(number, len(dataset)))]
    return torch.stack([seen[index % len(seen)] for index in range(number)])


def session_of(file: Path) -> Any:
    """The file in onnxruntime, with as many threads as PyTorch has."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def parity(run: Run, session: Any, images: Tensor) -> Comparison:
    """How far the outputs are apart, the largest over classes and prototypes, for each image."""
    apart: dict[str, list[float]] = {"logits": [], "similarities": []}
    cells = classes = 0
    for image in images.split(1):
        logits, similarities, best = map(torch.from_numpy, session.run(None, {"images": image.numpy()}))
        wanted = run.model(image)
        apart["logits"].append(float((logits - wanted.logits).abs().max()))
        apart["similarities"].append(float((similarities - wanted.similarities).abs().max()))
        cells += int((best != wanted.cells).sum())
        classes += int(logits.argmax() != wanted.logits.argmax())
    remarks = {
        "other best cells": f"{cells} of {wanted.cells.numel() * len(images)}",
        "other classes": f"{classes} of {len(images)}",
    }
    found = Comparison(f"difference, {len(images)} real images", "", apart, remarks=remarks)
    found.results.extend(Result(f"largest, {name}", "", [max(values)], GOAL) for name, values in apart.items())
    return found


def speed(run: Run, session: Any, images: Tensor, repetitions: int) -> Comparison:
    """The same batch by both."""
    batch, array = len(images), images.numpy()
    rounds = max(1, 16 // batch)  # one image alone takes too short a time

    @torch.inference_mode()
    def ours() -> None:
        for _ in range(rounds):
            run.model(images)

    def theirs() -> None:
        for _ in range(rounds):
            session.run(None, {"images": array})

    per = batch * rounds / 1000
    sides = {"PyTorch": timed(ours, per=per), "onnxruntime": timed(theirs, per=per)}
    found = paired(f"batch of {batch}", "ms/image", sides, repetitions)
    return found.add("PyTorch / onnxruntime", lambda took: took["PyTorch"] / took["onnxruntime"])


if __name__ == "__main__":
    sys.exit(main())
