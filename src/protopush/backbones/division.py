"""Division of a backbone: first layers that stay as they are, whose output can be stored, and last ones that learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from protopush.backbones.create import Backbone, Features
from protopush.backbones.layouts import features_of
from protopush.backbones.timm_models import LayerModel, StageModel, levels_of
from protopush.backbones.windows import WindowedModel
from protopush.data.regions import Regions
from protopush.errors import InputError, first_line, listing
from protopush.preserve_state import preserve_state

WINDOWS_AT_ONCE = 256  # through the last layers on a CPU, whose cache larger batches do not fit


@dataclass(frozen=True)
class Division:
    """Where a model is divided.

    Args:
        layer: the last one of the trunk.
        trunk: names of modules that run before its output is there: the first layers, frozen.
        tail: those that run after it.
    """

    layer: str
    trunk: frozenset[str]
    tail: frozenset[str]


class Activations(NamedTuple):
    """What the trunk makes of a batch: ``patches`` (B, N), the maps of all windows one after another."""

    patches: Tensor
    regions: Regions


def divide(backbone: Backbone, trainable: int | str) -> Division:
    """The division of a backbone, with or without windows, and its trunk frozen: no gradients, always in eval mode.

    Args:
        backbone: its model runs layer after layer: each layer's output is all that the next ones need.
        trainable: how many of the last stages of a timm model learn, or a layer (``blocks.4``): all behind it do.

    Raises:
        InputError: no such stage or layer, or a model that cannot be divided there.

    Example:
        >>> from protopush.backbones import create_backbone
        >>> backbone = create_backbone("resnet18", pretrained=False)
        >>> divide(backbone, 1).layer, sum(p.requires_grad for p in backbone.parameters())
        ('layer3', 15)
    """
    inner = _inner(backbone)
    division = _division(inner, _layer(inner, trainable))
    frozen = _without(inner.model, division.tail)
    left = {id(parameter) for parameter in _without(inner.model, division.trunk).parameters()}
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in left)
    inner.always_eval = tuple(inner.model.get_submodule(name).eval() for name in sorted(division.trunk))
    return division


class Trunk(nn.Module):
    """The first layers of a divided backbone: images (B, 3, H, W) to :class:`Activations`.

    Args:
        backbone, division: as of :func:`divide`.
    """

    def __init__(self, backbone: Backbone, division: Division) -> None:
        super().__init__()
        inner = _inner(backbone)
        self.model = _without(inner.model, division.tail)
        # Not as a submodule: what comes behind the trunk decides nothing of what it gives.
        self._windows = [backbone.model] if isinstance(backbone.model, WindowedModel) else []
        self.regions = backbone.regions
        self.name, self.layout, self.recipe = f"{backbone.name} up to {division.layer}", inner.layout, backbone.recipe

    def forward(self, images: Tensor) -> Activations:
        images = images.contiguous(memory_format=torch.channels_last)
        if not self._windows:
            return Activations(features_of(self.model, images).flatten(1), self.regions)
        maps = self._windows[0].over_windows(images, lambda crops: features_of(self.model, crops))
        return Activations(torch.cat([some.flatten(1) for some in maps], dim=1), self.regions)


class Tail(nn.Module):
    """Stands in for a divided backbone: stored activations (B, N) to :class:`protopush.backbones.Features`.

    Its parameters are the backbone's own; those of the trunk are frozen.

    Args:
        backbone, division: as of :func:`divide`.
    """

    def __init__(self, backbone: Backbone, division: Division) -> None:
        super().__init__()
        self.backbone, self.division = backbone, division
        self.preprocessing, self.regions = backbone.preprocessing, backbone.regions
        self.runs = _runs(backbone, division)
        self._crops: tuple[Tensor, Tensor] | None = None

    def regions_of(self, size: tuple[int, int]) -> Regions:
        """Those of the images that the activations are of, whatever the size of a batch."""
        return self.regions

    def forward(self, stored: Tensor) -> Features:
        found, stored = [], stored.float()
        for run, maps in zip(self.runs, torch.split(stored, [run.numbers for run in self.runs], dim=1), strict=True):
            patches = self._patches(maps.reshape(-1, *run.shape), run.size)
            if run.windows:  # windows: the patch of each is the mean over its map
                patches = patches.mean(dim=1).view(len(stored), run.windows, -1)
            found.append(patches)
        patches = torch.cat(found, dim=1)
        return Features(patches.mean(dim=1, keepdim=True), patches, self.regions)

    def embed_crops(self, crops: Tensor) -> Tensor:
        """As of the backbone; the trunk's output is kept, since anchors are the same in many steps."""
        windows = self.backbone.model
        if not isinstance(windows, WindowedModel):
            return self.backbone.embed_crops(crops)
        if self._crops is None or not torch.equal(self._crops[0], crops):
            with torch.no_grad():
                given = windows.resized(crops.contiguous(memory_format=torch.channels_last))
                trunk = _without(_inner(self.backbone).model, self.division.tail)
                self._crops = crops, features_of(trunk, given)
        return self._patches(self._crops[1], (crops.shape[2], crops.shape[3])).mean(dim=1)

    def _patches(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """What the last layers make of maps (M, c, h, w) of pictures of ``size``: (M, cells, C)."""
        inner = _inner(self.backbone)
        model = _without(inner.model, self.division.trunk)  # not kept: flags of the model itself may change
        if maps.ndim == 4:
            maps = maps.contiguous(memory_format=torch.channels_last)
        step = WINDOWS_AT_ONCE if maps.device.type == "cpu" else len(maps)
        return torch.cat([inner.read(features_of(model, some), size)[0] for some in torch.split(maps, max(1, step))])


class _Run(NamedTuple):
    """Stored maps of one size: windows of one size (``windows``), or the map of the whole image (0)."""

    windows: int
    shape: tuple[int, ...]
    size: tuple[int, int]

    @property
    def numbers(self) -> int:
        return max(1, self.windows) * math.prod(self.shape)


def _runs(backbone: Backbone, division: Division) -> list[_Run]:
    inner, windows = _inner(backbone), backbone.model
    trunk, size = _without(inner.model, division.tail), backbone.preprocessing.size
    image = next(inner.parameters()).new_zeros((1, 3, *size))
    with preserve_state(inner):
        if not isinstance(windows, WindowedModel):
            return [_Run(0, tuple(features_of(trunk, image).shape[1:]), size)]
        outputs = windows.over_windows(image, lambda crops: features_of(trunk, crops))
    sizes = windows.windows.sizes(size)
    return [_Run(out.shape[1], tuple(out.shape[2:]), seen) for out, seen in zip(outputs, sizes, strict=True)]


def _inner(backbone: Backbone) -> Backbone:
    """The backbone that sees pictures: the whole image, or one window."""
    model = backbone.model
    return model.backbone if isinstance(model, WindowedModel) else backbone  # type: ignore[return-value]


def _layer(inner: Backbone, trainable: int | str) -> str:
    """The name, in the inner model, of the last layer of the trunk."""
    known, model = {name for name, _ in inner.model.named_modules() if name}, inner.model
    prefix = "model." if isinstance(model, (StageModel, LayerModel)) else ""
    if isinstance(trainable, str):
        if prefix + trainable not in known:
            near = sorted(known, key=_depth)[:5]
            raise InputError(
                f"{inner.name} has no layer {trainable!r} behind which it is to learn; expected a layer such as "
                f"{listing(near)}, or a number of stages"
            )
        return prefix + trainable
    stages = [prefix + level for level in levels_of(getattr(model, "model", model))]
    if isinstance(model, StageModel):
        stages = stages[: stages.index(stages[model.stage]) + 1]
    if not 0 < trainable < len(stages):
        expected = f"of its stages ({listing(stages)}) 1 to {len(stages) - 1}, or " if len(stages) > 1 else ""
        raise InputError(
            f"train.trainable_stages is {trainable} for {inner.name}; expected {expected}a layer behind which all learn"
        )
    return stages[-1 - trainable]


def _division(inner: Backbone, layer: str) -> Division:
    """What runs before and after a layer's output, checked: tail(trunk(image)) is the model's own output."""
    size = inner.preprocessing.size
    generator = torch.Generator().manual_seed(0)
    image = torch.randn((1, 3, *size), generator=generator).to(next(inner.parameters()))
    started, ended, clock = dict[str, int](), dict[str, int](), [0]

    def note(times: dict[str, int], name: str, first: bool) -> None:
        clock[0] += 1
        times[name] = min(times.get(name, clock[0]), clock[0]) if first else clock[0]

    hooks = []
    for name, module in inner.model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: note(started, name, True)))
        hooks.append(module.register_forward_hook(lambda *_, name=name: note(ended, name, False)))
    advice = (
        f"expected a model that runs layer after layer, such as a convolutional one or a ViT; {inner.name} does not"
    )
    try:
        with preserve_state(inner):
            whole = features_of(inner.model, image)
    finally:
        for hook in hooks:
            hook.remove()
    if layer not in ended:
        raise InputError(f"the layer {layer} of {inner.name} does not run; expected one that does; choose another")
    trunk = frozenset(_outermost(name for name in ended if ended[name] <= ended[layer]))
    tail = frozenset(_outermost(name for name in ended if started[name] > ended[layer]))
    division = Division(layer, trunk, tail)
    with preserve_state(inner):
        try:
            parts = features_of(_without(inner.model, trunk), features_of(_without(inner.model, tail), image))
        except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as cause:
            raise InputError(
                f"{inner.name} cannot be divided behind {layer} ({first_line(cause)}); {advice}"
            ) from cause
    if parts.shape != whole.shape or not torch.allclose(parts, whole, rtol=1e-4, atol=1e-4):
        raise InputError(f"{inner.name} cannot be divided behind {layer}: its parts give another output; {advice}")
    return division


def _depth(name: str) -> tuple[int, str]:
    return name.count("."), name


def _outermost(names: Iterable[str]) -> list[str]:
    """The names that lie within no other one."""
    known = {name for name in names if name}
    return [name for name in known if not any(name.startswith(f"{other}.") for other in known)]


def _without(model: nn.Module, names: frozenset[str], prefix: str = "") -> nn.Module:
    """The model with some modules replaced by nothing; all that is left is shared with it."""
    view: Any = copy.copy(model)
    view._modules = {}
    if f"{prefix}patch_embed" in names and hasattr(model, "_pos_embed"):
        view._pos_embed = lambda tokens: tokens  # of timm's ViTs, between two modules: positions are in the tokens
    for key, child in model._modules.items():
        name = prefix + key
        if child is not None and name in names:
            child = nn.Identity()
        elif child is not None and any(other.startswith(f"{name}.") for other in names):
            child = _without(child, names, f"{name}.")
        view._modules[key] = child
    return cast(nn.Module, view)
