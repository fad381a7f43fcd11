"""How a run learns: its order, its rates, its average, its steps - each against a slow or a hand-made version."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import make_images
from protopush import InputError
from protopush.backbones.create import create_backbone
from protopush.data.manifest import DataConfig
from protopush.data.transforms import Preprocessing, TrainTransform
from protopush.models.model import ProtoModel
from protopush.nn.losses import balanced_class_weights, effective_class_weights, logit_shift
from protopush.training.config import LossConfig, ModelConfig, PushConfig, RunConfig, TrainConfig, TrainerConfig
from protopush.training.optim import Ema, make_optimizer, set_rate
from protopush.training.phases import Frozen, Joint, phases
from protopush.training.setup import EpochSampler, prepare
from protopush.training.trainer import Trainer, train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))


def config(path: Path, **options) -> RunConfig:
    """A tiny ConvNeXt (layer norm, no dropout: nothing depends on how a batch is cut) with random weights."""
    made = RunConfig(
        data=DataConfig(path=str(path), num_workers=0, augment=False, allow_duplicates=True),
        model=ModelConfig(
            backbone="test_convnext", pretrained=False, num_prototypes=2, embed_dim=8, dropout=0.0, windows=None
        ),
        loss=LossConfig(class_weights="none", grounding=0.0),
        push=PushConfig(start_epoch=10**6),
        train=TrainConfig(epochs=2, batch_size=8, freeze_backbone=False, warmup_epochs=0.0),
        trainer=TrainerConfig(device="cpu"),
    )
    return replace(made, train=replace(made.train, **options))


@pytest.fixture
def images(tmp_path) -> Path:
    root = tmp_path / "images"
    for split, count in (("train", 16), ("val", 3)):
        make_images(root / split, ["bird", "cat"], count)
    return root


# -- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_share_the_batches_of_one_process(monkeypatch, size):
    import protopush.training.setup as setup

    labels, batch = [0] * 13 + [1] * 4, 3

    def read(rank: int, ranks: int) -> list[int]:
        monkeypatch.setattr(setup, "rank_and_size", lambda: (rank, ranks))
        made = EpochSampler(labels, seed=7)
        made.set_epoch(3)
        assert len(list(made)) == len(made)
        return list(made)

    alone, shared = read(0, 1), [read(rank, size) for rank in range(size)]
    assert sorted(alone) == list(range(17))
    assert len({len(part) for part in shared}) == 1
    for start in range(0, 17 // size, batch):  # whole batches
        together = sorted(i for part in shared for i in part[start : start + batch])
        assert set(together) <= set(alone)
        if (start + batch) * size <= 17:
            assert together == sorted(alone[start * size : (start + batch) * size])
    assert {i for part in shared for i in part} == set(range(17))  # nobody is left out


def test_an_epoch_has_an_order_of_its_own_and_always_the_same():
    order = EpochSampler([0] * 50, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        order.set_epoch(epoch)
        orders.append(list(order))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] == list(EpochSampler([0] * 50, seed=1))
    assert orders[0] != list(EpochSampler([0] * 50, seed=2))


def test_balanced_sampling_draws_classes_alike():
    labels = [0] * 900 + [1] * 90 + [2] * 10
    order, drawn = EpochSampler(labels, seed=0, balanced=True), np.zeros(3)
    for epoch in range(30):
        order.set_epoch(epoch)
        drawn += np.bincount(np.array(labels)[list(order)], minlength=3)
    assert drawn.sum() == 30 * 1000
    np.testing.assert_allclose(drawn / drawn.sum(), 1 / 3, atol=0.015)  # four standard deviations


# -- long tails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_class_weights_against_a_sum_over_samples(seed):
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.choice(4, size=200, p=random.dirichlet(np.ones(4))))
    beta = float(random.uniform(0.5, 0.9999))
    counts = [max(1, int((labels == c).sum())) for c in range(4)]
    effective = [sum(beta**i for i in range(n)) for n in counts]  # Cui et al., equation 2: 1 + beta + beta^2 + ...
    raw = np.array([1 / e for e in effective])
    expected = raw * 200 / (raw * counts).sum()
    np.testing.assert_allclose(effective_class_weights(labels, 4, beta), expected, rtol=1e-4)
    shares = np.array(counts) / sum(counts)
    np.testing.assert_allclose(logit_shift(labels, 4, 0.7), 0.7 * np.log(shares), rtol=1e-5)


def test_effective_weights_lie_between_none_and_inverse():
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert torch.allclose(effective_class_weights(labels, 2, 1e-9), torch.ones(2))
    assert torch.allclose(effective_class_weights(labels, 2, 1 - 1e-9), balanced_class_weights(labels, 2), rtol=1e-3)


def test_logit_adjustment_finds_the_balanced_rule():
    """One feature, two overlapping classes, 9 : 1. Trained with the shift the border is where both densities meet."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(9000), torch.randn(1000) + 2])
    labels = torch.cat([torch.zeros(9000), torch.ones(1000)]).long()
    borders = {}
    for strength in (0.0, 1.0):
        layer = nn.Linear(1, 2)
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=100)
        shift = logit_shift(labels, 2, strength)

        def step(layer=layer, optimizer=optimizer, shift=shift):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(layer(x[:, None]) + shift, labels)
            loss.backward()
            return loss

        optimizer.step(step)
        weight, bias = layer.weight[1] - layer.weight[0], layer.bias[1] - layer.bias[0]
        borders[strength] = float((-bias / weight).detach())
    assert borders[1.0] == pytest.approx(1.0, abs=0.07)  # half-way
    assert borders[0.0] == pytest.approx(1.0 + np.log(9) / 2, abs=0.07)


