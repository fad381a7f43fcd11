"""Model: a backbone and a prototype head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from protopush.backbones import Backbone, Features, create_backbone
from protopush.data.regions import Regions
from protopush.data.transforms import normalised
from protopush.models.pretrained import PretrainedMixin
from protopush.nn.head import HeadOptimal, HeadOutput
from protopush.push import PushMixin


class ProtoModel(PushMixin, PretrainedMixin, nn.Module):
    """Images to logits that are sums of contributions of prototypes.

    Args:
        backbone: a module that returns :class:`protopush.backbones.Features`, as :func:`create_backbone` makes it.
        head: a :class:`HeadOptimal`, or a module with ``proj``, ``proto_manager`` and the same output.

    ``push_prototypes`` and ``push_prototypes_local`` come from :class:`protopush.PushMixin`; ``save_pretrained``,
    ``from_pretrained`` and ``push_to_hub`` from :class:`protopush.models.pretrained.PretrainedMixin`.

    Example:
        >>> import torch
        >>> model = ProtoModel.create("resnet18", num_classes=3, pretrained=False).eval()
        >>> model(torch.randn(2, 3, 64, 64)).logits.shape
        torch.Size([2, 3])
    """

    backbone: Backbone
    head: HeadOptimal

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = cast(Backbone, backbone)
        self.head = cast(HeadOptimal, head)
        self.class_names: list[str] = []  # in label order, where they are known
        self.prior: list[float] | None = None  # the shares of the classes that probabilities assume, where known
        self.train_shares: list[float] | None = None  # those of the training images

    @classmethod
    def create(
        cls,
        backbone: str | nn.Module,
        num_classes: int,
        pretrained: bool | str | Path = True,
        windows: Any = None,
        **head_options: Any,
    ) -> ProtoModel:
        """A model from a backbone's name (any timm model), a module, or what :func:`create_backbone` made of them.

        ``windows`` are its; ``head_options`` go to :class:`HeadOptimal`.
        """
        features = (
            backbone if isinstance(backbone, Backbone) else create_backbone(backbone, pretrained, windows=windows)
        )
        return cls(features, HeadOptimal(features.channels, num_classes, **head_options))

    def forward(self, images: Tensor) -> HeadOutput:
        """Images (B, 3, H, W) to :class:`HeadOutput`, whose ``logits`` are (B, num_classes)."""
        features: Features = self.backbone(images)
        anchors = self.anchor_features() if self.training else None
        output: HeadOutput = self.head(features) if anchors is None else self.head(features, anchors)
        return output

    def anchor_features(self) -> Tensor | None:
        """The features (S, C) of live anchors, embedded from the pixels that the model holds; None where it holds none.

        In training, prototypes are so real patches at every step of the backbone too.
        """
        manager = self.head.proto_manager
        pixels: Tensor | None = getattr(manager, "anchor_crops", None)
        if pixels is None or manager.crops_of is None or manager.anchor_features is None:
            return None
        features, rows = manager.anchor_features, manager.has_crop().nonzero().flatten()
        sizes, group = torch.unique(manager.crops_of[rows, 2:], dim=0, return_inverse=True)
        for number, (height, width) in enumerate(sizes.tolist()):
            some = rows[group == number]
            crops = normalised(pixels[some, :, :height, :width], self.backbone.preprocessing)
            features = features.index_copy(0, some, self.backbone.embed_crops(crops).to(features.dtype))
        return features if len(rows) else None

    def extract_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``x_fu`` (B, 1, C) and ``x_fu1`` (B, L, C): what the push reads."""
        features: Features = self.backbone(images)
        return features.pooled, features.patches

    def embed_cell(self, images: Tensor, cell: int) -> Tensor | None:
        """The feature (C,) of one patch of one image (1, 3, H, W), from its window alone; None where there is none."""
        regions = self.regions_of(images)
        if regions is None or not getattr(self.backbone, "has_windows", False) or not 0 <= cell < len(regions):
            return None
        x0, y0, x1, y1 = map(int, regions.boxes[cell])
        feature: Tensor = self.backbone.embed_crops(images[:, :, y0:y1, x0:x1])[0]
        return feature

    def regions_of(self, images: Tensor) -> Regions | None:
        """Where the patches of such images lie, for the push's records; None where the backbone does not say."""
        known: Callable[[tuple[int, int]], Regions] | None = getattr(self.backbone, "regions_of", None)
        return known((images.shape[-2], images.shape[-1])) if known else None
