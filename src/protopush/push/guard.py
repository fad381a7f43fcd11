"""Guard of a push: what it costs on validation images, and what is done about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from protopush.distributed import all_gather_objects, raising_on_all_ranks
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.push.protocol import Pushable
from protopush.push.reader import check_labels, read_through

BISECTIONS = 8  # the momentum is found to 1/256 of the way from the one asked for to 1

Score = dict[str, float | None]


@dataclass(frozen=True)
class GuardDecision:
    """What the guard saw and did.

    Attributes:
        guard, budget: as asked.
        before, after: balanced_accuracy, auroc and ece on the validation images, before the push and as it was left.
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
        def change(name: str) -> str:
            before, after = self.before[name], self.after[name]
            return f"{name} -" if before is None or after is None else f"{name} {before:.3f} -> {after:.3f}"

        changes = ", ".join(change(name) for name in ("balanced_accuracy", "auroc", "ece"))
        how = {
            "kept": "kept",
            "rolled back": "rolled back: prototypes are as before",
            "momentum raised": f"kept with momentum {self.momentum:.4f}",
        }
        return f"guard {self.guard}: {how[self.action]}; cost {self.cost:+.3f} (budget {self.budget:g}); {changes}"


def guarded(
    guard: str, budget: float, momentum: float, place: Callable[[float], None], score: Callable[[], Score]
) -> GuardDecision:
    """Place prototypes, measure what that costs, and settle the momentum.

    ``budget`` finds the smallest momentum whose cost is within the budget, by bisection between the one asked for and 1
    (where nothing moves and the cost is 0). Where the cost is no monotone function of the momentum, what is found is a
    momentum within the budget, beside one that isn't.

    Args:
        guard: ``report``, ``rollback`` or ``budget``.
        budget: the fall that is allowed.
        momentum: as asked.
        place: writes the prototypes for a momentum.
        score: measures the model as it is.
    """
    before = score()
    tried: list[tuple[float, float]] = []

    def try_out(candidate: float) -> Score:
        place(candidate)
        after = score()
        tried.append((candidate, _cost(before, after)))
        return after

    after = try_out(momentum)
    cost = tried[0][1]
    if guard == "report" or cost <= budget:
        return GuardDecision(guard, budget, before, after, cost, "kept", momentum, tried)
    within, found = 1.0, before
    if guard == "budget":
        beyond = momentum
        for _ in range(BISECTIONS):
            middle = (beyond + within) / 2
            after = try_out(middle)
            if tried[-1][1] <= budget:
                within, found = middle, after
            else:
                beyond = middle
    action = "momentum raised" if within < 1 else "rolled back"
    return GuardDecision(guard, budget, before, found, cost, action, within, tried)


def _cost(before: Score, after: Score) -> float:
    pairs = [(before[name], after[name]) for name in ("balanced_accuracy", "auroc")]
    return max(old - new for old, new in pairs if old is not None and new is not None)


class Validation:
    """Scores a model on validation images, again and again while only its prototypes change.

    A head with ``embed_features(features)`` and ``classify(embeddings)`` (as :class:`protopush.HeadOptimal`) is scored
    from embeddings computed once, kept on the CPU: N * L * D * 4 bytes. Any other model is run each time.

    Args:
        model: gives logits (B, C), or an object with ``logits``.
        net: the module behind its wrappers.
        loader: validation images; read as the push reads, each image once over all ranks.
        device: where the model is.
    """

    def __init__(self, model: nn.Module, net: Pushable, loader: Iterable[Any], device: torch.device) -> None:
        self.model, self.net, self.device = model, net, device
        self.head: Any = net.head
        self.reader = read_through(loader)
        self.embeddings: list[tuple[Tensor, Tensor]] | None = None
        if hasattr(self.head, "embed_features") and hasattr(self.head, "classify"):
            with raising_on_all_ranks():
                self.embeddings = [(self._embed(images).cpu(), labels) for images, labels in self._batches()]

    def score(self) -> Score:
        """Balanced accuracy, AUROC and expected calibration error of the model as it is."""
        with raising_on_all_ranks():
            here = [(_probabilities(output), labels) for output, labels in self._outputs()]
        parts = [part for of_rank in all_gather_objects(here) for part in of_rank]
        if not parts:
            raise InputError("the val_loader yields no batch; expected validation images; nothing was changed")
        probabilities, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        names = [str(c) for c in range(probabilities.shape[1])]
        metrics = classification_metrics(probabilities, labels, names)
        return {name: metrics[name] for name in ("balanced_accuracy", "auroc", "ece")}

    def _outputs(self) -> Iterator[tuple[Any, Tensor]]:
        if self.embeddings is not None:
            for embeddings, labels in self.embeddings:
                yield self.head.classify(embeddings.to(self.device)), labels
        else:
            for images, labels in self._batches():
                yield self.model(images.to(self.device)), labels

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        classes = len(self.net.head.proto_manager.get_prototype_indices())
        for images, labels, ids in self.reader.batches():
            check_labels(labels, ids, classes)
            yield images, labels

    def _embed(self, images: Tensor) -> Tensor:
        pooled, patches = self.net.extract_features(images.to(self.device))
        embeddings: Tensor = self.head.embed_features(SimpleNamespace(pooled=pooled, patches=patches))
        return embeddings


def _probabilities(output: Any) -> Tensor:
    logits: Tensor = getattr(output, "logits", output)
    return logits.detach().float().softmax(dim=1).cpu()