@pytest.mark.parametrize(("name", "value"), [
    ("class_weights", "effective"), ("class_weights", "inverse"), ("logit_adjustment", 1.0),
])  # fmt: skip
def test_the_recipe_chooses_how_rare_classes_count(tmp_path, name, value):
    root = make_images(tmp_path / "images" / "val", ["bird", "cat"], 1).parent
    make_images(root / "train", ["bird"], 12)
    make_images(root / "train", ["cat"], 4)
    made = config(root)
    setattr(made.loss, name, value)
    loss = prepare(made).loss()
    labels = torch.tensor([0] * 12 + [1] * 4)
    if name == "logit_adjustment":
        assert loss.class_weights is None
        assert torch.allclose(loss.shift, logit_shift(labels, 2))
    else:
        of = {"effective": effective_class_weights, "inverse": balanced_class_weights}[value]
        assert torch.allclose(loss.class_weights, of(labels, 2))
        assert loss.shift is None


# -- rates ---------------------------------------------------------------------------------------------------------


def test_each_part_has_its_rate_and_each_layer_its_share():
    model = ProtoModel.create("test_convnext", 2, pretrained=False)
    rates = TrainConfig(lr=1.0, backbone_lr=0.1, prototype_lr=3.0, connection_lr=0.5, layer_decay=0.5, weight_decay=0.2)
    optimizer = make_optimizer(model, rates)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert found["head.proto_manager.prototypes"] == (3.0, 0.0)
    assert found["head.connections"] == found["head.log_temperature"] == found["head.bias"] == (0.5, 0.0)
    assert found["head.proj.0.weight"] == (1.0, 0.2)
    assert found["head.proj.0.bias"] == (1.0, 0.0)
    stem = next(rate for name, (rate, _) in found.items() if ".stem" in name)
    stages = [max(rate for name, (rate, _) in found.items() if f"stages.{s}." in name) for s in range(4)]
    assert stem < stages[0] < stages[1] < stages[2] < stages[3] <= 0.1
    assert all(np.log2(0.1 / rate) == pytest.approx(round(np.log2(0.1 / rate))) for rate in (stem, *stages))
    set_rate(optimizer, 0.5)
    assert {g["lr"] / g["initial_lr"] for g in optimizer.param_groups} == {0.5}
    plain = make_optimizer(model, TrainConfig())
    assert len(plain.param_groups) == 4  # backbone and head, with and without decay: few groups are fast
    model.backbone.freeze()
    assert len(make_optimizer(model, TrainConfig()).param_groups) == 2


# -- steps ---------------------------------------------------------------------------------------------------------


def weights_after(made: RunConfig, epochs: int = 1) -> dict[str, torch.Tensor]:
    job = prepare(made)
    trainer = Trainer(job, Joint(job), 0, made.train.epochs)
    for epoch in range(epochs):
        trainer.epoch(epoch)
    return copy.deepcopy(job.model.state_dict())


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].is_floating_point())


