"""A push in one, two and three processes: to the index, and to the last bit, the same."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from forked import torchrun
from helpers import ToyNet, start_ranks
from protopush import HeadOptimal, ProtoModel, push_prototypes, refresh_anchors
from protopush.backbones.create import Features
from protopush.data.regions import Regions
from protopush.errors import InputError

COUNT = 31  # divides by nothing


def model_and_data() -> tuple[ToyNet, TensorDataset]:
    torch.manual_seed(0)
    patches = torch.randn(COUNT, 6, 5, 5)
    patches[20:25] = patches[:5]  # ties between the shards
    return ToyNet(3, 4, channels=6, dim=8), TensorDataset(patches, torch.arange(COUNT) % 3)


class Grouped(TensorDataset):
    """Tells its groups, two images in each."""

    @property
    def groups(self) -> list[str]:
        return [str(i // 2) for i in range(len(self))]


class Stream(IterableDataset):
    """A shard of named samples, as WebDataset makes them."""

    def __init__(self, data: TensorDataset, rank: int, world: int) -> None:
        self.data, self.rank, self.world = data, rank, world

    def __iter__(self):
        for i in range(self.rank, len(self.data), self.world):
            yield (*self.data[i], f"sample{i:03d}")


class Cells(nn.Module):
    """A backbone of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 7)

    def forward(self, images):
        patches = self.layer(images.flatten(2).transpose(1, 2))
        return Features(patches.mean(1, keepdim=True), patches, Regions.grid((5, 5), (5, 5)))


def told(report) -> list[tuple[object, ...]]:
    return [(r.anchor.sample_id, r.anchor.cell, r.choice, r.anchor.runner_up) for r in report.prototypes]


def case(name: str, rank: int, world: int):
    """What this rank ends with: prototypes, anchors, counts."""
    model, data = model_and_data()
    sampler = DistributedSampler(data, world, rank, shuffle=True)
    loader = DataLoader(data, 4, sampler=sampler)
    if name == "local":
        report = push_prototypes(model, loader, "cpu")
    elif name == "wrapped in DDP":
        wrapped = DistributedDataParallel(model) if distributed.is_initialized() else model
        report = push_prototypes(wrapped, loader, "cpu", use_local=False)
    elif name in ("patch", "image"):
        report = push_prototypes(model, loader, "cpu", unique=name, momentum=0.0)
    elif name == "group":
        report = push_prototypes(model, DataLoader(Grouped(*data.tensors), 4), "cpu", unique="group")
    elif name == "capped":
        report = push_prototypes(model, loader, "cpu", max_patches_per_class=140)
    elif name == "stream":
        report = push_prototypes(model, DataLoader(Stream(data, rank, world), 4), "cpu", unique="image")
    elif name == "one batch":
        report = push_prototypes(model, DataLoader(data, 64), "cpu")
    elif name == "own shards":
        parts = torch.utils.data.SubsetRandomSampler(list(range(rank, COUNT, world)))
        report = push_prototypes(model, DataLoader(data, 4, sampler=parts), "cpu")
    elif name == "guard":
        model = ProtoModel(Cells(), HeadOptimal(7, 3, 4, 8, anchoring="off"))
        report = push_prototypes(
            model, loader, "cpu", momentum=0.0, guard="budget", guard_budget=0.0, val_loader=loader
        )
        return model.head.proto_manager.prototypes.data, told(report), [vars(report.guard)]
    else:
        assert name == "live"
        model = ProtoModel(Cells(), HeadOptimal(7, 3, 4, 8, anchoring="live"))
        report = push_prototypes(model, loader, "cpu", unique="image")
        with torch.no_grad():
            model.backbone.layer.weight.mul_(1.5).add_(0.1)
        refresh_anchors(model, loader, "cpu")
        return model.state_dict()["head.proto_manager.prototypes"], told(report), []
    return model.head.proto_manager.prototypes.data, told(report), [report.patches_per_class, report.images_per_class]


CASES = (
    "local", "wrapped in DDP", "patch", "image", "group", "capped", "stream", "one batch", "own shards", "guard",
    "live",
)  # fmt: skip


def errors(rank: int, world: int) -> list[str]:
    """What goes wrong on one rank goes wrong on all of them, in words."""
    found = []
    model, data = model_and_data()
    spoilt = TensorDataset(data.tensors[0].clone(), data.tensors[1])
    if rank == world - 1:
        spoilt.tensors[0][4 * rank + 1, 0, 2, 2] = torch.nan
    for loader in (
        DataLoader(spoilt, 4),
        DataLoader(Subset(data, range(rank, COUNT, world)), 4),
        DataLoader(
            Stream(data, rank, world), 4, collate_fn=lambda items: (torch.stack([i[0] for i in items]), "labels")
        ),
    ):
        before = model.head.proto_manager.prototypes.detach().clone()
        try:
            push_prototypes(model, loader, "cpu")
        except (InputError, TypeError) as error:
            found.append(str(error))
        assert torch.equal(model.head.proto_manager.prototypes, before)
    return found


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {name: case(name, rank, world) for name in CASES}
    torch.save((found, errors(rank, world) if world > 1 else []), Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


def equal_to_the_bit(found, alone) -> bool:
    return found[1] == alone[1] and torch.equal(found[0], alone[0])


def equal_to_the_index(found, alone) -> bool:
    """A stream is cut into other batches by another number of ranks, and a forward pass rounds by batch."""
    indices = [[anchor[:3] for anchor in end[1]] for end in (found, alone)]
    return indices[0] == indices[1] and torch.allclose(found[0], alone[0], atol=1e-6)


@pytest.mark.ddp
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_end_with_the_anchors_and_the_very_bits_of_one_process(tmp_path, world):
    start_ranks(rank_main, world, tmp_path)
    alone = {name: case(name, 0, 1) for name in CASES}
    messages = []
    for rank in range(world):
        found, failures = torch.load(tmp_path / f"rank{rank}.pt", weights_only=False)
        messages.append(failures)
        for name in CASES:
            same = equal_to_the_index if name == "stream" else equal_to_the_bit
            assert same(found[name], alone[name]), name
            assert found[name][2] == alone[name][2], name
    if world > 1:
        assert len({tuple(told) for told in messages}) == 1
        bad, different, labels = messages[0]
        assert f"NaN or infinite features in 1 samples: {4 * (world - 1) + 1};" in bad
        assert "different datasets" in different
        assert "labels" in labels or "str" in labels


@pytest.mark.ddp
def test_torchrun_and_fabric(tmp_path, monkeypatch):
    script = Path(__file__).parents[1] / "scripts" / "push_with_fabric.py"
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "1"), "1"])
    runpy.run_path(str(script), run_name="__main__")
    done = torchrun(script, tmp_path / "2", 2)
    assert done.returncode == 0, done.stderr
    ends = [torch.load(tmp_path / name, weights_only=True) for name in ("1/0.pt", "2/0.pt", "2/1.pt")]
    for prototypes, anchors in ends[1:]:
        assert anchors == ends[0][1]
        assert torch.equal(prototypes, ends[0][0])
