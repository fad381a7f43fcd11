"""Runs and their data, as a command's options name them."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from protopush.data.dataset import ImageDataset
from protopush.data.features import inference_batch_size
from protopush.data.manifest import Catalog
from protopush.training.config import DataConfig
from protopush.training.launch import make_fabric
from protopush.training.prepare import open_split
from protopush.training.run import Run, open_run


def open_with(options: Namespace, check_weights: bool = True) -> tuple[Run, torch.device]:
    """The run, its model on the device."""
    run = open_run(options.run, check_weights=check_weights)
    device = make_fabric(options.device).device
    run.model.to(device)
    return run, device


def data_of(run: Run, options: Namespace) -> dict[str, Any]:
    """The run's own data, or what the options say."""
    if options.data.path is None and options.data.source is None:
        return run.data
    source = options.data.source or ("auto" if options.data.path else run.data["source"])
    path = os.path.abspath(options.data.path) if options.data.path else ""
    return run.data | {"path": path, "source": source}


def split_of(run: Run, options: Namespace) -> tuple[ImageDataset, Catalog]:
    """The images of the split that was asked for."""
    data = DataConfig(**data_of(run, options))
    return open_split(data, options.data.split, run.class_names, run.transform)


def loader_of(dataset: ImageDataset, options: Namespace, device: torch.device) -> DataLoader[Any]:
    """Images in order, in batches for inference."""
    return DataLoader(dataset, batch_size=inference_batch_size(device), num_workers=options.data.num_workers)