def test_accumulated_batches_make_the_step_of_one_large_batch(images):
    large = weights_after(config(images, batch_size=16), 2)
    small = weights_after(config(images, batch_size=4, accumulate=4), 2)
    assert difference(large, small) < 2e-5
    assert difference(large, weights_after(config(images, batch_size=4), 2)) > 1e-3  # the test can fail
    # 32 images in batches of 4, three to a step: the last step is of two batches, whose mean counts in full
    uneven = weights_after(config(images, batch_size=4, accumulate=3))
    assert difference(uneven, weights_after(config(images, batch_size=4, accumulate=2))) > 1e-4


def test_gradients_are_clipped(images):
    job = prepare(config(images, clip_norm=1e-3))
    trainer, norms = Trainer(job, Joint(job), 0, 2), []
    step = trainer.wrapped.step
    trainer.wrapped.step = lambda: norms.append(_norm(job.model)) or step()
    trainer.epoch(0)
    assert len(norms) == 4
    assert max(norms) <= 1e-3 * 1.001


def _norm(model: nn.Module) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def test_the_average_is_the_textbooks_and_what_is_validated(images):
    job = prepare(config(images, ema=0.8))
    trainer = Trainer(job, Joint(job), 0, 2)
    name = "head.proj.0.weight"
    expected, steps = job.model.state_dict()[name].clone(), 0
    update = trainer.ema.update

    def by_hand() -> None:
        nonlocal expected, steps
        decay = min(0.8, (1 + steps) / (10 + steps))
        expected = decay * expected + (1 - decay) * job.model.state_dict()[name]
        steps += 1
        update()

    trainer.ema.update = by_hand
    trainer.epoch(0)
    stepped = copy.deepcopy(job.model.state_dict())
    assert steps == 4
    trainer.validate("now")
    assert torch.allclose(trainer.best.state[name], expected, atol=1e-6)
    assert difference(trainer.best.state, stepped) > 1e-5
    assert difference(job.model.state_dict(), stepped) == 0  # training goes on from the weights, not their average


def test_an_average_takes_counts_as_they_are_and_a_push_at_once():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    ema = Ema(model, 0.9)
    model(torch.randn(8, 3))
    ema.update()
    assert ema.averaged.module[0].num_batches_tracked == 1
    assert not torch.equal(ema.averaged.module[0].running_mean, model[0].running_mean)
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    ema.take(model[1])
    with ema.applied():
        assert torch.equal(model[1].weight, torch.full((2, 3), 7.0))
    with torch.no_grad():
        model[1].weight.fill_(8.0)
        model[1].bias.fill_(8.0)
    ema.take(model[1].bias)
    with ema.applied():
        assert torch.equal(model[1].weight, torch.full((2, 3), 7.0))
        assert torch.equal(model[1].bias, torch.full((2,), 8.0))
    assert torch.equal(model[1].weight, torch.full((2, 3), 8.0))


def test_training_stops_early(images, tmp_path):
    made = config(images, epochs=30, patience=2, freeze_backbone=True)
    train(made, tmp_path / "run")
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [(row["val"]["balanced_accuracy"] + row["val"]["auroc"]) / 2 for row in epochs if "epoch" in row]
    assert len(scores) < 30
    assert max(scores[:-2]) >= max(scores[-2:])  # as good isn't better


def test_the_head_warms_up_alone(images, tmp_path):
    made = config(images, epochs=4, head_epochs=2)
    assert [(p.stage, p.start, p.end) for p in phases(made)] == [(Frozen, 0, 2), (Joint, 2, 4)]
    assert [p.stage for p in phases(config(images, freeze_backbone=True))] == [Frozen]
    job = prepare(made)
    before = copy.deepcopy(job.model.backbone.state_dict())
    trainer = Trainer(job, Frozen(job), 0, 2)
    trainer.epoch(0)
    assert all(torch.equal(value, before[name]) for name, value in job.model.backbone.state_dict().items())
    run = train(made, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 3, 4]
    assert difference(run.model.backbone.state_dict(), before) > 0


@pytest.mark.parametrize("tuned", [True, False])
def test_what_the_head_alone_reached_is_kept_if_nothing_beats_it(images, tmp_path, tuned):
    rate = 10.0 if tuned else 1e-6  # so large that the backbone breaks
    made = config(images, epochs=4, head_epochs=2, backbone_lr=rate, lr=0.01)
    run = train(made, tmp_path / "run")
    start = prepare(made).model.backbone.state_dict()
    moved = difference(run.model.backbone.state_dict(), start)
    assert moved == 0 if tuned else moved > 0


