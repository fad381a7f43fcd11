"""Predictions for any number of images, in memory that doesn't grow with their results."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from protopush import __version__
from protopush.data.features import inference_batch_size
from protopush.data.files import read_json
from protopush.data.images import sha256_of
from protopush.data.manifest import DataConfig
from protopush.distributed import broadcast_from_rank_zero, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError
from protopush.models.model_folder import Run
from protopush.predict.inputs import Batches, Inputs, Pictures, list_inputs, read, readers
from protopush.predict.prediction_rows import DIGITS, Columns, look
from protopush.predict.resumable_csv import Growing, Span, alone
from protopush.predict.summary import summary_of
from protopush.predict.threshold import Threshold, calibrate
from protopush.preserve_state import preserve_state
from protopush.runs.progress import bar, console

logger = logging.getLogger("protopush.predict")

SHARE = 0.05  # of validation images that may be flagged as like nothing in training
QUIET = 30.0  # seconds between two lines where there is no terminal


def predict(
    run: Run,
    paths: Sequence[str],
    out: str | Path,
    top: int = 3,
    threshold: float | None = None,
    share: float = SHARE,
    data: DataConfig | None = None,
    device: torch.device | str = "cpu",
    num_workers: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a CSV with a row for each image: what the run predicts, and which training patches it looks like.

    Called again with the same arguments after it was cut off, at whatever moment, it goes on where it stopped and ends
    with the same bytes. Under ``torch.distributed`` every process calls it, and each has a share of the images; the
    table is that of one process.

    Args:
        run: as :func:`protopush.runs.run.open_run` opens it, its model on ``device``.
        paths: folders, manifests and images, as for :func:`protopush.predict.inputs.list_inputs`.
        out: the CSV file.
        top: prototypes of the predicted class that are told, those that contribute most.
        threshold: the similarity below which nothing in training is like an image; None: set on validation images.
        share: of validation images that may be below it.
        data: where the run's images are, if not where they were.
        device: where the model is.
        num_workers: processes that read images.
        overwrite: begin anew, whatever is there.

    Returns:
        Counts, and what is known of the threshold (:func:`protopush.predict.summary.summary_of`).

    Raises:
        InputError: bad input, in one line, before any work; or a full disk.
    """
    _check(top, threshold, share, num_workers)
    out = Path(out)
    inputs = broadcast_from_rank_zero(lambda: _inputs(paths, out))
    columns = Columns.of(run, top, inputs.labels is not None)
    size = inference_batch_size(torch.device(device))
    belongs = broadcast_from_rank_zero(lambda: _belongs(run, inputs, columns, threshold, share, data, size, device))
    growing = Growing(out, columns.header, inputs.names, size, belongs)
    with ExitStack() as stack:
        broadcast_from_rank_zero(lambda: stack.enter_context(alone(out)))
        begun = broadcast_from_rank_zero(lambda: growing.open(overwrite))
        if begun is None:
            limit = _threshold(run, threshold, share, data, device, num_workers)
            broadcast_from_rank_zero(lambda: growing.begin(limit.to_dict()))
        else:
            limit = Threshold.from_dict(begun.kept)
        told = {"resumed_from": len(inputs.names), "seconds": 0.0, "images_per_second": None}
        if begun is None or not begun.whole:
            told = _grow(run, inputs, columns, growing, limit, device, num_workers)
            broadcast_from_rank_zero(lambda: growing.finish(limit.to_dict()))
        return broadcast_from_rank_zero(lambda: summary_of(out, run.class_names, limit)) | told


def _check(top: int, threshold: float | None, share: float, num_workers: int) -> None:
    if top < 0:
        raise InputError(f"--top {top}; expected 0 or more prototypes")
    if threshold is not None and not math.isfinite(threshold):
        raise InputError(f"--threshold {threshold}; expected a cosine, such as 0.6")
    if not 0 <= share < 1:
        raise InputError(f"--share {share}; expected 0 or more, and less than 1")
    if num_workers < 0:
        raise InputError(f"--data.num_workers {num_workers}; expected 0 or more")


