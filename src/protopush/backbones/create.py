"""Backbones: any model or module becomes images -> one feature vector per cell of the last feature map.

What a model returns differs from family to family (maps, channels-last maps, tokens with class and register tokens in
front). Which of these it is gets decided once, when the backbone is built; ``LAYOUTS``, in ``layouts.py``, turns each
into cells in row-major order. Where models come from is listed in ``BUILDERS``, at the end of this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.backbones.fusion import fused_model
from protopush.backbones.hugging_face import hugging_face_model
from protopush.backbones.layouts import LAYOUTS, dry_run, features_of, layout_of, stop_unused
from protopush.backbones.timm_models import BuiltModel, preprocessing_of, timm_model
from protopush.backbones.weights import load_weights
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line, listing


class Features(NamedTuple):
    """What a backbone sees in a batch of images.

    Attributes:
        pooled: (B, 1, C), always the mean of ``patches`` over the cells.
        patches: (B, L, C), L = h * w cells in row-major order: cell r * w + c is row r, column c of the image.
        grid: (h, w).
    """

    pooled: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Backbone(nn.Module):
    """Any feature extractor, with its output read as cells of the image; :func:`create_backbone` makes one.

    The model is run once on a black image of ``preprocessing.size`` to learn its layout: in eval mode, without touching
    the random state, the train flags or the norm statistics.

    Args:
        model: ``model.forward_features(images)``, or ``model(images)`` where it has none, gives features in a layout.
        name: what to call it in messages and records.
        preprocessing: of its images.
        layout: a key of ``LAYOUTS``. Default: tokens "NLC" if the output has three dimensions, else the model's own
            ``output_fmt``, else "NCHW".
        prefix_tokens: class and register tokens before the cells. Default: the model's ``num_prefix_tokens``, or 0.
        only_used: turn gradients off for parameters that the features do not depend on (norms and layers of the
            dropped head), which DistributedDataParallel would wait for in vain.
        recipe: what builds the same architecture again, without a network and with random weights:
            ``create_backbone(pretrained=False, **recipe, **preprocessing)``. None: nothing but the module itself does.

    Attributes:
        channels: C of the features.
        grid: (h, w) for images of ``preprocessing.size``.
        layout: the key of ``LAYOUTS`` in use.
        frozen: whether :meth:`freeze` is in force.

    Raises:
        InputError: the model cannot run on such an image, or its output is not in the layout.

    Example:
        >>> backbone = Backbone(nn.Conv2d(3, 8, kernel_size=32, stride=32), "stem", Preprocessing())
        >>> pooled, patches, grid = backbone(torch.zeros(2, 3, 224, 160))
        >>> pooled.shape, patches.shape, grid
        (torch.Size([2, 1, 8]), torch.Size([2, 35, 8]), (7, 5))
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        *,
        layout: str | None = None,
        prefix_tokens: int | None = None,
        only_used: bool = False,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocessing = preprocessing
        self.frozen = False
        self._trainable: tuple[str, ...] = ()
        self.recipe = _as_json(recipe)
        output = dry_run(model, preprocessing.size, name, with_graph=only_used)
        self.layout, self.tokens = layout_of(model, output, preprocessing.size, name, layout, prefix_tokens)
        patches, self.grid = self._read(output, preprocessing.size)
        self.channels = patches.shape[-1]
        if only_used:
            stop_unused(model, output)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W), normalised as ``preprocessing`` says, to :class:`Features`.

        Raises:
            InputError: images of another shape, or of a size that the model does not take.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"images have shape {tuple(images.shape)}; expected (B, 3, H, W); give batches of RGB images"
            )
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions: about a third faster on CPUs
        patches, grid = self._read(self._extract(images), (images.shape[2], images.shape[3]))
        return Features(patches.mean(dim=1, keepdim=True), patches, grid)

    def freeze(self) -> Backbone:
        """Stop gradients and stay in eval mode (norm statistics, dropout) whatever a parent's ``train()`` says.

        Example:
            >>> backbone = Backbone(nn.Conv2d(3, 8, 32, 32), "stem", Preprocessing()).freeze().train()
            >>> backbone.training, any(p.requires_grad for p in backbone.parameters())
            (False, False)
        """
        if not self.frozen:
            self._trainable = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
            self.frozen = True
        self.model.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Backbone:
        """Give gradients back to the parameters that had them before :meth:`freeze`; ``train()`` works again."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in self._trainable)
        self.frozen, self._trainable = False, ()
        return self

    def train(self, mode: bool = True) -> Backbone:
        """As in torch, except that a frozen backbone stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def extra_repr(self) -> str:
        return f"name={self.name!r}, channels={self.channels}, layout={self.layout!r}, frozen={self.frozen}"

    def _extract(self, images: Tensor) -> Tensor:
        try:
            return features_of(self.model, images)
        except (InputError, torch.cuda.OutOfMemoryError):
            raise
        except (AssertionError, ValueError, RuntimeError) as cause:
            height, width = images.shape[-2:]
            if (height, width) == self.preprocessing.size:
                raise
            raise InputError(
                f"{self.name} does not take images of {height}x{width} pixels ({first_line(cause)}); expected "
                f"{self.preprocessing.size[0]}x{self.preprocessing.size[1]}; resize them, or build the backbone with "
                f"size=({height}, {width}) or, for a ViT, dynamic_img_size=True"
            ) from cause

    def _read(self, output: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The model's output for images of ``size`` (height, width) as patches (B, L, C) and grid (h, w)."""
        patches, grid = LAYOUTS[self.layout](output, size, self.tokens)
        if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1]:
            raise InputError(
                f"{self.name} gives {tuple(output.shape)} for images of {size[0]}x{size[1]} pixels, which does not "
                f"fill a grid as {self.layout} with {self.tokens.prefix} tokens dropped in front; expected h * w "
                "cells; give layout= or prefix_tokens= (1 for a class token), or another image size"
            )
        return patches, grid


