"""Run opened again: its folder, its images, each checked, and the devices and processes that it works on."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from protopush._compat import ensure_torchvision
from protopush.data.dataset import ImageDataset
from protopush.data.files import read_json
from protopush.data.images import check_images, sha256_of
from protopush.data.manifest import Catalog, DataConfig, Sample, without_images
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError, first_line, listing
from protopush.models.model import ProtoModel
from protopush.models.model_folder import Run, read_run
from protopush.runs.progress import bar
from protopush.runs.split_record import never_trained, open_catalog

if TYPE_CHECKING:
    from lightning_fabric import Fabric

logger = logging.getLogger("protopush.runs")

# How long a process waits for the others: one of them computes features, which takes hours where images are many.
PATIENCE = timedelta(hours=12)


def open_run(folder: str | Path, backbone: nn.Module | None = None, check_weights: bool = True) -> Run:
    """Reopen a run folder.

    Args:
        folder: as ``protopush train --out`` wrote it.
        backbone: the module itself, where it is one of your own, which no name could build again.
        check_weights: refuse weights other than those that the run saved; False: for who reports what no longer holds.

    Raises:
        InputError: a file is missing or damaged, or of a newer format.
    """
    return read_run(folder, ProtoModel, backbone, check_weights)


def load(folder: str | Path, backbone: nn.Module | None = None) -> ProtoModel:
    """The model of a run folder, in eval mode, with ``class_names``; the rest is as in :func:`open_run`."""
    return open_run(folder, backbone).model


def same_weights(folder: Path) -> bool:
    """Whether a run's weights are those that its ``config.json`` and ``prototypes.json`` were written for."""
    recorded = [read_json(folder / name).get("weights_sha256") for name in ("config.json", "prototypes.json")]
    return recorded == [sha256_of(folder / "model.safetensors")] * 2


def make_fabric(device: str, precision: str = "32-true", devices: int = 1, num_nodes: int = 1) -> Fabric:
    """Lightning Fabric on one device or several, if they are there; under torchrun, on as many as it has processes."""
    ensure_torchvision()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    with quiet():
        from lightning_fabric import Fabric
        from lightning_fabric.strategies.ddp import DDPStrategy

        strategy = DDPStrategy(timeout=PATIENCE) if devices * num_nodes > 1 else "auto"
        try:
            return Fabric(
                accelerator=device, devices=devices, num_nodes=num_nodes, precision=precision, strategy=strategy  # type: ignore[arg-type]
            )  # fmt: skip
        except Exception as error:
            raise InputError(
                f"cannot run on device {device!r} ({devices} of {num_nodes} nodes) with {precision} "
                f"({first_line(error)}); try --trainer.device cpu"
            ) from error


def join_processes(device: str, launch: bool = False) -> torch.device:
    """The device of this process: its own among those that torchrun started, which it joins if asked to ``launch``.

    Alone it needs no Fabric, whose import takes longer than an explanation.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        fabric = make_fabric(device)
        if launch:
            with quiet():
                fabric.launch()
        return fabric.device
    there = {"mps": torch.backends.mps.is_available(), "cuda": torch.cuda.device_count() > 0, "cpu": True}
    name = next(name for name, found in there.items() if found) if device == "auto" else device
    if not there.get(name):
        known = listing(["auto", *(name for name, found in there.items() if found)])
        raise InputError(f"cannot run on device {device!r}; expected one of those that are here: {known}")
    return torch.device(name) if name == "cpu" else torch.device(name, 0)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Fabric and its imports give about other people's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def open_split(
    data: DataConfig, split: str, class_names: list[str], transform: EvalTransform, folder: Path
) -> tuple[ImageDataset, Catalog]:
    """One split of a source for the model of the run in ``folder``, each of its images checked.

    An image has the split that it had in training; none that was trained on is validated or tested on.

    Raises:
        InputError: unknown labels, unreadable images, an empty split.
    """
    catalog = open_catalog(data, class_names, folder)
    samples = catalog.split(split)
    if absent := without_images(samples, catalog.classes):
        logger.warning("no images of %s in split %r: means are over the other classes", listing(absent), split)
    hashes = check_samples(samples, data.max_megapixels)
    return ImageDataset(never_trained(samples, hashes, folder, split), transform), catalog


def check_samples(samples: Sequence[Sample], max_megapixels: float) -> dict[str, str]:
    """Decode every image once, if it is not too large; its SHA-256 by its name."""
    with bar("Checking images", len(samples)) as advance:
        digests = check_images([sample.image for sample in samples], lambda: advance(1), max_megapixels)
    return {sample.name: digest for sample, digest in zip(samples, digests, strict=True)}
