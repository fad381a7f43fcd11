"""What the model says of a batch, as far as a table tells it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from protopush.head_optimal import HeadOptimal, HeadOutput
from protopush.model import ProtoModel

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


def look(model: ProtoModel, images: Tensor, top: int) -> Outputs:
    """Run a model, in eval mode and without gradients, over images (B, 3, H, W) that are on its device.

    Args:
        model: its head is a :class:`HeadOptimal`.
        images: as the model's transform makes them.
        top: N.
    """
    head = cast(HeadOptimal, model.head)
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
