"""Passes over images that leave no trace: modes, gradients, random states and the loader's own state are preserved."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


@contextmanager
def preserve_state(model: nn.Module, *loaders: Any) -> Iterator[None]:
    """Evaluate a model without gradients, then put back every mode and random state, also after an error.

    Random states are seeded inside, so that what happens there is the same each time.
    """
    modes = [(module, module.training) for module in model.modules()]
    generators = {id(g): g for loader in loaders for g in _generators(loader)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 (other people's datasets use it)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            model.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for generator, state in states:
            generator.set_state(state)
        for module, mode in modes:
            module.training = mode


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


def _generators(loader: Any) -> Iterator[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