def create_backbone(
    name_or_module: str | nn.Module, pretrained: bool | str | Path = True, **overrides: Any
) -> Backbone:
    """A backbone from a name or from a module.

    Args:
        name_or_module: one of

            - any name that ``timm.create_model`` takes: ``"convnext_tiny"``, ``"hf-hub:timm/..."``;
            - ``"hf:"`` and a model of the Hugging Face hub, or a folder: ``"hf:facebook/dinov2-small"``
              (:func:`protopush.backbones.hugging_face.hugging_face_model`; needs the extra ``hf``);
            - ``"fusion:"`` and two or more of all these, joined by "+": their maps, fused by a learned gate
              (:class:`protopush.backbones.fusion.FusedModel`);
            - a module, which is used as it is.
        pretrained: True: the weights of ``PRETRAINED_SOURCES`` where their package is installed, else the published
            ones (downloaded or cached). False: random weights. A path: a state dict, ``.safetensors``, ``.pt`` or
            ``.pth`` (tensors only: nothing is ever unpickled); a classifier in it is ignored. For a module, only a path
            counts.
        overrides: ``mean``, ``std``, ``size`` (height, width), ``interpolation`` of the preprocessing (default: the
            model's own, else ImageNet's at 224x224, bicubic; models with a fixed image size are built for ``size``);
            ``layout``, ``prefix_tokens`` and ``name`` of the :class:`Backbone`; all others go to ``timm.create_model``,
            or to the function of ``BUILDERS`` that the name's prefix stands for.

    Raises:
        InputError: an unknown name or override, weights that cannot be had or do not fit, a model without a map.

    Example:
        >>> backbone = create_backbone("resnet18", pretrained=False)
        >>> backbone.channels, backbone(torch.zeros(1, 3, 224, 224)).grid
        (512, (7, 7))
        >>> create_backbone(nn.Conv2d(3, 8, 16, 16), size=(32, 64)).name
        'Conv2d'
        >>> create_backbone("fusion:resnet18+convnext_atto", pretrained=False).channels
        512
    """
    given = _take(overrides, "mean", "std", "size", "interpolation")
    reading = _take(overrides, "layout", "prefix_tokens")
    name = overrides.pop("name", None)
    if isinstance(name_or_module, nn.Module):
        if overrides:
            raise InputError(
                f"a module takes no {listing(list(overrides))}; expected only preprocessing, layout, prefix_tokens and "
                "name; set these in the module"
            )
        model, own, recipe = name_or_module, preprocessing_of(name_or_module), {"name": type(name_or_module).__name__}
    else:
        prefix, _, rest = name_or_module.partition(":")
        if prefix in BUILDERS:
            model, own, recipe = BUILDERS[prefix](rest, pretrained is True, overrides, given)
        else:
            model, own, recipe = timm_model(name_or_module, pretrained is True, overrides)
        recipe = {"name": name_or_module, **recipe}
    recipe |= reading | ({"name": name} if name else {})
    if not isinstance(pretrained, bool):
        load_weights(model, Path(pretrained), recipe["name"])
    preprocessing = Preprocessing.from_dict({**own.to_dict(), **given})
    set_input_size: Any = getattr(model, "set_input_size", None)
    if "size" in given and set_input_size is not None:
        set_input_size(preprocessing.size)  # timm's ViTs and Swins are built for one size of images
    only_used = model is not name_or_module
    return Backbone(model, recipe["name"], preprocessing, only_used=only_used, recipe=recipe, **reading)


def _take(overrides: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: overrides.pop(key) for key in keys if key in overrides}


def _as_json(recipe: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The recipe as it is read back from JSON; None if it holds what JSON does not know, a class or a function."""
    try:
        read_back: dict[str, Any] | None = json.loads(json.dumps(recipe))
    except (TypeError, ValueError):
        return None
    return read_back


# The part of a name before its ":" -> (the rest of the name, pretrained, options, overrides of the preprocessing) ->
# the model, its preprocessing, the recipe that builds it again without a network.
BUILDERS: dict[str, Callable[[str, bool, Mapping[str, Any], Mapping[str, Any]], BuiltModel]] = {
    "fusion": partial(fused_model, create_backbone),
    "hf": hugging_face_model,
}
