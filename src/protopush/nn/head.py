"""Prototype head: from features to logits that are sums of contributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protopush.data.regions import Regions
from protopush.errors import InputError
from protopush.nn.prototypes import PrototypeManager


class HasFeatures(Protocol):
    """What the head reads of :class:`protopush.backbones.Features`."""

    @property
    def pooled(self) -> Tensor: ...
    @property
    def patches(self) -> Tensor: ...


class HeadOutput(NamedTuple):
    """What the head says of a batch; K is the number of slots per class.

    Attributes:
        logits: (B, num_classes).
        contributions: (B, num_classes, K); ``logits == contributions.sum(-1) + bias``; 0 in unused slots.
        similarities: (B, num_classes, K), the cosine at the best cell, or its mean over the best cells.
        cells: (B, num_classes, K), the best cell.
        embeddings: (B, L, D), unit norm.
        prototypes: (num_classes, K, D), unit norm.
    """

    logits: Tensor
    contributions: Tensor
    similarities: Tensor
    cells: Tensor
    embeddings: Tensor
    prototypes: Tensor

    @property
    def maps(self) -> Tensor:
        """The cosine of every prototype and every cell, (B, num_classes, K, L); computed at each call."""
        every = self.prototypes.flatten(0, 1) @ self.embeddings.transpose(1, 2)
        return every.view(len(every), *self.prototypes.shape[:2], -1)


class HeadOptimal(nn.Module):
    """``logit_c = exp(log_temperature) * mean_k softplus(w_ck) * max_l cos(z_l, p_ck) + b_c``.

    With ``top_patches`` above 1 the mean over so many of the most similar patches takes the place of the maximum.
    Only a class's own prototypes count for it, and never with a negative weight, so that an explanation can show
    every term of the sum. What else is in the batch never matters.

    Args:
        in_dim: C, channels of the backbone's features.
        num_classes: number of classes.
        num_prototypes: prototypes per class, one number or one for each class.
        embed_dim: D.
        max_prototypes: slots per class (default: ``num_prototypes``).
        dropout: after the projection, in training.
        match: ``local`` compares prototypes with every patch, ``global`` with the pooled feature as one patch.
        top_patches: a similarity is the mean of the cosines of so many most similar patches (of all, if there are
            fewer): for patterns that lie in several places.
        temperature: initial ``exp(log_temperature)``.
        anchoring: ``off``, prototypes are parameters; ``live``, from its first push on each prototype *is* the
            embedding of its anchor's stored feature, computed in every forward, so that the projection learns to make
            real patches good prototypes.
        crop_size: of live anchors' pixels, where a trained backbone embeds them in every step; see
            :class:`protopush.nn.prototypes.PrototypeManager`.

    Source: ProtoPNet (Chen et al., 2019) for the scores; cosine similarity as in TesNet (Wang et al., 2021); the mean
    over the best patches as in IAIA-BL (Barnett et al., 2021).

    Example:
        >>> from protopush.backbones import Features
        >>> from protopush.data.regions import Regions
        >>> head = HeadOptimal(in_dim=16, num_classes=3, num_prototypes=2, embed_dim=8).eval()
        >>> patches = torch.randn(4, 49, 16)
        >>> out = head(Features(patches.mean(1, keepdim=True), patches, Regions.grid((7, 7), (224, 224))))
        >>> out.logits.shape, out.contributions.shape
        (torch.Size([4, 3]), torch.Size([4, 3, 2]))
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        num_prototypes: int | Sequence[int] = 10,
        embed_dim: int = 128,
        max_prototypes: int | None = None,
        dropout: float = 0.1,
        match: str = "local",
        top_patches: int = 1,
        temperature: float = 10.0,
        anchoring: str = "off",
        crop_size: int | None = None,
    ) -> None:
        super().__init__()
        if anchoring not in ("off", "live"):
            raise InputError(f"anchoring={anchoring!r}; expected 'off' or 'live' (prototypes are real patches)")
        if match not in ("local", "global"):
            raise InputError(f"match={match!r}; expected 'local' (every patch) or 'global' (the pooled feature)")
        if top_patches < 1:
            raise InputError(f"top_patches={top_patches}; expected at least 1 (the most similar patch alone)")
        self.match, self.top_patches = match, top_patches
        self.proj = nn.Sequential(nn.Linear(in_dim, embed_dim), nn.LayerNorm(embed_dim), nn.Dropout(dropout))
        self.anchoring = anchoring
        anchor_dim = in_dim if anchoring == "live" else None
        self.proto_manager = PrototypeManager(
            num_classes, num_prototypes, embed_dim, max_prototypes, anchor_dim, crop_size
        )
        slots = self.proto_manager.max_prototypes
        # softplus(w) = 1: at first every prototype counts alike
        self.connections = nn.Parameter(torch.full((num_classes, slots), math.log(math.e - 1)))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        if self.proto_manager.is_live:  # what is saved are the prototypes that the model has
            self.register_state_dict_pre_hook(_sync)  # type: ignore[no-untyped-call]

    def embed(self, features: Tensor) -> Tensor:
        """Features (..., C) as unit embeddings (..., D)."""
        return F.normalize(self.proj(features), dim=-1)

    def prototypes(self, anchor_features: Tensor | None = None) -> Tensor:
        """The unit prototypes (num_classes, K, D): the parameter's, or their anchors' embeddings where live.

        ``anchor_features`` (num_classes * K, C) takes the place of those that are stored.
        """
        manager = self.proto_manager
        features = manager.anchor_features if anchor_features is None else anchor_features
        if features is None or manager.anchor_ids is None:
            return manager.unit()
        anchored = F.normalize(self.proj[:-1](features), dim=-1)  # without dropout
        # The parameter stays in the graph, with a gradient of 0: DDP wants each parameter to take part.
        live = torch.where(
            manager.anchor_ids.unsqueeze(1) >= 0, anchored.view_as(manager.prototypes), manager.prototypes
        )
        return F.normalize(live, dim=-1).view(manager.num_classes, manager.max_prototypes, -1)

    @torch.no_grad()
    def sync_prototypes(self) -> None:
        """Write live prototypes into the parameter, for those who read it: the push, a state dict, an export."""
        manager = self.proto_manager
        if manager.anchor_ids is not None:
            live = (manager.anchor_ids >= 0).unsqueeze(1)
            manager.prototypes.copy_(torch.where(live, self.prototypes().flatten(0, 1), manager.prototypes))

    def compared(self, regions: Regions) -> Regions:
        """Where that lies which prototypes are compared with: the patches, or the image as one."""
        return regions if self.match == "local" else Regions.whole(regions.size)

    def weights(self) -> Tensor:
        """What a similarity of 1 contributes, (num_classes, K): temperature, connection and mean; 0 in unused slots."""
        used = self.proto_manager.mask()
        share = used / used.sum(dim=1, keepdim=True).clamp(min=1)
        return self.log_temperature.exp() * F.softplus(self.connections) * share

    def forward(self, features: HasFeatures, anchor_features: Tensor | None = None) -> HeadOutput:
        """Features of a batch, patches (B, L, C) and pooled (B, 1, C), to :class:`HeadOutput`."""
        return self.classify(self.embed_features(features), self.prototypes(anchor_features))

    def embed_features(self, features: HasFeatures) -> Tensor:
        """The unit embeddings (B, L, D) that prototypes are compared with: of patches, or of the pooled feature."""
        return self.embed(features.patches if self.match == "local" else features.pooled)

    def classify(self, embeddings: Tensor, prototypes: Tensor | None = None) -> HeadOutput:
        """Unit embeddings (B, L, D) to :class:`HeadOutput`; with other ``prototypes`` than its own where given."""
        prototypes = self.prototypes() if prototypes is None else prototypes
        return classify(embeddings, prototypes, self.weights(), self.bias, self.top_patches)


def classify(embeddings: Tensor, prototypes: Tensor, weights: Tensor, bias: Tensor, top_patches: int = 1) -> HeadOutput:
    """The formula of :class:`HeadOptimal` alone, for prototypes and weights that are known already.

    Args:
        embeddings: (B, L, D), unit norm.
        prototypes: (num_classes, K, D), unit norm.
        weights: (num_classes, K), what a similarity of 1 contributes; 0 in unused slots.
        bias: (num_classes).
        top_patches: over how many of the best patches a similarity is the mean.
    """
    every = embeddings @ prototypes.flatten(0, 1).T  # (B, L, num_classes * K)
    best, cells = every.max(dim=1)
    if top_patches > 1:
        best = every.topk(min(top_patches, every.shape[1]), dim=1).values.mean(dim=1)
    shape = (-1, *prototypes.shape[:2])
    similarities = best.view(shape)
    contributions = similarities * weights
    logits = contributions.sum(-1) + bias
    return HeadOutput(logits, contributions, similarities, cells.view(shape), embeddings, prototypes)


def _sync(head: HeadOptimal, *_: object) -> None:
    head.sync_prototypes()
