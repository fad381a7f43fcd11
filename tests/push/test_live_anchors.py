"""Live anchors: prototypes are the embeddings of real patches at every step, and what is saved is exact."""

from __future__ import annotations

import json

import pytest
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from helpers import make_images
from protopush import HeadOptimal, ProtoModel, push_prototypes, refresh_anchors
from protopush.backbones.create import Features
from protopush.cli import main
from protopush.data.regions import Regions
from protopush.errors import InputError
from protopush.nn.losses import PrototypeLoss
from protopush.runs.run import open_run


class Cells(nn.Module):
    """A backbone of one linear layer: exact enough to compare with by hand, and able to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)

    def forward(self, images):
        patches = self.layer(images.flatten(2).transpose(1, 2))
        return Features(
            patches.mean(1, keepdim=True), patches, Regions.grid(tuple(images.shape[-2:]), tuple(images.shape[-2:]))
        )


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(30, 5, 4, 3), torch.arange(30) % 3)


@pytest.fixture
def loader(data) -> DataLoader:
    return DataLoader(data, batch_size=7, shuffle=True)


def make(match: str = "local", **options) -> ProtoModel:
    return ProtoModel(Cells(), HeadOptimal(6, 3, 4, embed_dim=8, match=match, anchoring="live", **options))


def embedded_anchors(model, data) -> torch.Tensor:
    """What the prototypes should be, from the records alone, one image at a time."""
    found = []
    model.eval()
    with torch.no_grad():
        for anchor in model.head.proto_manager.anchors:
            x_fu, x_fu1 = model.extract_features(data[anchor.sample_id][0].unsqueeze(0))
            feature = x_fu[0, 0] if anchor.pooled else x_fu1[0, anchor.cell]
            found.append(F.normalize(model.head.proj(feature), dim=-1))
    return torch.stack(found)


def train_steps(model, loader, steps: int = 5, lr: float = 0.05):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    loss = PrototypeLoss(grounding=1.0, orthogonality=0.1)
    model.train()
    for _, (images, labels) in zip(range(steps), loader, strict=False):
        optimizer.zero_grad()
        loss(model(images), labels, model.head.proto_manager)[0].backward()
        optimizer.step()
    return optimizer


def test_before_the_first_push_prototypes_are_parameters(loader):
    model = make()
    assert torch.equal(model.head.prototypes(), model.head.proto_manager.unit())
    before = model.head.proto_manager.prototypes.detach().clone()
    train_steps(model, loader)
    assert not torch.allclose(model.head.proto_manager.prototypes, before)


@pytest.mark.parametrize("match", ["local", "global"])
@pytest.mark.parametrize("unique", ["none", "image"])
def test_prototypes_are_their_anchors_while_the_projection_learns(data, loader, match, unique):
    model = make(match)
    model.backbone.requires_grad_(False)
    report = model.push_prototypes(loader, "cpu", use_local=match == "local", unique=unique)
    assert all(p.anchor.similarity_after == pytest.approx(1.0, abs=1e-6) for p in report.prototypes)
    assert report.momentum == 0.0
    first = model.head.prototypes().detach().flatten(0, 1)
    assert torch.allclose(first, embedded_anchors(model, data), atol=1e-6)
    train_steps(model, loader)
    model.eval()
    moved = model.head.prototypes().detach().flatten(0, 1)
    assert (moved - first).abs().max() > 1e-2  # the projection has learned
    assert torch.allclose(moved, embedded_anchors(model, data), atol=1e-6)
    assert torch.allclose(model(data.tensors[0]).prototypes.flatten(0, 1), moved)
    saved = model.state_dict()["head.proto_manager.prototypes"]
    assert torch.allclose(saved, moved, atol=1e-6)


def test_the_projection_learns_through_the_prototypes(data, loader):
    model = make()
    model.push_prototypes(loader, "cpu")
    model.head.prototypes().square().sum().backward(retain_graph=True)
    model.zero_grad()
    out = model.head.prototypes()[0, 0, 0]
    out.backward()
    assert model.head.proj[0].weight.grad.abs().sum() > 0
    assert model.head.proto_manager.prototypes.grad.abs().sum() == 0  # takes part (DDP), and is not moved


def test_a_training_backbone_is_caught_up_with_by_a_refresh(data, loader):
    model = make()
    model.push_prototypes(loader, "cpu", unique="image")
    train_steps(model, loader)
    stale = (model.head.prototypes().flatten(0, 1) - embedded_anchors(model, data)).abs().max()
    assert stale > 1e-3
    modes = {name: module.training for name, module in model.train().named_modules()}
    count = refresh_anchors(model, loader, "cpu")
    assert count == len({a.sample_id for a in model.head.proto_manager.anchors})
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.allclose(model.head.prototypes().flatten(0, 1), embedded_anchors(model, data), atol=1e-6)
    assert all(anchor.similarity_after == 1.0 for anchor in model.head.proto_manager.anchors)


def test_state_dict_goes_round(data, loader):
    model = make()
    optimizer = train_steps(model, loader)
    model.push_prototypes(loader, "cpu", optimizer=optimizer)
    moments = optimizer.state[model.head.proto_manager.prototypes]["exp_avg"]
    assert moments.abs().sum() == 0
    train_steps(model, loader)
    other = make()
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    images = data.tensors[0]
    assert torch.equal(other(images).logits, model(images).logits)
    assert torch.equal(other.head.proto_manager.anchor_ids, model.head.proto_manager.anchor_ids)
    off = ProtoModel(Cells(), HeadOptimal(6, 3, 4, embed_dim=8))
    assert not [key for key in off.state_dict() if "anchor" in key]


@pytest.mark.ddp
def test_every_parameter_takes_part_under_ddp(tmp_path, loader):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = make(dropout=0.0)
        wrapped = DistributedDataParallel(model)
        push_prototypes(wrapped, loader, "cpu")
        for images, labels in loader:  # an unused parameter would be an error in the second step
            loss = PrototypeLoss(grounding=1.0)(wrapped(images), labels, model.head.proto_manager)[0]
            loss.backward()
    finally:
        distributed.destroy_process_group()


def test_only_looking_changes_nothing(loader):
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.push_prototypes(loader, "cpu", momentum=1.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_cannot_be_refreshed_is_refused(data, loader):
    with pytest.raises(InputError, match="anchors are not live"):
        refresh_anchors(ProtoModel(Cells(), HeadOptimal(6, 3)), loader, "cpu")
    model = make()
    assert refresh_anchors(model, loader, "cpu") == 0
    with pytest.raises(InputError, match="the loader is a stream"):
        refresh_anchors(model, [(data.tensors[0], data.tensors[1])], "cpu")
    with pytest.raises(InputError, match="guard 'budget' searches for a momentum, but live anchors have none"):
        push_prototypes(model, loader, "cpu", guard="budget", val_loader=loader)
    with pytest.raises(InputError, match="anchoring='on'; expected 'off' or 'live'"):
        HeadOptimal(6, 3, anchoring="on")


@pytest.mark.parametrize("freeze", [True, False])
def test_a_run_with_live_anchors_is_exact_and_verified(tmp_path, capsys, freeze):
    images = make_images(tmp_path / "images", ["bird", "cat", "dog"], 10)
    words = [
        "train", "--data.path", str(images), "--out", str(tmp_path / "run"), "--model.backbone", "test_resnet",
        "--model.pretrained", "false", "--model.num_prototypes", "3", "--train.epochs", "3", "--train.batch_size", "8",
        "--train.freeze_backbone", str(freeze).lower(), "--push.anchoring", "live", "--push.start_epoch", "0",
        "--push.interval", "2", "--push.unique", "image", "--push.anchor_refresh", "2", "--push.guard", "report",
        "--data.num_workers", "0", "--trainer.cache_dir", str(tmp_path / "cache"),
    ]  # fmt: skip
    assert main(words) == 0
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "run"), "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["anchors"]
    assert len(checks) == 9
    assert all(abs(1.0 - check["measured"]) < 1e-5 for check in checks)
    run = open_run(tmp_path / "run")
    assert run.head.anchoring == "live"
    assert len({a.file for a in run.head.proto_manager.anchors[:3]}) == 3
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["push"] for row in rows if "push" in row] == [0, 2]
    assert [row["guard"]["guard"] for row in rows if "guard" in row] == ["report", "report"]
    assert rows[-1]["final"] == "live"


@pytest.mark.parametrize("anchoring", ["off", "live"])
def test_exports_in_both_modes(data, loader, anchoring):
    model = ProtoModel(Cells(), HeadOptimal(6, 3, 4, embed_dim=8, anchoring=anchoring))
    model.push_prototypes(loader, "cpu", momentum=0.5)
    model.eval()
    images = data.tensors[0][:5]
    program = torch.export.export(model, (images,))
    assert torch.allclose(program.module()(images).logits, model(images).logits, atol=1e-6)
