"""Backbones: any model or module becomes images -> one feature vector per patch, and the patch's region.

What a model returns differs from family to family (maps, channels-last maps, tokens with class and register tokens in
front). Which of these it is gets decided once, when the backbone is built; ``LAYOUTS``, in ``layouts.py``, turns each
into cells in row-major order. With windows, a patch is a crop that the model sees alone. Where models come from is
listed in ``BUILDERS``, at the end of this file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.backbones.fusion import fused_model
from protopush.backbones.hugging_face import hugging_face_model
from protopush.backbones.layouts import LAYOUTS, dry_run, features_of, layout_of, stop_unused
from protopush.backbones.receptive_field import receptive_fields
from protopush.backbones.timm_models import BuiltModel, preprocessing_of, timm_model
from protopush.backbones.weights import load_weights
from protopush.backbones.windows import WindowedModel, Windows
from protopush.data.regions import Region, Regions
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line, listing


class Features(NamedTuple):
    """What a backbone sees in a batch of images.

    Attributes:
        pooled: (B, 1, C), always the mean of ``patches``.
        patches: (B, L, C); cells of a feature map, and windows of one size, in row-major order.
        regions: where the L patches lie, and what each can depend on.
    """

    pooled: Tensor
    patches: Tensor
    regions: Regions


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
        sees: what each cell of an image of ``preprocessing.size`` can depend on, as :meth:`measure` found it.

    Attributes:
        channels: C of the features.
        regions: of images of ``preprocessing.size``.
        layout: the key of ``LAYOUTS`` in use.
        frozen: whether :meth:`freeze` is in force.

    Raises:
        InputError: the model cannot run on such an image, or its output is not in the layout.

    Example:
        >>> backbone = Backbone(nn.Conv2d(3, 8, kernel_size=32, stride=32), "stem", Preprocessing())
        >>> pooled, patches, regions = backbone(torch.zeros(2, 3, 224, 160))
        >>> pooled.shape, patches.shape, regions.boxes[1]
        (torch.Size([2, 1, 8]), torch.Size([2, 35, 8]), (32.0, 0.0, 64.0, 32.0))
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
        sees: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocessing = preprocessing
        self.frozen = False
        self.always_eval: tuple[nn.Module, ...] = ()  # first layers that are frozen where the last ones learn
        self._trainable: tuple[str, ...] = ()
        self.recipe = _as_json(recipe)
        output = dry_run(model, preprocessing.size, name, with_graph=only_used)
        self.layout, self.tokens = layout_of(model, output, preprocessing.size, name, layout, prefix_tokens)
        self._sees: tuple[Region, ...] | None = None
        self._other_sizes: dict[tuple[int, int], Regions] = {}
        patches, self.regions = self.read(output, preprocessing.size)
        if sees is not None:
            self._set_sees([(x0, y0, x1, y1) for x0, y0, x1, y1 in sees])
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
        patches, regions = self.read(self._extract(images), (images.shape[2], images.shape[3]))
        return Features(patches.mean(dim=1, keepdim=True), patches, regions)

    def regions_of(self, size: tuple[int, int]) -> Regions:
        """The regions of images of ``size`` (height, width)."""
        size = (int(size[0]), int(size[1]))
        if size == self.preprocessing.size:
            return self.regions
        if size not in self._other_sizes:
            self._other_sizes[size] = self.read(dry_run(self.model, size, self.name, with_graph=False), size)[1]
        return self._other_sizes[size]

    @property
    def is_local(self) -> bool:
        """Whether each patch sees its box alone: nothing outside the box can change its feature."""
        return self.regions.is_local

    def measure(self) -> Backbone:
        """Measure the receptive field of each cell, which then stands in ``regions.sees`` and in the recipe.

        Windows know theirs; other models count as seeing the whole image until they are measured.
        """
        if not isinstance(self.model, WindowedModel):
            self._set_sees(receptive_fields(self, self.preprocessing.size))
        return self

    def _set_sees(self, sees: Sequence[Region]) -> None:
        if len(sees) != len(self.regions):
            raise InputError(
                f"sees has {len(sees)} regions; {self.name} has {len(self.regions)} patches; measure again"
            )
        self._sees = tuple(sees)
        self.regions = replace(self.regions, sees=self._sees)
        if self.recipe is not None:
            self.recipe["sees"] = [list(region) for region in sees]

    @property
    def has_windows(self) -> bool:
        """Whether the patches are windows, each seen alone."""
        return isinstance(self.model, WindowedModel)

    def embed_crops(self, crops: Tensor) -> Tensor:
        """The feature of each crop (N, 3, h, w), normalised, as of a window of an image: (N, C).

        Raises:
            InputError: the backbone has no windows.
        """
        if not isinstance(self.model, WindowedModel):  # as has_windows says
            raise InputError(f"{self.name} sees images as a whole; expected a backbone with windows; give windows=64")
        return self.model.embed(crops.contiguous(memory_format=torch.channels_last))

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
        """As in torch, except that what is frozen stays in eval mode."""
        super().train(mode and not self.frozen)
        for module in self.always_eval:
            module.eval()
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

    def read(self, output: Tensor, size: tuple[int, int]) -> tuple[Tensor, Regions]:
        """The model's output for images of ``size`` (height, width) as patches (B, L, C) and their regions."""
        if isinstance(self.model, WindowedModel):
            return output, self.model.regions(size)
        patches, grid = LAYOUTS[self.layout](output, size, self.tokens)
        if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1]:
            raise InputError(
                f"{self.name} gives {tuple(output.shape)} for images of {size[0]}x{size[1]} pixels, which does not "
                f"fill a grid as {self.layout} with {self.tokens.prefix} tokens dropped in front; expected h * w "
                "cells; give layout= or prefix_tokens= (1 for a class token), or another image size"
            )
        return patches, Regions.grid(grid, size, self._sees if size == self.preprocessing.size else None)