def _inputs(paths: Sequence[str], out: Path) -> Inputs:
    if any(Path(path).resolve() == out.resolve() for path in paths):
        raise InputError(f"--out {out} is one of the files to read; choose another --out")
    return list_inputs(paths)


def _belongs(
    run: Run,
    inputs: Inputs,
    columns: Columns,
    threshold: float | None,
    share: float,
    data: DataConfig | None,
    size: int,
    device: torch.device | str,
) -> dict[str, str]:
    """What decides every byte of the table, in words that a message can show."""
    labels = inputs.labels.sha256()[:12] if inputs.labels is not None else "none"
    path = (data.path if data is not None else run.data.get("path")) or ""
    return {
        "weights": read_json(run.folder / "config.json")["weights_sha256"][:16],
        "prototypes": sha256_of(run.folder / "prototypes.json")[:16],
        "images": f"{len(inputs.names)}, SHA-256 of their names {inputs.names.sha256()[:12]}, of their labels {labels}",
        "options": f"--top {columns.top}, threshold {_in_words(threshold, share, path)}",
        "surroundings": f"protopush {__version__}, {torch.device(device).type}, batches of {size}",
    }


def _in_words(threshold: float | None, share: float, path: str) -> str:
    return f"{share} of validation images of {path}" if threshold is None else str(threshold)


def _threshold(
    run: Run,
    threshold: float | None,
    share: float,
    data: DataConfig | None,
    device: torch.device | str,
    num_workers: int,
) -> Threshold:
    if threshold is not None:
        return Threshold(round(threshold, DIGITS), "given")
    found = calibrate(run, data or DataConfig(**run.data), share, device, num_workers)
    if found.value is None:
        logger.warning("no threshold for nothing_similar, which stays empty: %s", found.problem)
    return found


def _grow(
    run: Run,
    inputs: Inputs,
    columns: Columns,
    growing: Growing,
    limit: Threshold,
    device: torch.device | str,
    num_workers: int,
) -> dict[str, Any]:
    """Write what is missing, each process its share; what that took."""
    rank, ranks = rank_and_size()
    shares = broadcast_from_rank_zero(lambda: growing.plan(ranks))
    counts = [sum(_images(span, growing) for span in share) for share in shares]
    before, began = len(inputs.names) - sum(counts), time.perf_counter()
    if before:
        logger.info("Going on: %d of %d images are there already", before, len(inputs.names))

    def here() -> None:
        pictures = Pictures(inputs.names, run.transform)
        with readers(num_workers), preserve_state(run.model), _progress(counts[rank], rank) as advance:
            for span in shares[rank]:
                batches = Batches(span.first, span.last, growing.size, len(inputs.names))
                with growing.appending(span) as append:
                    read_here = zip(batches, read(pictures, batches, num_workers), strict=True)
                    for indices, (images, problems) in read_here:
                        outputs = look(run.model, images.to(device), columns.top)
                        names = [inputs.names[i] for i in indices]
                        labels = None if inputs.labels is None else [inputs.labels[i] for i in indices]
                        append(columns.rows(outputs, names, labels, problems, limit.value))
                        advance(len(indices))

    raise_on_all_ranks(here)
    seconds = time.perf_counter() - began
    return {"resumed_from": before, "seconds": seconds, "images_per_second": sum(counts) / seconds}


def _images(span: Span, growing: Growing) -> int:
    return min(span.last * growing.size, len(growing.names)) - span.first * growing.size


@contextmanager
def _progress(total: int, rank: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, now and then a line elsewhere; of several processes, the first tells its own share."""
    began, said, done = time.monotonic(), time.monotonic(), 0

    def step(images: int) -> None:
        nonlocal said, done
        done += images
        advance(images)
        if rank == 0 and not console.is_terminal and time.monotonic() - said >= QUIET:
            said = time.monotonic()
            logger.info("Predicted %d of %d images, %.1f a second", done, total, done / (said - began))

    with bar("Predicting", total) if rank == 0 else _nothing() as advance:
        yield step


@contextmanager
def _nothing() -> Iterator[Callable[[int], None]]:
    yield lambda _: None