@pytest.mark.slow
def test_compiled_is_the_same(images):
    made = config(images)
    plain = weights_after(made)
    made.trainer.compile = True
    assert difference(plain, weights_after(made)) < 1e-3


# -- input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["", "rand-m9-mstd0.5-inc1", "rand-m10-n3", "augmix-m3-w3", "3a", "original"])
def test_augmentations_of_timm(policy):
    torch.manual_seed(0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3)).astype(np.uint8))
    transform = TrainTransform(Preprocessing(size=(32, 48)), True, policy, 0.5)
    made = [transform(picture) for _ in range(40)]
    assert {tuple(image.shape) for image in made} == {(3, 32, 48)}
    assert all(image.isfinite().all() for image in made)
    assert len({image.sum().item() for image in made}) > 35
    assert any((image == 0).flatten(1).all(0).float().mean() > 0.02 for image in made)  # erased


def test_a_policy_that_timm_does_not_know():
    with pytest.raises(InputError, match=r"timm knows no policy 'rnd-m9'.*rand-m9-mstd0\.5-inc1"):
        TrainTransform(Preprocessing(), auto_augment="rnd-m9")


@pytest.mark.parametrize(("group", "name", "value", "message"), [
    ("train", "ema", 1.0, "train.ema is 1.0; expected 0 to 1, both excluded"),
    ("train", "lr", 0.0, "train.lr is 0.0; expected more than 0"),
    ("train", "lr", float("nan"), "train.lr is nan; expected more than 0"),
    ("train", "accumulate", 0, "train.accumulate is 0; expected at least 1"),
    ("train", "head_epochs", 2, "train.head_epochs is 2 of 2 epochs"),
    ("train", "layer_decay", 1.5, "train.layer_decay is 1.5; expected 0.01 to 1"),
    ("loss", "effective_beta", 1.0, "loss.effective_beta is 1.0; expected 0 to 1, both excluded"),
    ("data", "random_erasing", 2.0, "data.random_erasing is 2.0; expected 0 to 1"),
    ("trainer", "devices", 0, "trainer.devices is 0"),
])  # fmt: skip
def test_numbers_that_make_no_sense(group, name, value, message):
    made = config(Path("nowhere"))
    setattr(getattr(made, group), name, value)
    with pytest.raises(InputError, match=message):
        made.check()


def test_a_head_that_warms_up_has_something_to_warm_up_for():
    with pytest.raises(InputError, match=r"give --train.freeze_backbone false"):
        config(Path("nowhere"), freeze_backbone=True, head_epochs=1).check()


def test_backbones_see_images_of_the_size_that_is_asked_for(images):
    made = config(images)
    made.model.image_size = 96
    job = prepare(made)
    assert job.train[0][0].shape == (3, 96, 96)
    assert (
        create_backbone("test_convnext", pretrained=False, size=(96, 96)).preprocessing == job.transform.preprocessing
    )


@pytest.mark.parametrize("name", ["fusion:test_convnext+test_resnet", "module"])
def test_backbones_of_all_kinds_have_layers(name):
    module = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.BatchNorm2d(4))
    model = ProtoModel(create_backbone(module if name == "module" else name, pretrained=False), nn.Linear(4, 2))
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5, lr=1.0, backbone_lr=0.1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = {names[p]: g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert rates.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    if name != "module":
        for part in "01":
            own = [rate for key, rate in rates.items() if f".parts.{part}." in key]
            assert min(own) < 0.03 < max(own) <= 0.1
        assert {rate for key, rate in rates.items() if ".gate." in key or ".norms." in key} == {0.1}


def test_a_run_is_mirrored(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config(images, epochs=3, freeze_backbone=True)
    made.trainer.track = ["tensorboard"]
    train(made, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == {row["epoch"]: pytest.approx(row["loss"]) for row in rows if "epoch" in row}
    assert events.Images("prototypes")
    made.trainer.track = ["tensorbord"]
    with pytest.raises(InputError, match="did you mean 'tensorboard'"):
        train(made, tmp_path / "other")
    assert not (tmp_path / "other").exists()