class FeatureReader(nn.Module):
    """Stands in for the frozen backbone: stored patches (B, L, C) to :class:`Features`."""

    def __init__(self, regions: Regions) -> None:
        super().__init__()
        self.regions = regions

    def regions_of(self, size: tuple[int, int]) -> Regions:
        """Those of the images that the patches are of, whatever the size of a batch."""
        return self.regions

    def forward(self, patches: Tensor) -> Features:
        patches = patches.float()
        return Features(patches.mean(dim=1, keepdim=True), patches, self.regions)


def create_backbone(
    name_or_module: str | nn.Module,
    pretrained: bool | str | Path = True,
    *,
    windows: Any = None,
    window_input: int | None = None,
    **overrides: Any,
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
        windows: cut the image into windows that the model sees one by one, alone: a size, several, or
            ``{"size": 64, "stride": 32}`` (:class:`protopush.backbones.windows.Windows`).
        window_input: the side that windows are enlarged to before the model.
        overrides: ``mean``, ``std``, ``size`` (height, width), ``interpolation`` of the preprocessing (default: the
            model's own, else ImageNet's at 224x224, bicubic; models with a fixed image size are built for ``size``);
            ``layout``, ``prefix_tokens``, ``name`` and ``sees`` of the :class:`Backbone`; ``stage`` of a timm model, an
            earlier level to stop at (:func:`protopush.backbones.timm_models.up_to_stage`); all others go to
            ``timm.create_model``, or to the function of ``BUILDERS`` that the name's prefix stands for.

    Raises:
        InputError: an unknown name or override, weights that cannot be had or do not fit, a model without a map.

    Example:
        >>> backbone = create_backbone("resnet18", pretrained=False)
        >>> backbone.channels, backbone(torch.zeros(1, 3, 224, 224)).patches.shape
        (512, torch.Size([1, 49, 512]))
        >>> local = create_backbone("resnet18", pretrained=False, windows={"size": 56, "stride": 28})
        >>> local(torch.zeros(1, 3, 224, 224)).patches.shape, local.is_local
        (torch.Size([1, 49, 512]), True)
        >>> create_backbone(nn.Conv2d(3, 8, 16, 16), size=(32, 64)).name
        'Conv2d'
        >>> create_backbone("fusion:resnet18+convnext_atto", pretrained=False).channels
        512
    """
    cut = None if windows is None else Windows.of(windows, window_input)
    if cut is None and window_input is not None:
        raise InputError(
            f"window_input is {window_input} without windows; expected windows; give them, or leave it out"
        )
    given = _take(overrides, "mean", "std", "size", "interpolation")
    reading = _take(overrides, "layout", "prefix_tokens", "sees")
    name = overrides.pop("name", None)
    if isinstance(name_or_module, nn.Module):
        if overrides:
            raise InputError(
                f"a module takes no {listing(list(overrides))}; expected only preprocessing, windows, layout, "
                "prefix_tokens and name; set these in the module"
            )
        model, own, recipe = name_or_module, preprocessing_of(name_or_module), {"name": type(name_or_module).__name__}
    else:
        prefix, _, rest = name_or_module.partition(":")
        if prefix in BUILDERS:
            asked = given if cut is None else {**given, "size": cut.largest(given.get("size", Preprocessing.size))}
            model, own, recipe = BUILDERS[prefix](rest, pretrained is True, overrides, asked)
            own = own if cut is None else replace(own, size=Preprocessing.size)
        else:
            model, own, recipe = timm_model(name_or_module, pretrained is True, overrides)
        recipe = {"name": name_or_module, **recipe}
    recipe |= reading | ({"name": name} if name else {})
    if not isinstance(pretrained, bool):
        load_weights(model, Path(pretrained), recipe["name"])
    preprocessing = Preprocessing.from_dict({**own.to_dict(), **given})
    seen = preprocessing if cut is None else replace(preprocessing, size=cut.largest(preprocessing.size))
    set_input_size: Any = getattr(model, "set_input_size", None)
    if seen.size != own.size and set_input_size is not None:
        set_input_size(seen.size)  # timm's ViTs and Swins are built for one size of images
    only_used = model is not name_or_module
    try:
        backbone = Backbone(model, recipe["name"], seen, only_used=only_used, recipe=recipe, **reading)
    except InputError as error:
        if cut is None or seen.size == own.size:
            raise
        raise InputError(
            f"{recipe['name']} does not take windows of {seen.size[0]}x{seen.size[1]} pixels ({first_line(error)}); "
            f"give window_input {own.size[0]}, which enlarges them, larger windows, or none (model.windows null)"
        ) from error
    if cut is None:
        return backbone
    windowed = {**recipe, "windows": {"size": cut.size, "stride": cut.stride}, "window_input": cut.input}
    return Backbone(WindowedModel(backbone, cut), backbone.name, preprocessing, recipe=windowed)


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
