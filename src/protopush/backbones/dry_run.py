"""One run of a model on a black image tells what comes out of it, and which parameters that depends on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from protopush.errors import InputError, first_line
from protopush.preserve_state import preserve_state


def features_of(model: nn.Module, images: Tensor) -> Tensor:
    """``model.forward_features(images)``, or ``model(images)`` where it has none."""
    extract: Callable[[Tensor], Tensor] = getattr(model, "forward_features", model)
    return extract(images)


def probe(model: nn.Module, size: tuple[int, int], name: str, with_graph: bool) -> Tensor:
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
            output = features_of(model, image)
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
