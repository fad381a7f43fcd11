"""Loop over images: batches through a model in eval mode, for all that reads outputs and trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from protopush.preserve_state import preserve_state


@contextmanager
def iterate_outputs(
    model: nn.Module,
    loader: Iterable[Any],
    device: torch.device | str,
    advance: Callable[[int], None] = lambda _: None,
    call: Callable[..., Any] | None = None,
) -> Iterator[Iterator[tuple[Any, ...]]]:
    """For each batch, what the model makes of its images, and what else the loader yields.

    Inside the ``with`` the model is in eval mode, without gradients; after it, modes and random states are as before.

    Args:
        model: images (B, 3, H, W) to an output.
        loader: yields ``(images, ...)``.
        device: of the model.
        advance: called with the number of images done (a progress bar's step).
        call: a part of the model that is called instead, such as its backbone.

    Yields:
        ``(output, ...)`` of each batch.

    Example:
        >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1]))]
        >>> with iterate_outputs(nn.Dropout(0.5), batches, "cpu") as outputs:
        ...     [(output.shape, labels.tolist()) for output, labels in outputs]
        [(torch.Size([2, 3]), [0, 1])]
    """

    def outputs() -> Iterator[tuple[Any, ...]]:
        for images, *rest in loader:
            yield ((call or model)(images.to(device)), *rest)
            advance(len(images))

    with preserve_state(model):
        yield outputs()
