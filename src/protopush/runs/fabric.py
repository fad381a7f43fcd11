"""Lightning Fabric: the devices and processes of a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from protopush._compat import ensure_torchvision
from protopush.errors import InputError, first_line

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# How long a process waits for the others: one of them computes features, which takes hours where images are many.
PATIENCE = timedelta(hours=12)


def make_fabric(device: str, precision: str = "32-true", devices: int = 1, num_nodes: int = 1) -> Fabric:
    """Lightning Fabric on one device or several; under torchrun, on as many as it started processes.

    Raises:
        InputError: the devices aren't there.
    """
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


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that Fabric and its imports give about other people's settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
