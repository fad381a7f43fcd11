"""The guard: a harmful push is taken back to the last bit, a costly one is softened, and both are told."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from protopush import HeadOptimal, ProtoModel
from protopush.backbones.create import Features
from protopush.data.regions import Regions
from protopush.errors import InputError
from protopush.metrics.classification import classification_metrics
from protopush.push.guard import guarded


class Cells(nn.Module):
    """A backbone that hands its images on as patches."""

    def forward(self, images):
        patches = images.flatten(2).transpose(1, 2)
        return Features(
            patches.mean(1, keepdim=True), patches, Regions.grid(tuple(images.shape[-2:]), tuple(images.shape[-2:]))
        )


def striped(count: int, seed: int) -> TensorDataset:
    """Two classes, told by the direction of one patch among noise."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.3 * torch.randn(count, 4, 3, 3, generator=generator)
    labels = torch.arange(count) % 2
    images[torch.arange(count), labels, 1, 1] += 3.0
    return TensorDataset(images, labels)


def pure(count: int, seed: int, wrong: bool = False) -> DataLoader:
    """Every patch is one of its class's direction - or, under the wrong label, of the other's."""
    images = 0.1 * torch.randn(count, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 2
    images[torch.arange(count), 1 - labels if wrong else labels] += 3.0
    return DataLoader(TensorDataset(images, labels), batch_size=7, shuffle=True)


@pytest.fixture
def model() -> ProtoModel:
    """A model that is right: its prototypes are the directions, seen through the identity."""
    head = HeadOptimal(4, 2, num_prototypes=1, embed_dim=4, dropout=0.5)
    head.proj = nn.Sequential(nn.Identity(), nn.Dropout(0.5))
    head.proto_manager.prototypes.data = torch.eye(4)[:2].clone()
    return ProtoModel(Cells(), head)


@pytest.fixture
def val() -> DataLoader:
    return DataLoader(striped(40, seed=1), batch_size=7)


@pytest.fixture
def harmful() -> DataLoader:
    """A push onto these turns every prediction round."""
    return pure(40, seed=2, wrong=True)


def scores(model, loader):
    model.eval()
    with torch.no_grad():
        parts = [(model(images).logits.softmax(1), labels) for images, labels in loader]
    probabilities, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return classification_metrics(probabilities, labels, ["a", "b"])


def test_a_harmful_push_is_rolled_back_to_the_last_bit(model, harmful, val, caplog):
    manager = model.head.proto_manager
    optimizer = torch.optim.Adam(model.parameters())
    model(next(iter(val))[0]).logits.sum().backward()
    optimizer.step()
    moments = optimizer.state[manager.prototypes]["exp_avg"].clone()
    before, anchors = manager.prototypes.detach().clone(), list(manager.anchors)
    measured = scores(model, val)
    with caplog.at_level(logging.INFO):
        report = model.push_prototypes(
            harmful, "cpu", momentum=0.0, guard="rollback", val_loader=val, optimizer=optimizer
        )
    assert torch.equal(manager.prototypes, before)
    assert torch.equal(optimizer.state[manager.prototypes]["exp_avg"], moments)
    assert manager.anchors == anchors
    decision = report.guard
    assert decision.action == "rolled back"
    assert decision.cost > 0.5
    assert decision.before["balanced_accuracy"] == pytest.approx(measured["balanced_accuracy"])
    assert decision.before["auroc"] == pytest.approx(measured["auroc"])
    assert decision.before["ece"] == pytest.approx(measured["ece"], abs=1e-5)
    assert decision.after == decision.before
    assert report.momentum == 1.0
    assert all(p.distance_after == p.distance_before for p in report.prototypes)
    assert "rolled back: prototypes are as before" in caplog.text
    assert "rolled back" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["guard"]["action"] == "rolled back"


def test_a_push_that_costs_nothing_is_kept(model, val):
    before = model.head.proto_manager.prototypes.detach().clone()
    report = model.push_prototypes(DataLoader(striped(40, 3), 8), "cpu", guard="rollback", val_loader=val)
    assert report.guard.action == "kept"
    assert report.momentum == 0.9
    assert not torch.equal(model.head.proto_manager.prototypes, before)
    assert report.guard.after["balanced_accuracy"] == pytest.approx(scores(model, val)["balanced_accuracy"])


def test_report_only_looks(model, harmful, val):
    report = model.push_prototypes(harmful, "cpu", momentum=0.0, val_loader=val)  # "report" is the default then
    assert report.guard.guard == "report"
    assert report.guard.action == "kept"
    assert report.guard.cost > 0.5
    assert report.guard.after["balanced_accuracy"] == pytest.approx(scores(model, val)["balanced_accuracy"])
    assert all(p.anchor.similarity_after == pytest.approx(1.0) for p in report.prototypes)


@pytest.mark.parametrize("budget", [0.0, 0.05, 0.2])
def test_the_budget_finds_a_momentum_within_it(model, harmful, val, budget):
    before = model.head.proto_manager.prototypes.detach().clone()
    measured = scores(model, val)
    report = model.push_prototypes(harmful, "cpu", momentum=0.0, guard="budget", guard_budget=budget, val_loader=val)
    decision = report.guard
    assert decision.action == "momentum raised"
    assert 0.0 < decision.momentum < 1.0
    after = scores(model, val)
    cost = max(measured[name] - after[name] for name in ("balanced_accuracy", "auroc"))
    assert cost <= budget + 1e-9
    assert decision.after["auroc"] == pytest.approx(after["auroc"])
    # Beside it lies a momentum that costs too much.
    costs = dict(decision.tried)
    beyond = [m for m, cost in costs.items() if cost > budget]
    assert decision.momentum - max(beyond) == pytest.approx(1 / 256)
    assert not torch.equal(model.head.proto_manager.prototypes, before)


def test_bisection_against_a_scan():
    """Costs that rise as the momentum falls: the momentum found is the smallest allowed one, to 1/256."""
    for limit in (0.013, 0.3, 0.77, 0.999):
        state = {"m": 1.0}

        def place(m, state=state):
            state["m"] = m

        def score(state=state, limit=limit):
            return {"balanced_accuracy": 0.9 - 0.1 * (state["m"] < limit), "auroc": None, "ece": 0.0}

        decision = guarded("budget", 0.05, 0.0, place, score)
        assert limit <= decision.momentum <= limit + 1 / 256
        assert decision.action == ("momentum raised" if decision.momentum < 1 else "rolled back")


def test_any_model_is_guarded_by_its_own_forward(toy, val, harmful):
    class Classifier(toy):
        def forward(self, images):
            _, patches = self.extract_features(images)
            prototypes = self.head.proto_manager.unit()
            return torch.einsum("bld,ckd->blck", patches, prototypes).amax(dim=(1, 3))

    model = Classifier(2, 1, channels=4)
    model.head.proto_manager.prototypes.data = torch.eye(4)[:2].clone()
    before = model.head.proto_manager.prototypes.detach().clone()
    report = model.push_prototypes(harmful, "cpu", momentum=0.0, guard="rollback", val_loader=val)
    assert report.guard.before["balanced_accuracy"] == 1.0
    assert report.guard.action == "rolled back"
    assert torch.equal(model.head.proto_manager.prototypes, before)


def test_live_anchors_are_rolled_back_with_their_features(harmful, val):
    torch.manual_seed(0)
    model = ProtoModel(Cells(), HeadOptimal(4, 2, num_prototypes=2, embed_dim=4, anchoring="live"))
    model.push_prototypes(pure(40, seed=4), "cpu")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    harmless = scores(model, val)
    report = model.push_prototypes(harmful, "cpu", guard="rollback", guard_budget=0.0, val_loader=val)
    assert harmless["balanced_accuracy"] > 0.8
    assert report.guard.action == "rolled back"
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_validation_that_fails_changes_nothing(model, harmful):
    before = model.head.proto_manager.prototypes.detach().clone()
    with pytest.raises(InputError, match="the val_loader yields no batch"):
        model.push_prototypes(harmful, "cpu", guard="report", val_loader=[])
    images, labels = striped(8, 0).tensors
    with pytest.raises(InputError, match="label 5"):
        model.push_prototypes(
            harmful, "cpu", guard="report", val_loader=DataLoader(TensorDataset(images, labels + 5), 4)
        )
    assert torch.equal(model.head.proto_manager.prototypes, before)


@pytest.mark.parametrize(("options", "message"), [
    ({"guard": "on"}, "guard is 'on'; expected one of: off, report, rollback, budget"),
    ({"guard": "report"}, "guard 'report' needs a val_loader"),
    ({"guard": "rollback", "guard_budget": -1.0, "val_loader": []}, "guard_budget is -1.0"),
    ({"guard": "rollback", "guard_budget": float("nan"), "val_loader": []}, "guard_budget is nan"),
    ({"interpolation": "cubic"}, "interpolation is 'cubic'; expected one of: linear, slerp"),
])  # fmt: skip
def test_wrong_words_are_refused_before_anything_is_read(model, options, message):
    class Unread:
        def __iter__(self):
            raise AssertionError("was read")

    with pytest.raises(InputError, match=message):
        model.push_prototypes(Unread(), "cpu", **options)
