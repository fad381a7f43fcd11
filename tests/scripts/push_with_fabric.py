"""Push under Lightning Fabric, in as many processes as torchrun started; each writes what it ended with."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from protopush import HeadOptimal, ProtoModel, create_backbone
from protopush._compat import ensure_torchvision


def main(folder: str, devices: str) -> None:
    ensure_torchvision()
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=int(devices), strategy="ddp" if devices != "1" else "auto")
    fabric.launch()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False)
    model = ProtoModel(backbone, HeadOptimal(backbone.channels, 2, num_prototypes=3, embed_dim=8))
    data = TensorDataset(torch.randn(11, 3, 64, 64), torch.arange(11) % 2)
    _, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-4))
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=2, shuffle=True))
    report = model.push_prototypes(loader, fabric.device, unique="image", optimizer=optimizer, momentum=0.0)
    anchors = [(p.anchor.sample_id, p.anchor.cell) for p in report.prototypes]
    torch.save((model.head.proto_manager.prototypes.data, anchors), Path(folder) / f"{fabric.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
