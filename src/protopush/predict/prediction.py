"""Predictions for any number of images, in memory that doesn't grow with their results, and their summary."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections import Counter
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
from protopush.errors import InputError, listing
from protopush.explain.figure_style import percent
from protopush.models.model_folder import Run
from protopush.predict.inputs import Inputs, list_inputs
from protopush.predict.prediction_rows import DIGITS, Columns, Outputs, run_over
from protopush.predict.resumable_csv import ResumableCsv, alone
from protopush.predict.threshold import Threshold, calibrate
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
    """Write a CSV with a row for each image: what the run predicts, and the training patches that are most like it.

    Called again with the same arguments after it was cut off, at any moment, it goes on where it stopped and ends
    with the same bytes. Under ``torch.distributed`` every process calls it, and each has a share of the images; the
    table is that of one process.

    Args:
        run: as :func:`protopush.runs.run.open_run` opens it, its model on ``device``.
        paths: folders, manifests and images, as for :func:`protopush.predict.inputs.list_inputs`.
        out: the CSV file.
        top: prototypes of the predicted class that are named, those that contribute most.
        threshold: the similarity below which nothing in training is like an image; None: set on validation images.
        share: of validation images that may be below it.
        data: where the run's images are, if not where they were.
        device: where the model is.
        num_workers: processes that read images.
        overwrite: start again, whatever is there.

    Returns:
        Counts, and what is known of the threshold (:func:`summary_of`).

    Raises:
        InputError: bad input, in one line, before any work; or a full disk.
    """
    _check(top, threshold, share, num_workers)
    out = Path(out)
    inputs = broadcast_from_rank_zero(lambda: _inputs(paths, out))
    columns = Columns(run, top, inputs.labels is not None)
    path = (data.path if data is not None else run.data.get("path")) or ""
    size = inference_batch_size(torch.device(device))

    def belongs() -> dict[str, str]:
        """What decides every byte of the table, in words that a message can show."""
        names, labels = inputs.names.sha256(), inputs.labels.sha256() if inputs.labels is not None else "none"
        limit = f"{share} of validation images of {path}" if threshold is None else str(threshold)
        return {
            "weights": read_json(run.folder / "config.json")["weights_sha256"][:16],
            "prototypes": sha256_of(run.folder / "prototypes.json")[:16],
            "images": f"{len(inputs.names)}, SHA-256 of their names {names[:12]}, of their labels {labels[:12]}",
            "options": f"--top {columns.top}, threshold {limit}",
            "surroundings": f"protopush {__version__}, {torch.device(device).type}, batches of {size}",
        }

    table = ResumableCsv(out, columns.header, len(inputs.names), size, broadcast_from_rank_zero(belongs))
    with ExitStack() as stack:
        broadcast_from_rank_zero(lambda: stack.enter_context(alone(out)))
        kept, missing = broadcast_from_rank_zero(lambda: table.open(overwrite))
        if kept is not None:
            limit = Threshold.from_dict(kept)
        elif threshold is not None:
            limit = Threshold(round(threshold, DIGITS), "given")
        else:
            limit = calibrate(run, data or DataConfig(**run.data), share, device, num_workers)
            if limit.value is None:
                logger.warning("no threshold for nothing_similar, which stays empty: %s", limit.problem)
        if kept is None:
            broadcast_from_rank_zero(lambda: table.start(limit.to_dict()))
        count, start = sum(len(table.rows_of(batch)) for batch in missing), time.perf_counter()
        before = len(inputs.names) - count
        if before > 0 and count:
            logger.info("Going on: %d of %d images are there already", before, len(inputs.names))
        raise_on_all_ranks(lambda: _write(run, inputs, columns, table, missing, limit.value, device, num_workers))
        seconds = time.perf_counter() - start if count else 0.0
        broadcast_from_rank_zero(table.finish)
        summary = broadcast_from_rank_zero(lambda: summary_of(out, run.class_names, limit))
    speed = count / seconds if count else None
    return summary | {"resumed_from": before, "seconds": seconds, "images_per_second": speed}


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


def _write(
    run: Run,
    inputs: Inputs,
    columns: Columns,
    table: ResumableCsv,
    missing: Sequence[int],
    threshold: float | None,
    device: torch.device | str,
    num_workers: int,
) -> None:
    """Write this process's consecutive share of the batches that are missing."""
    rank, ranks = rank_and_size()
    mine = missing[len(missing) * rank // ranks : len(missing) * (rank + 1) // ranks]
    batches, number = [table.rows_of(batch) for batch in mine], iter(mine)

    def take(indices: range, problems: Sequence[str], outputs: Outputs) -> None:
        names = [inputs.names[i] for i in indices]
        labels = None if inputs.labels is None else [inputs.labels[i] for i in indices]
        table.append(rank, next(number), columns.rows(outputs, names, labels, problems, threshold))
        advance(len(indices))

    with _progress(sum(map(len, batches)), rank) as advance:
        run_over(run, inputs.names, batches, columns.top, device, num_workers, take)


@contextmanager
def _progress(total: int, rank: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, now and then a line elsewhere; of several processes, the first shows its own share."""
    if rank > 0:
        yield lambda _: None
        return
    start, shown, done = time.monotonic(), time.monotonic(), 0

    def step(images: int) -> None:
        nonlocal shown, done
        done += images
        advance(images)
        if not console.is_terminal and time.monotonic() - shown >= QUIET:
            shown = time.monotonic()
            logger.info("Predicted %d of %d images, %.1f a second", done, total, done / (shown - start))

    with bar("Predicting", total) as advance:
        yield step


def summary_of(out: Path, class_names: list[str], threshold: Threshold) -> dict[str, Any]:
    """Counts of a table, as plain values for JSON, however many times it was cut off while it grew."""
    predicted, problems, flagged = Counter[str](), Counter[str](), 0
    with out.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["error"]:
                problems[row["error"]] += 1
            else:
                predicted[row["predicted"]] += 1
                flagged += row["nothing_similar"] == "1"
    return {
        "out": str(out),
        "images": predicted.total() + problems.total(),
        "unreadable": problems.total(),
        "problems": dict(problems.most_common(20)),
        "predicted": {name: predicted[name] for name in class_names},
        "nothing_similar": None if threshold.value is None else flagged,
        "threshold": threshold.to_dict(),
    }


def in_words(summary: dict[str, Any]) -> str:
    """The same for people."""
    counts = listing([f"{name} {count}" for name, count in summary["predicted"].items()], 20)
    lines = [f"{summary['out']}: {summary['images']} images ({counts})"]
    if summary["unreadable"]:
        problems = listing([f"{count} {problem}" for problem, count in summary["problems"].items()], 5)
        lines.append(f"{summary['unreadable']} without a prediction, see column error: {problems}")
    threshold = Threshold.from_dict(summary["threshold"])
    if threshold.value is None:
        lines.append(f"nothing_similar is empty: {threshold.problem}; give --threshold NUMBER, or --data.path")
    else:
        lines.append(
            f"Nothing similar in training: {summary['nothing_similar']} images, with no similarity of "
            f"{threshold.value:.6f} or more{_provenance(threshold)}"
        )
    if summary.get("resumed_from"):
        lines.append(f"{summary['resumed_from']} of the images were there already")
    return "\n".join(lines)


def _provenance(threshold: Threshold) -> str:
    if threshold.source == "given":
        return " (the threshold given)"
    set_on = (
        f"; so set that at most {percent(threshold.share or 0.0)} of {threshold.set_on} are flagged "
        f"({threshold.set_flagged} of {threshold.set_images})"
    )
    if threshold.false_alarms is None:
        return f"{set_on}; no other images to measure false alarms on"
    return (
        f"; false alarms on {threshold.measured_on}, which it was not set on: {percent(threshold.false_alarms)} "
        f"({threshold.measured_flagged} of {threshold.measured_images}){set_on}"
    )
