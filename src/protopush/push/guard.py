"""Guard: what a change of the prototypes costs on validation images, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from protopush.distributed import all_gather_objects, raising_on_all_ranks
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.preserve_state import iterate_outputs
from protopush.push.protocol import Pushable, Slots, connections_of
from protopush.push.reader import Batch, check_labels, read_through

BISECTIONS = 8  # the momentum is found to 1/256 of the way from the one asked for to 1

Score = dict[str, float | None]
"""balanced_accuracy, auroc and ece on validation images; None where one can't be computed."""


def changes_of(before: Score, after: Score) -> str:
    """Each number before and after, for a line."""
    pairs = [(name, old, after[name]) for name, old in before.items()]
    return ", ".join(
        f"{name} -" if old is None or new is None else f"{name} {old:.3f} -> {new:.3f}" for name, old, new in pairs
    )


@dataclass(frozen=True)
class GuardDecision:
    """What the guard saw and did.

    Attributes:
        guard, budget: as asked.
        before, after: the scores before the push and as it was left.
        cost: what the push asked for cost: the larger of the falls of balanced accuracy and AUROC.
        action: ``kept``, ``rolled back`` or ``momentum raised``.
        momentum: with which the push was left; 1 where it was rolled back.
        tried: (momentum, cost) of all that was tried.
    """

    guard: str
    budget: float
    before: Score
    after: Score
    cost: float
    action: str
    momentum: float
    tried: list[tuple[float, float]] = field(default_factory=list)

    def __str__(self) -> str:
        how = {
            "kept": "kept",
            "rolled back": "rolled back: prototypes are as before",
            "momentum raised": f"kept with momentum {self.momentum:.4f}",
        }[self.action]
        cost = f"cost {self.cost:+.3f} (budget {self.budget:g})"
        return f"guard {self.guard}: {how}; {cost}; {changes_of(self.before, self.after)}"


def guarded(
    guard: str, budget: float, momentum: float, place: Callable[[float], None], score: Callable[[], Score]
) -> GuardDecision:
    """Place prototypes, measure what that costs, and settle the momentum.

    ``budget`` finds the smallest momentum whose cost is within the budget, by bisection between the one asked for and 1
    (where nothing moves and the cost is 0). Where the cost is no monotone function of the momentum, what is found is a
    momentum within the budget, beside one that isn't.

    Args:
        guard, budget, momentum: as asked.
        place: writes the prototypes for a momentum.
        score: measures the model as it is.
    """
    before = score()
    tried: list[tuple[float, float]] = []

    def try_out(candidate: float) -> tuple[Score, float]:
        place(candidate)
        after = score()
        pairs = [(before[name], after[name]) for name in ("balanced_accuracy", "auroc")]
        tried.append((candidate, max(old - new for old, new in pairs if old is not None and new is not None)))
        return after, tried[-1][1]

    after, cost = try_out(momentum)
    if guard == "report" or cost <= budget:
        return GuardDecision(guard, budget, before, after, cost, "kept", momentum, tried)
    beyond, within, found = momentum, 1.0, before
    for _ in range(BISECTIONS if guard == "budget" else 0):
        middle = (beyond + within) / 2
        after, cost_there = try_out(middle)
        if cost_there <= budget:
            within, found = middle, after
        else:
            beyond = middle
    action = "momentum raised" if within < 1 else "rolled back"
    return GuardDecision(guard, budget, before, found, cost, action, within, tried)


class Validation:
    """Scores a model on validation images, again and again while only its prototypes change.

    A head with ``embed_features(features)`` and ``classify(embeddings)`` (as :class:`protopush.HeadOptimal`) is scored
    from embeddings computed once, kept on the CPU: N * L * D * 4 bytes. Any other model is run each time; it gives
    logits (B, C), or an object with ``logits``. The loader is read as the push reads, each image once over all ranks.
    """

    def __init__(self, model: nn.Module, net: Pushable, loader: Iterable[Any]) -> None:
        self.model, self.manager = model, net.head.proto_manager
        reader, head, self.classify = read_through(loader), cast(Any, net.head), cast(Callable[..., Any], model)
        self.batches: Callable[[], Iterable[Batch]] = reader.batches
        if hasattr(head, "embed_features") and hasattr(head, "classify"):

            def embed(images: Tensor) -> Tensor:
                pooled, patches = net.extract_features(images)
                embeddings: Tensor = head.embed_features(SimpleNamespace(pooled=pooled, patches=patches))
                return embeddings.cpu()

            embedded = self._outputs(embed)
            self.batches, self.classify = lambda: embedded, head.classify

    def score(self) -> Score:
        """Balanced accuracy, AUROC and expected calibration error of the model as it is."""

        def probabilities_of(images: Tensor) -> Tensor:
            output = self.classify(images)
            logits: Tensor = getattr(output, "logits", output)
            return logits.detach().float().softmax(dim=1).cpu()

        here = [(batch.images, batch.labels) for batch in self._outputs(probabilities_of)]
        parts = [part for of_rank in all_gather_objects(here) for part in of_rank]
        if not parts:
            raise InputError("the val_loader yields no batch; expected validation images; nothing was changed")
        probabilities, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        names = [str(c) for c in range(probabilities.shape[1])]
        metrics = classification_metrics(probabilities, labels, names)
        return {name: metrics[name] for name in ("balanced_accuracy", "auroc", "ece")}

    def _outputs(self, call: Callable[[Tensor], Tensor]) -> list[Batch]:
        """The batches with what a function makes of their images, or of what was made of these before."""
        classes, found = len(self.manager.get_prototype_indices()), []
        with (
            raising_on_all_ranks(),
            iterate_outputs(self.model, self.batches(), self.manager.prototypes.device, call=call) as outputs,
        ):
            for output, labels, ids in outputs:
                check_labels(labels, ids, classes)
                found.append(Batch(output, labels, ids))
        return found


def scored_change(
    model: nn.Module, net: Pushable, slots: Slots, val_loader: Iterable[Any] | None, change: Callable[[], None] | None
) -> tuple[Score | None, Score | None]:
    """Make a change (None: there is none) to the prototypes; the validation scores before and after it.

    Where the change or its measurement fails, every bit of the prototypes, and of what belongs to them, is put back.
    """
    validation = None if val_loader is None else Validation(model, net, val_loader)
    before = after = None if validation is None else validation.score()
    if change is None:
        return before, after
    manager: Any = net.head.proto_manager
    names = ("prototypes", "valid_mask", "anchor_features", "anchor_ids", "anchor_cells")
    written = [getattr(manager, name, None) for name in names] + [connections_of(net, slots)]
    saved = [(target, target.detach().clone()) for target in written if target is not None]
    anchors = getattr(manager, "anchors", None)
    saved_anchors = list(anchors or ())
    try:
        change()
        return before, None if validation is None else validation.score()
    except BaseException:
        for target, values in saved:
            target.data.copy_(values)
        if anchors is not None:
            anchors[:] = saved_anchors
        raise
