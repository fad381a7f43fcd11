"""A push inside somebody's DDP training: every rank ends with the prototypes of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from conftest import ToyNet
from protopush import push_prototypes


def model_and_data() -> tuple[ToyNet, TensorDataset]:
    torch.manual_seed(0)
    return ToyNet(3, 4, channels=6, dim=8), TensorDataset(torch.randn(31, 6, 5, 5), torch.arange(31) % 3)


def rank_main(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model, data = model_and_data()
    wrapped = DistributedDataParallel(model)
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, world, rank, shuffle=True))
    report = push_prototypes(wrapped, loader, "cpu", momentum=0.9)
    torch.save(
        (model.head.proto_manager.prototypes.data, [(r.anchor.sample_id, r.anchor.cell) for r in report.prototypes]),
        Path(folder) / f"rank{rank}.pt",
    )
    distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_end_with_the_prototypes_of_one_process(tmp_path):
    multiprocessing.spawn(rank_main, (2, str(tmp_path)), nprocs=2)
    model, data = model_and_data()
    report = model.push_prototypes(DataLoader(data, 4), "cpu", momentum=0.9)
    expected = [(r.anchor.sample_id, r.anchor.cell) for r in report.prototypes]
    for rank in range(2):
        prototypes, anchors = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        assert [tuple(anchor) for anchor in anchors] == expected
        assert torch.equal(prototypes, model.head.proto_manager.prototypes.data)
