"""The columns of the table, and an image's row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from protopush.predicting.outputs import DIGITS, Outputs
from protopush.prototypes import Anchor
from protopush.training.run import Run

NOT_FINITE = "the model's logits are not finite"


@dataclass(frozen=True)
class Columns:
    """How the table is laid out.

    Attributes:
        class_names: in label order.
        anchors: C * ``slots`` of them, what each prototype stands for.
        slots: prototypes that a class may have.
        top: prototypes told for each image.
        labelled: whether there is a column of labels.
    """

    class_names: tuple[str, ...]
    anchors: tuple[Anchor | None, ...]
    slots: int
    top: int
    labelled: bool

    @classmethod
    def of(cls, run: Run, top: int, labelled: bool) -> Columns:
        """Those for a run; where its classes have fewer prototypes than ``top``, all of them are told."""
        manager = run.head.proto_manager
        slots = manager.max_prototypes
        return cls(tuple(run.class_names), tuple(manager.anchors), slots, min(top, slots), labelled)

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
        anchor = self.anchors[label * self.slots + slot]
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
