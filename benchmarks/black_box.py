"""The opponent: the same backbone with a linear layer on its pooled features, in the very same training loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from protopush.backbones.create import Features
from protopush.nn.head import HeadOutput
from protopush.nn.prototypes import PrototypeManager
from protopush.training.setup import Job


class LinearHead(nn.Module):
    """Logits of the pooled feature (B, 1, C); what only prototypes have is left empty.

    Args:
        in_dim: C.
        num_classes: of the logits.
        dropout: before the layer, in training.
    """

    match, anchoring = "global", "off"

    def __init__(self, in_dim: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.proto_manager = PrototypeManager(num_classes, 1, 1).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(in_dim, num_classes)

    def forward(self, features: Features, anchor_features: Tensor | None = None) -> HeadOutput:
        pooled = features.pooled
        logits: Tensor = self.linear(self.dropout(pooled[:, 0]))
        each = logits.unsqueeze(2)
        cells = torch.zeros_like(each, dtype=torch.int64)
        return HeadOutput(logits, each, each, cells, pooled, self.proto_manager.unit())


def without_prototypes(job: Job) -> Job:
    """The job with a linear head in place of the prototypes, and with no loss term and no push that is about them."""
    torch.manual_seed(job.config.train.seed)
    channels = job.model.backbone.channels
    model = job.model
    model.head = LinearHead(channels, len(job.catalog.classes), job.config.model.dropout).to(job.fabric.device)
    loss = replace(job.config.loss, grounding=0.0, cluster=0.0, separation=0.0, orthogonality=0.0, consistency=0.0)
    config = replace(job.config, loss=loss, push=replace(job.config.push, start_epoch=10**6))
    return replace(job, model=model, config=config)
