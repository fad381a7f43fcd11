"""How a model's output is read: maps, channels-last maps or tokens become cells in row-major order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from protopush.errors import InputError

MOST_STAGES = 5  # of a hierarchical model, where the cells of a stage are twice as high and wide as those before


class Tokens(NamedTuple):
    """How to read a sequence of tokens: how many to drop in front; the pixels (vertical, horizontal) of one cell."""

    prefix: int = 0
    stride: tuple[float, float] = (1.0, 1.0)


def _declared_format(model: nn.Module) -> str:
    declared = getattr(model, "output_fmt", "NCHW")
    return str(getattr(declared, "value", declared))  # a string, or timm's Format


def choose_layout(model: nn.Module, output: Tensor, name: str, wanted: str | None) -> str:
    """The layout that is wanted, or that the model declares."""
    layout = wanted or ("NLC" if output.ndim == 3 else _declared_format(model))
    if layout not in LAYOUTS:
        raise InputError(f"{name} has an unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}; give layout=")
    return layout


def token_stride(model: nn.Module, output: Tensor, size: tuple[int, int], prefix: int) -> tuple[float, float]:
    """Pixels of one cell: what the model declares, or a patch doubled in each stage; else cells as square as can be."""
    if output.ndim != 3:
        return Tokens().stride
    length = output.shape[1] - prefix
    patch = _both(getattr(getattr(model, "patch_embed", model), "patch_size", None) or 0)
    stages = getattr(model, "feature_info", None)
    last = stages[-1].get("reduction") if isinstance(stages, list) and stages else None
    if last:  # timm declares the reduction of the last stage; patch_size may be the first stage's alone
        strides = [patch, _both(last)]
    else:
        doubled = [(patch[0] * 2**stage, patch[1] * 2**stage) for stage in range(MOST_STAGES)]
        strides = [*doubled, _both(math.sqrt(size[0] * size[1] / max(length, 1)))]
    strides = [stride for stride in strides if min(stride) > 0]
    return next((stride for stride in strides if _token_grid(length, size, stride)), strides[-1])


def _both(stride: Any) -> tuple[float, float]:
    """(vertical, horizontal) of a number or a pair; zeros for what is neither."""
    pair = tuple(stride) if isinstance(stride, (list, tuple)) else (stride, stride)
    return pair if len(pair) == 2 and all(isinstance(step, (int, float)) for step in pair) else (0.0, 0.0)


def _token_grid(length: int, size: tuple[int, int], stride: tuple[float, float]) -> tuple[int, int] | None:
    """The grid of ``length`` cells; models that pad a last, partial cell round up, the others down."""
    exact = [round(pixels / step, 6) for pixels, step in zip(size, stride, strict=True)]
    grids = [(math.floor(exact[0]), math.floor(exact[1])), (math.ceil(exact[0]), math.ceil(exact[1]))]
    return next((grid for grid in grids if grid[0] * grid[1] == length), None)


def _maps(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    return output.flatten(2).transpose(1, 2), (output.shape[-2], output.shape[-1])


def _maps_channels_last(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    return output.flatten(1, -2), (output.shape[1], output.shape[2])


def _sequence(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    patches = output[:, tokens.prefix :]
    return patches, _token_grid(patches.shape[1], size, tokens.stride) or (0, 0)


# A layout: (model output, image size (height, width), Tokens) -> patches (B, L, C) in row-major order, grid (h, w).
LAYOUTS: dict[str, Callable[[Tensor, tuple[int, int], Tokens], tuple[Tensor, tuple[int, int]]]] = {
    "NCHW": _maps,
    "NHWC": _maps_channels_last,
    "NLC": _sequence,
}
