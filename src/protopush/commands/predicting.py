"""What predicts: ``protopush predict``."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from protopush.commands.opening import data_of
from protopush.distributed import rank_and_size, together
from protopush.predicting.predict import predict
from protopush.training.config import DataConfig
from protopush.training.launch import make_fabric, quiet
from protopush.training.run import open_run


def predict_files(options: Namespace) -> dict[str, Any]:
    """A CSV of predictions, in as many processes as torchrun started; returns its summary."""
    fabric = make_fabric(options.device)
    with quiet():
        fabric.launch()
    # What is wrong with the run, one process says.
    run = together(lambda: open_run(options.run) if rank_and_size()[0] == 0 else None) or open_run(options.run)
    run.model.to(fabric.device)
    return predict(
        run,
        options.paths,
        options.out,
        top=options.top,
        threshold=options.threshold,
        share=options.share,
        data=DataConfig(**data_of(run, options)),
        device=fabric.device,
        num_workers=options.data.num_workers,
        overwrite=options.overwrite,
    )
