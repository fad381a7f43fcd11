"""Layouts of a model's output, found by a dry run: maps or tokens, read as cells in row-major order."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush.errors import InputError, first_line
from protopush.preserve_state import preserve_state

MOST_STAGES = 5  # of a hierarchical model, where the cells of a stage are twice as high and wide as those before


class Tokens(NamedTuple):
    """How to read a sequence of tokens: how many to drop in front; the pixels (vertical, horizontal) of one cell."""

    prefix: int = 0
    stride: tuple[float, float] = (1.0, 1.0)


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """``model.forward_features(images)``, or ``model(images)`` where it has none."""
    extract: Callable[[Tensor], Tensor] = getattr(model, "forward_features", model)
    return extract(images)


def dry_run(model: nn.Module, size: tuple[int, int], name: str, with_graph: bool) -> Tensor:
    """The raw output for one black image of ``size`` (height, width); its graph keeps no activations.

    The model runs in eval mode; its random state, train flags and norm statistics stay as they are.

    Raises:
        InputError: the model fails on such an image, or gives no tensor of three dimensions or more.
    """
    like = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(()))
    image = like.new_zeros((1, 3, *size), dtype=like.dtype if like.is_floating_point() else None)
    nothing = torch.empty(0)
    save_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
    with preserve_state(model), torch.set_grad_enabled(with_graph), save_nothing:
        try:
            output = getattr(model, "forward_black", partial(features_of, model))(image)
        except InputError:
            raise
        except Exception as cause:
            raise InputError(
                f"{name} fails on an image of shape {tuple(image.shape)} ({first_line(cause)}); expected a "
                "feature extractor for RGB images; check the model, or give size=(height, width)"
            ) from cause
    if not torch.is_tensor(output) or output.ndim < 3:
        got = f"a tensor of shape {tuple(output.shape)}" if torch.is_tensor(output) else type(output).__name__
        raise InputError(
            f"{name} gives {got}, not a feature map; expected a tensor (B, C, h, w), (B, h, w, C) or "
            "(B, N, C); wrap the model so that its forward_features, or forward, returns that (no pooling, no head)"
        )
    return output


def reached(output: Tensor) -> set[int]:
    """The ``id`` of each parameter that the graph of ``output`` reaches."""
    found: set[int] = set()
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))  # AccumulateGrad, the leaf of a graph, holds a parameter
            nodes.extend(following for following, _ in node.next_functions)
    return found


def stop_unused(model: nn.Module, output: Tensor) -> None:
    """Turn gradients off for the parameters that ``output`` does not depend on.

    Norms and layers of a dropped head, mask tokens: DistributedDataParallel would wait for their gradients in vain.
    """
    used = reached(output)
    for parameter in model.parameters() if output.requires_grad else ():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in used)


def layout_of(
    model: nn.Module, output: Tensor, size: tuple[int, int], name: str, layout: str | None, prefix_tokens: int | None
) -> tuple[str, Tokens]:
    """The layout that is wanted, or that the model declares (``output_fmt``: text or timm's Format), and its tokens.

    Raises:
        InputError: it is no key of ``LAYOUTS``.
    """
    declared = getattr(model, "output_fmt", "NCHW")
    layout = layout or ("NLC" if output.ndim == 3 else str(getattr(declared, "value", declared)))
    if layout not in LAYOUTS:
        raise InputError(f"{name} has an unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}; give layout=")
    prefix = getattr(model, "num_prefix_tokens", 0) if prefix_tokens is None else prefix_tokens
    return layout, Tokens(prefix, _token_stride(model, output, size, prefix))


def _token_stride(model: nn.Module, output: Tensor, size: tuple[int, int], prefix: int) -> tuple[float, float]:
    """Pixels of one cell: what the model declares, or a patch doubled in each stage; else cells as square as can be."""
    if output.ndim != 3:
        return Tokens().stride
    length = output.shape[1] - prefix
    patch = _pair(getattr(getattr(model, "patch_embed", model), "patch_size", None))
    stages = getattr(model, "feature_info", None)
    last = stages[-1].get("reduction") if isinstance(stages, list) and stages else None
    if last:  # timm declares the reduction of the last stage; patch_size may be the first stage's alone
        strides = [patch, _pair(last)]
    else:
        doubled = [(patch[0] * 2**stage, patch[1] * 2**stage) for stage in range(MOST_STAGES)]
        strides = [*doubled, _pair(math.sqrt(size[0] * size[1] / max(length, 1)))]
    strides = [stride for stride in strides if min(stride) > 0]
    return next((stride for stride in strides if _token_grid(length, size, stride)), strides[-1])


def _pair(stride: Any) -> tuple[float, float]:
    """(vertical, horizontal) of a number or a pair; zeros for what is neither."""
    pair = tuple(stride) if isinstance(stride, (list, tuple)) else (stride, stride)
    return pair if len(pair) == 2 and all(isinstance(step, (int, float)) for step in pair) else (0.0, 0.0)


def _token_grid(length: int, size: tuple[int, int], stride: tuple[float, float]) -> tuple[int, int] | None:
    """The grid of ``length`` cells; models that pad a last, partial cell round up, the others down."""
    exact = [round(pixels / step, 6) for pixels, step in zip(size, stride, strict=True)]
    grids = ((whole(exact[0]), whole(exact[1])) for whole in (math.floor, math.ceil))
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
