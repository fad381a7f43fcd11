"""Processes that wait for the word, push together, and tell how long it took."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from measuring import synchronize
from ready_maps import labelled, training_loader
from torch import distributed

from protopush import ProtoModel


class Work(NamedTuple):
    """What every process makes for itself: model and images come from a seed."""

    backbone: str
    images: int
    pixels: int
    classes: int
    prototypes: int
    device: str = "cpu"


class Team:
    """One process, or several that form a group: of gloo, or of NCCL with a GPU each."""

    def __init__(self, lines: list[Connection]) -> None:
        self.lines = lines

    def push(self) -> float:
        """Let all push; the seconds of the slowest."""
        for line in self.lines:
            line.send("go")
        return max(line.recv() for line in self.lines)


@contextmanager
def team(size: int, work: Work) -> Iterator[Team]:
    """A team of ``size`` processes with one thread each, ready to push."""
    context = get_context("spawn")
    lines, processes = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, f"file://{folder}/meeting", work, theirs)
                process = context.Process(target=_rank, args=arguments, daemon=True)
                process.start()
                theirs.close()  # else the wait for a process that died would never end
                lines.append(ours)
                processes.append(process)
            yield Team(lines)
        finally:
            for process in processes:
                process.terminate()
                process.join()


def _rank(rank: int, size: int, meeting: str, work: Work, line: Connection) -> None:
    torch.set_num_threads(1)
    if work.device != "cpu":
        torch.cuda.set_device(rank)
    if size > 1:
        backend = "gloo" if work.device == "cpu" else "nccl"
        distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=size)
    torch.manual_seed(0)
    model = ProtoModel.create(work.backbone, work.classes, pretrained=False, num_prototypes=work.prototypes)
    model.to(work.device)
    loader = training_loader(labelled(torch.randn(work.images, 3, work.pixels, work.pixels), work.classes))
    while line.recv() == "go":
        if size > 1:
            distributed.barrier()
        started = time.perf_counter()
        model.push_prototypes(loader, work.device)
        synchronize()
        line.send(time.perf_counter() - started)
