"""Outcome of a decision: what it does to the answers on the validation images, and the run that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from protopush.data.dataset import ImageDataset
from protopush.data.manifest import Catalog
from protopush.errors import InputError
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor
from protopush.runs.decisions import Decision, Flip, Replacement, write_decision
from protopush.runs.embeddings import embeddings_of, logits_of, scores_of
from protopush.runs.progress import bar
from protopush.runs.reanchor import put_back, standing

TRIES = 8  # anchors, one after the other, of which one is to keep the accuracy
STEPS = 100  # of the search for biases

Change = Callable[[Sequence[Anchor]], list[Replacement]]
"""Moves prototypes of a model, not into the images of some anchors that were tried before."""


@dataclass(frozen=True)
class Care:
    """What is to be true of a decision besides.

    Attributes:
        dry_run: the run stays as it is; what would be is worked out alone.
        keep_accuracy: the fall of balanced accuracy or AUROC on the validation images that is allowed, if any is: the
            nearest of the next anchors that keeps to it is taken, with the biases moved where that is needed.
    """

    dry_run: bool = False
    keep_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.keep_accuracy is not None and not 0 <= self.keep_accuracy < 1:
            raise InputError(
                f"--keep_accuracy {self.keep_accuracy}; expected the fall that is allowed, 0 or more, such as 0.01"
            )


AS_ASKED = Care()


def carry_out(
    run: Run, decision: Decision, change: Change, catalog: Catalog, device: torch.device, num_workers: int,
    state: list[bytes], care: Care,
) -> Decision:  # fmt: skip
    """Change a run's model, see what that does to the validation images, and write it and the decision into the run.

    ``state`` is of the folder before anything was worked out.

    Raises:
        InputError: accuracy is to be kept, but there are no validation images.
    """
    val = ImageDataset([sample for sample in catalog.samples if sample.split == "val"], run.transform)
    if not len(val):
        if care.keep_accuracy is not None:
            raise InputError("--keep_accuracy is measured on validation images, but the data have none; leave it out")
        decision = replace(decision, replaced=tuple(change(())))
    else:
        with bar("Embeddings of the validation images", len(val)) as advance:
            embeddings = embeddings_of(run, val, device, num_workers, advance)

        def again() -> Tensor:
            return logits_of(embeddings, run.head, device)

        answers = _Answers(run, val, again())
        if care.keep_accuracy is None:
            decision = answers.after(replace(decision, replaced=tuple(change(()))), again())
        else:
            decision = _careful(run, decision, change, answers, again, care.keep_accuracy)
    if not care.dry_run:
        write_decision(run, decision, state)
    return decision


class _Answers:
    """What a model says of the validation images before a change, and how that differs from what it says after."""

    def __init__(self, run: Run, val: ImageDataset, logits: Tensor) -> None:
        self.names, self.val, self.logits = run.class_names, val, logits
        self.scores = scores_of(logits, val, self.names)

    def after(self, decision: Decision, logits: Tensor) -> Decision:
        """The decision, with scores and the answers that differ."""
        said, now = self.logits.argmax(dim=1), logits.argmax(dim=1)
        flips = [
            Flip(self.val.samples[i].name, *(self.names[c] for c in (self.val.labels[i], int(said[i]), int(now[i]))))
            for i in (said != now).nonzero().flatten().tolist()
        ]
        scores = scores_of(logits, self.val, self.names)
        return replace(decision, val_before=self.scores, val_after=scores, flips=tuple(flips))


def _careful(
    run: Run, decision: Decision, change: Change, answers: _Answers, again: Callable[[], Tensor], budget: float
) -> Decision:
    """The first of the next anchors whose fall keeps to the budget, as it is or with the biases moved.

    Where none does, the one whose fall is the smallest. The model is left with it.
    """
    head = run.head
    bias, tried, found = head.bias.detach().clone(), list[Anchor](), list[_Try]()
    while len(found) < 2 * TRIES:
        try:
            made = replace(decision, replaced=tuple(change(tried)))
        except InputError:
            if not found:
                raise
            break
        logits, places = again(), [standing(run, move.slot) for move in made.replaced]
        shift = keep_shares(answers.logits, logits).to(bias)
        for moved in (bias, bias + shift):
            one = answers.after(made, logits + (moved - bias).cpu())
            if moved is not bias:
                pairs = zip(run.class_names, bias.tolist(), moved.tolist(), strict=True)
                one = replace(one, biases={name: (old, new) for name, old, new in pairs})
            found.append(_Try(fall(one), one, places, moved))
            if found[-1].fall <= budget or not places:
                _leave(run, found[-1].places, moved)
                return one
        tried += [move.new for move in made.replaced]
        _leave(run, made.replaced, bias)
    best = min(found, key=lambda one: one.fall)
    _leave(run, best.places, best.bias)
    return best.decision


class _Try(NamedTuple):
    """A decision as it could be: its fall, where its prototypes stand then, and the biases (num_classes,)."""

    fall: float
    decision: Decision
    places: list[Replacement]
    bias: Tensor


def _leave(run: Run, places: Sequence[Replacement], bias: Tensor) -> None:
    """Put prototypes where they stood, and the biases."""
    for place in places:
        put_back(run.head.proto_manager, place)
    with torch.no_grad():
        run.head.bias.copy_(bias)
    run.head.sync_prototypes()


def fall(decision: Decision) -> float:
    """The larger of the falls of balanced accuracy and AUROC on the validation images."""
    before, after = decision.val_before or {}, decision.val_after or {}
    pairs = [(before.get(name), after.get(name)) for name in ("balanced_accuracy", "auroc")]
    return max((was - now for was, now in pairs if was is not None and now is not None), default=0.0)


def keep_shares(before: Tensor, after: Tensor) -> Tensor:
    """What to add to the biases so that the classes' mean probabilities are as before, (num_classes,).

    No label is read, so that nothing is fitted to the validation images but how often each class is said.

    Args:
        before, after: logits (N, num_classes).

    Example:
        >>> before = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> keep_shares(before, before + torch.tensor([0.0, 0.5])).diff()
        tensor([-0.5000])
    """
    wanted, shift = before.double().softmax(dim=1).mean(dim=0).log(), torch.zeros(before.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        shift += wanted - (after.double() + shift).softmax(dim=1).mean(dim=0).log()
    return (shift - shift.mean()).float()
