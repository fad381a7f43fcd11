"""Rows of a table of predictions: the outputs of a batch, the columns, and the row of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from protopush.errors import InputError, first_line
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOutput
from protopush.nn.outputs import iterate_outputs
from protopush.predict.inputs import Pictures, Strings

DIGITS = 6  # of numbers in the table; what is compared is what is written

Floats = NDArray[np.float64]
Whole = NDArray[np.intp]


class Outputs(NamedTuple):
    """B images, C classes; similarities are rounded to ``DIGITS``.

    Attributes:
        probabilities: (B, C), softmax of the logits in float64.
        predicted: (B,), the most probable class; of equals the first.
        slots: (B, N), prototypes of that class by what they contribute to its logit, -1 where it has fewer than N.
        similarities: (B, N), of these prototypes.
        best: (B,), the largest similarity of any prototype in use, of whatever class.
        finite: (B,), whether the logits are numbers at all.
    """

    probabilities: Floats
    predicted: Whole
    slots: Whole
    similarities: Floats
    best: Floats
    finite: NDArray[np.bool_]


def run_model(model: ProtoModel, images: Tensor, top: int) -> Outputs:
    """Run a model, in eval mode and without gradients, over images (B, 3, H, W) that are on its device.

    Args:
        model: its head is a :class:`HeadOptimal`.
        images: as the model's transform makes them.
        top: N.
    """
    head = model.head
    output: HeadOutput = model(images)
    logits = output.logits.double().cpu() if output.logits.device.type != "mps" else output.logits.cpu().double()
    used = head.proto_manager.mask().cpu().numpy()
    similarities = np.round(_array(output.similarities), DIGITS)
    predicted = logits.argmax(dim=1).numpy()
    rows = np.arange(len(predicted))
    contributions = np.where(used, _array(output.contributions), -np.inf)[rows, predicted]
    slots = np.argsort(-contributions, axis=1, kind="stable")[:, :top]  # the lower slot first among equals
    found = np.take_along_axis(similarities[rows, predicted], slots, axis=1)
    known = np.take_along_axis(used[predicted], slots, axis=1)
    return Outputs(
        probabilities=logits.softmax(dim=1).numpy(),
        predicted=predicted,
        slots=np.where(known, slots, -1),
        similarities=found,
        best=np.where(used, similarities, -np.inf).max(axis=(1, 2)),
        finite=logits.isfinite().all(dim=1).numpy(),
    )


def _array(values: Tensor) -> NDArray[Any]:
    return values.float().cpu().numpy().astype(np.float64)


def run_over(
    run: Run,
    names: Strings,
    batches: Sequence[range],
    top: int,
    device: torch.device | str,
    num_workers: int,
    take: Callable[[range, Sequence[str], Outputs], object],
) -> None:
    """Run a run's model over images in batches; ``take`` gets of each, in order, (indices, B problems, outputs).

    Raises:
        InputError: a process that reads images has died, mostly for want of memory.
    """
    loader: DataLoader[Any] = DataLoader(
        Pictures(names, run.transform), batch_sampler=batches, num_workers=num_workers  # type: ignore[arg-type]
    )  # fmt: skip
    try:
        with iterate_outputs(run.model, loader, device, call=lambda images: run_model(run.model, images, top)) as found:
            for indices, (outputs, problems) in zip(batches, found, strict=True):
                take(indices, problems, outputs)
    except RuntimeError as error:  # from anywhere above: torch interrupts what is being done
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that reads images died ({first_line(error)}); expected memory for {num_workers} of them; start "
            "the same again with fewer --data.num_workers: it goes on where it stopped"
        ) from error


NOT_FINITE = "the model's logits are not finite"


class Columns:
    """How the table of a run is laid out.

    Args:
        run: names classes and prototypes.
        top: prototypes named for each image; where a class has room for fewer, all of them.
        labelled: whether there is a column of labels.
    """

    def __init__(self, run: Run, top: int, labelled: bool) -> None:
        manager = run.head.proto_manager
        self.class_names, self.anchor = run.class_names, manager.anchor
        self.top, self.labelled = min(top, manager.max_prototypes), labelled

    @property
    def header(self) -> list[str]:
        """The columns' names."""
        top = [f"top{n + 1}_{what}" for n in range(self.top) for what in ("prototype", "similarity", "file", "cell")]
        return [
            "file",
            *(["label"] if self.labelled else []),
            "predicted",
            "probability",
            *(f"probability_{name}" for name in self.class_names),
            *top,
            "best_similarity",
            "nothing_similar",
            "error",
        ]

    def rows(
        self,
        outputs: Outputs,
        names: Sequence[str],
        labels: Sequence[str] | None,
        problems: Sequence[str],
        threshold: float | None,
    ) -> Iterator[list[str]]:
        """The rows of a batch of B images.

        Args:
            outputs: what the model says of them.
            names, problems: B of them; no problem is "".
            labels: B, where there is a column of labels.
            threshold: an image none of whose similarities reaches it has ``nothing_similar`` 1, else 0; None: empty.
        """
        empty = [""] * (len(self.header) - (3 if self.labelled else 2))
        for i, name in enumerate(names):
            first = [shown(name)] if labels is None else [shown(name), labels[i]]
            problem = problems[i] or ("" if outputs.finite[i] else NOT_FINITE)
            yield [*first, *empty, shown(problem)] if problem else [*first, *self._found(outputs, i, threshold), ""]

    def _found(self, outputs: Outputs, i: int, threshold: float | None) -> Iterator[str]:
        predicted, best = int(outputs.predicted[i]), float(outputs.best[i])
        yield self.class_names[predicted]
        yield _number(outputs.probabilities[i, predicted])
        yield from map(_number, outputs.probabilities[i])
        for slot, similarity in zip(outputs.slots[i].tolist(), outputs.similarities[i].tolist(), strict=True):
            yield from self._prototype(predicted, slot, similarity)
        yield _number(best)
        yield "" if threshold is None else str(int(best < threshold))

    def _prototype(self, label: int, slot: int, similarity: float) -> tuple[str, str, str, str]:
        if slot < 0:
            return "", "", "", ""
        anchor = self.anchor(label, slot)
        place = ("", "") if anchor is None else (shown(str(anchor.file or anchor.sample_id)), str(anchor.cell))
        return (f"{self.class_names[label]}:{slot}", _number(similarity), *place)


def shown(name: str) -> str:
    r"""A file name as the table has it: as it is, but a byte that is no UTF-8 is written ``\xff``.

    Example:
        >>> shown(b"caf\xe9 1.jpg".decode("utf-8", "surrogateescape"))
        'caf\\xe9 1.jpg'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _number(value: float) -> str:
    return f"{value:.{DIGITS}f}"
