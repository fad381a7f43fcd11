"""The best state of a run so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from protopush.prototypes import Anchor, PrototypeManager, anchors_from, plain_anchors
from protopush.training.evaluate import score_of


class Best:
    """Remembers the best state on the validation images; without any, the last one.

    Attributes:
        score: the best one.
        metrics: what it scored with; None without validation images.
        where: the epoch, in words.
        stale: epochs since.
    """

    def __init__(self, model: nn.Module, manager: PrototypeManager, metric: str) -> None:
        self.model = model
        self.manager = manager
        self.metric = metric
        self.score = float("-inf")
        self.metrics: dict[str, Any] | None = None
        self.where = "the first weights"
        self.stale = 0
        self.state: dict[str, Tensor] = {}
        self.anchors: list[Anchor | None] = []

    def see(self, metrics: dict[str, Any] | None, where: str) -> None:
        """Compare the model as it is now; live prototypes must have been pushed once."""
        if self.manager.anchor_ids is not None and not any(self.manager.anchors):
            self.stale = 0
            return
        score = self.score if metrics is None else score_of(metrics, self.metric)
        if score > self.score or metrics is None:
            self.stale = 0
        if score >= self.score:  # of equals the last: it has learned longer
            self.score, self.metrics, self.where = score, metrics, where
            self.state = {key: value.detach().cpu().clone() for key, value in self.model.state_dict().items()}
            self.anchors = list(self.manager.anchors)

    def restore(self) -> None:
        """Put the best state back."""
        if self.state:
            self.model.load_state_dict(self.state)
            self.manager.anchors = list(self.anchors)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "score": self.score,
            "metrics": self.metrics,
            "where": self.where,
            "stale": self.stale,
            "state": self.state,
            "anchors": plain_anchors(self.anchors),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse."""
        self.score, self.metrics, self.where = state["score"], state["metrics"], state["where"]
        self.stale = state["stale"]
        self.state, self.anchors = dict(state["state"]), anchors_from(state["anchors"])
