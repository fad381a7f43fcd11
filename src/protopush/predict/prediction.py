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
from protopush.data.table import cell_text, spreadsheet_cell
from protopush.distributed import broadcast_from_rank_zero, raise_on_all_ranks, rank_and_size
from protopush.errors import InputError, listing
from protopush.explain.figure_style import percent
from protopush.models.model_folder import Run
from protopush.predict.inputs import DIGITS, Outputs, list_inputs, own_share, run_over
from protopush.predict.resumable_csv import ResumableCsv, alone
from protopush.predict.threshold import Threshold, calibrate
from protopush.runs.progress import bar, console

logger = logging.getLogger("protopush.predict")

SHARE = 0.05  # of validation images that may be flagged as like nothing in training
QUIET = 30.0  # seconds between two lines where there is no terminal
NOT_FINITE = "the model's logits are not finite"


def predict(
    run: Run, paths: Sequence[str], out: str | Path, top: int = 3, threshold: float | None = None, share: float = SHARE,
    data: DataConfig | None = None, device: torch.device | str = "cpu", num_workers: int = 0, overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a CSV with a row for each image: what the run predicts, and the training patches that are most like it.

    Called again with the same arguments after it was cut off, at any moment, it goes on where it stopped and ends
    with the same bytes. Under ``torch.distributed`` every process calls it, and each has a share of the images; the
    table is that of one process.

    The other arguments are those of :meth:`protopush.Run.predict`.

    Args:
        run: its model is on ``device``.
        top: prototypes of the predicted class that are named, those that contribute most.
        data: where the run's images are, if not where they were.

    Returns:
        Counts, and what is known of the threshold (:func:`summary_of`).

    Raises:
        InputError: bad input, in one line, before any work; or a full disk.
    """
    _check(top, threshold, share, num_workers)
    out = Path(out)
    if any(Path(path).resolve() == out.resolve() for path in paths):
        raise InputError(f"--out {out} is one of the files to read; choose another --out")
    inputs = broadcast_from_rank_zero(lambda: list_inputs(paths))
    columns = Columns(run, top, inputs.labels is not None)
    data = data or DataConfig(**run.data)
    size = inference_batch_size(torch.device(device))

    def belongs() -> dict[str, str]:
        """What decides every byte of the table, in words that a message can show."""
        names, labels = inputs.names.sha256(), inputs.labels.sha256() if inputs.labels is not None else "none"
        limit = f"{share} of validation images of {data.path}" if threshold is None else str(threshold)
        return {
            "weights": read_json(run.folder / "config.json")["weights_sha256"][:16],
            "prototypes": sha256_of(run.folder / "prototypes.json")[:16],
            "images": f"{len(inputs.names)}, SHA-256 of their names {names[:12]}, of their labels {labels[:12]}",
            "options": f"--top {columns.top}, threshold {limit}, at most {data.max_megapixels:g} megapixels",
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
            limit = calibrate(run, data, share, device, num_workers)
            if limit.value is None:
                logger.warning("no threshold for nothing_similar, which stays empty: %s", limit.problem)
        if kept is None:
            broadcast_from_rank_zero(lambda: table.start(limit.to_dict()))
        count, start = sum(len(table.rows_of(batch)) for batch in missing), time.perf_counter()
        before = len(inputs.names) - count
        if before > 0 and count:
            logger.info("Going on: %d of %d images are there already", before, len(inputs.names))
        rank, mine = rank_and_size()[0], own_share(missing)
        batches, number = [table.rows_of(batch) for batch in mine], iter(mine)

        def take(indices: range, problems: Sequence[str], outputs: Outputs) -> None:
            names = [inputs.names[i] for i in indices]
            labels = None if inputs.labels is None else [inputs.labels[i] for i in indices]
            table.append(rank, next(number), columns.rows(outputs, names, labels, problems, limit.value))
            advance(len(indices))

        with _progress(sum(map(len, batches)), rank) as advance:
            raise_on_all_ranks(lambda: run_over(run, inputs.names, batches, columns.top, device, num_workers, take))
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


class Columns:
    """How the table of a run is laid out, with ``top`` prototypes for each image, or as many as a class can have."""

    def __init__(self, run: Run, top: int, labelled: bool) -> None:
        manager = run.head.proto_manager
        self.class_names, self.anchor = run.class_names, manager.anchor
        self.top, self.labelled = min(top, manager.max_prototypes), labelled

    @property
    def header(self) -> list[str]:
        """The columns' names."""
        top = [f"top{n + 1}_{what}" for n in range(self.top) for what in ("prototype", "similarity", "file", "cell")]
        probabilities = ["probability", *(f"probability_{name}" for name in self.class_names)]
        first = ["file", "label", "predicted"] if self.labelled else ["file", "predicted"]
        return [*first, *probabilities, *top, "best_similarity", "nothing_similar", "error"]

    def rows(
        self, outputs: Outputs, names: Sequence[str], labels: Sequence[str] | None, problems: Sequence[str],
        threshold: float | None,
    ) -> Iterator[list[str]]:  # fmt: skip
        """The rows of a batch of B images; no problem is "".

        An image none of whose similarities reaches the threshold has ``nothing_similar`` 1, else 0; None: empty.
        """
        empty = [""] * (len(self.header) - (3 if self.labelled else 2))
        for i, name in enumerate(names):
            first = [shown(name)] if labels is None else [shown(name), labels[i]]
            problem = problems[i] or ("" if outputs.finite[i] else NOT_FINITE)
            cells = [*map(spreadsheet_cell, first)]
            yield [*cells, *empty, shown(problem)] if problem else [*cells, *self._found(outputs, i, threshold), ""]

    def _found(self, outputs: Outputs, i: int, threshold: float | None) -> Iterator[str]:
        predicted, best = int(outputs.predicted[i]), float(outputs.best[i])
        yield spreadsheet_cell(self.class_names[predicted])
        yield _number(outputs.probabilities[i, predicted])
        yield from map(_number, outputs.probabilities[i])
        for slot, similarity in zip(outputs.slots[i].tolist(), outputs.similarities[i].tolist(), strict=True):
            if slot < 0:
                yield from ("", "", "", "")
                continue
            anchor = self.anchor(predicted, slot)
            yield spreadsheet_cell(f"{self.class_names[predicted]}:{slot}")
            yield _number(similarity)
            yield "" if anchor is None else spreadsheet_cell(shown(str(anchor.file or anchor.sample_id)))
            yield "" if anchor is None else str(anchor.cell)
        yield _number(best)
        yield "" if threshold is None else str(int(best < threshold))


def shown(name: str) -> str:
    r"""A file name as the table has it: as it is, but a byte that is no UTF-8 is written ``\xff``.

    Example:
        >>> shown(b"caf\xe9 1.jpg".decode("utf-8", "surrogateescape"))
        'caf\\xe9 1.jpg'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _number(value: float) -> str:
    return f"{value:.{DIGITS}f}"


def summary_of(out: Path, class_names: list[str], threshold: Threshold) -> dict[str, Any]:
    """Counts of a table, as plain values for JSON, however many times it was cut off while it grew."""
    predicted, problems, flagged = Counter[str](), Counter[str](), 0
    with out.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["error"]:
                problems[row["error"]] += 1
            else:
                predicted[cell_text(row["predicted"])] += 1
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
    limit = Threshold.from_dict(summary["threshold"])
    if limit.value is None:
        lines.append(f"nothing_similar is empty: {limit.problem}; give --threshold NUMBER, or --data.path")
    else:
        set_on = f"; so set that at most {percent(limit.share or 0.0)} of {limit.set_on} are flagged "
        set_on += f"({limit.set_flagged} of {limit.set_images})"
        if limit.source == "given":
            origin = " (the threshold given)"
        elif limit.false_alarms is None:
            origin = f"{set_on}; no other images to measure false alarms on"
        else:
            alarms = f"{percent(limit.false_alarms)} ({limit.measured_flagged} of {limit.measured_images})"
            origin = f"; false alarms on {limit.measured_on}, which it was not set on: {alarms}{set_on}"
        words = f"{summary['nothing_similar']} images, with no similarity of {limit.value:.6f} or more{origin}"
        lines.append(f"Nothing similar in training: {words}")
    if summary.get("resumed_from"):
        lines.append(f"{summary['resumed_from']} of the images were there already")
    return "\n".join(lines)
