"""Modes, gradients, random states and the loader's own state, preserved over a pass that leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
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


def _generators(loader: Any) -> Iterator[torch.Generator]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    for owner in (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)):
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            yield generator
