"""Training, its cache, its folder, and what it says: small images, real processes of thought."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers import SMALL, make_images, refused
from protopush import InputError, ProtoModel, load
from protopush.backbones.create import create_backbone
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.features import cache_features
from protopush.data.images import check_images
from protopush.data.manifest import DataConfig
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform
from protopush.metrics.classification import classification_metrics
from protopush.models.model_folder import save_run
from protopush.push.certificate import verify_anchors
from protopush.runs.run import open_run
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig, TrainerConfig
from protopush.training.final_push import refit
from protopush.training.optim import learning_rate_factor
from protopush.training.trainer import train


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))


def small(path: Path, precision: str = "32-true", **train_options) -> RunConfig:
    """A tiny ResNet with random weights: 160 pixels, 5x5 cells."""
    return RunConfig(
        data=DataConfig(path=str(path), num_workers=0, allow_duplicates=True),
        model=ModelConfig(backbone="test_resnet", pretrained=False, num_prototypes=2, embed_dim=16, windows=None),
        push=PushConfig(start_epoch=2, interval=2),
        train=TrainConfig(**({"epochs": 4, "batch_size": 8} | train_options)),
        trainer=TrainerConfig(device="cpu", precision=precision),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """One frozen run that several tests look at."""
    root = tmp_path_factory.mktemp("trained")
    data = make_images(root / "images", ["bird", "cat", "dog"], 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        train(small(data), root / "run")
    return root / "run"


def test_learning_rate_rises_and_falls():
    factors = [learning_rate_factor(s, 100, 10) for s in range(100)]
    assert factors[9] == factors[10] == 1.0
    assert all(a < b for a, b in pairwise(factors[:10]))
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[-1] < 0.01


def test_run_folder_holds_what_the_design_says(trained):
    names = {str(p.relative_to(trained)) for p in trained.rglob("*") if p.is_file()}
    pictures = {f"prototypes/class{c:02d}-prototype{k:02d}.jpg" for c in range(3) for k in range(2)}
    assert names == pictures | {
        "config.yaml", "config.json", "model.safetensors", "prototypes.json", "prototypes.png", "metrics.jsonl",
        "split.csv", "candidates.safetensors", "checkpoints/last.pt",
    }  # fmt: skip
    assert yaml.safe_load((trained / "config.yaml").read_text())["push"]["start_epoch"] == 2
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("epoch") or ("push", row["push"]) for row in rows] == [
        1, 2, ("push", 2), 3, 4, ("push", 4)
    ]  # fmt: skip  # no push after epoch 4, where the learning rate has fallen; the last row is the final push
    assert rows[-1]["final"] == "hard"
    assert rows[-1]["mean_dist_after"] < 1e-3 < rows[-1]["mean_dist"]
    checkpoint = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    assert checkpoint["epoch"] == 4


def test_the_anchors_of_a_run_are_real_patches_of_their_own_class(trained):
    run = open_run(trained)
    manager = run.head.proto_manager
    catalog = load_catalog(run.data["path"])
    training = {s.name: s.label for s in catalog.split("train")}
    for row, anchor in enumerate(manager.anchors):
        assert anchor is not None
        assert training[anchor.file] == row // 2
        assert anchor.similarity_after == pytest.approx(1.0, abs=1e-6)
    checks = verify_anchors(run.model, manager, run.transform, run.root, run.class_names, tolerance=1e-5)
    assert len(checks) == 6
    assert all(check.holds for check in checks)


def test_load_gives_the_same_logits(trained, tmp_path):
    run = open_run(trained)
    images = torch.randn(2, 3, 160, 160)
    model = load(trained)
    assert isinstance(model, ProtoModel)
    assert not model.training
    assert model.class_names == ["bird", "cat", "dog"]
    with torch.no_grad():
        assert torch.equal(model(images).logits, run.model(images).logits)
    from dataclasses import replace

    again = replace(run, folder=tmp_path / "again")
    save_run(again)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_same_seed_same_run_other_seed_another(tmp_path, image_folder):
    weights = []
    for number, seed in enumerate((1, 1, 2)):
        train(small(image_folder, epochs=2, seed=seed), tmp_path / f"run{number}")
        weights.append((tmp_path / f"run{number}" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_joint_training_moves_the_backbone_and_frozen_training_does_not(tmp_path, image_folder):
    config = small(image_folder, epochs=1, freeze_backbone=False, seed=3)
    config.push = replace(config.push, start_epoch=1, interval=1)
    joint = train(config, tmp_path / "joint")
    frozen = train(small(image_folder, epochs=1, seed=3), tmp_path / "frozen")
    torch.manual_seed(3)
    start = create_backbone("test_resnet", pretrained=False).state_dict()
    moved = {k for k, v in joint.model.backbone.state_dict().items() if not torch.equal(v, start[k])}
    assert any("conv" in k for k in moved)
    assert not any("running" in k for k in moved)  # norms keep their statistics unless they are to learn
    learned = train(
        small(image_folder, epochs=1, freeze_backbone=False, freeze_norms=False, seed=3), tmp_path / "learned"
    ).model.backbone.state_dict()
    assert any(not torch.equal(learned[k], v) for k, v in start.items() if "running_mean" in k)
    assert all(torch.equal(v, start[k]) for k, v in frozen.model.backbone.state_dict().items())
    checks = verify_anchors(
        joint.model, joint.head.proto_manager, joint.transform, joint.root, joint.class_names, tolerance=1e-5
    )
    assert all(check.holds for check in checks)  # un-augmented patches, although training augments


def test_a_model_that_matches_the_pooled_feature_is_pushed_onto_pooled_features(tmp_path, image_folder):
    config = small(image_folder, epochs=2)
    config.model.match = "global"
    run = train(config, tmp_path / "run")
    manager = run.head.proto_manager
    assert {anchor.pooled for anchor in manager.anchors} == {True}
    assert {anchor.box for anchor in manager.anchors} == {(4, 0, 36, 32)}  # all that the centre crop of 40x32 shows
    reopened = open_run(tmp_path / "run")
    assert reopened.head.match == "global"
    checks = verify_anchors(
        reopened.model, reopened.head.proto_manager, run.transform, run.root, run.class_names, tolerance=1e-5
    )
    assert all(check.holds for check in checks)


@pytest.mark.parametrize("frozen", [True, False])  # frozen: features stored in float16
def test_mixed_precision_trains_and_still_ends_on_exact_anchors(tmp_path, image_folder, frozen):
    config = small(image_folder, epochs=1, freeze_backbone=frozen, precision="bf16-mixed")
    config.push = replace(config.push, start_epoch=1, interval=1)
    run = train(config, tmp_path / "run")
    manager = run.head.proto_manager
    checks = verify_anchors(run.model, manager, run.transform, run.root, run.class_names, tolerance=1e-5)
    assert all(check.holds for check in checks)


def test_without_validation_images_the_last_epoch_is_taken(tmp_path):
    for split in ("train", "test"):
        make_images(tmp_path / "images" / split, ["bird", "cat"], 3)  # too few to hold any out
    run = train(small(tmp_path / "images", epochs=2), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["val"] is None for row in rows if "epoch" in row)
    assert run.folder == tmp_path / "run"


def test_the_best_epoch_is_chosen_on_validation_never_on_test(tmp_path, image_folder, monkeypatch):
    import protopush.training.phases as stages

    seen = []
    monkeypatch.setattr(stages, "evaluate", _spy(stages.evaluate, seen))
    train(small(image_folder, epochs=2), tmp_path / "run")
    catalog = load_catalog(str(image_folder))
    val = {s.name for s in catalog.split("val")}
    assert seen
    assert all(names == val for names in seen)


def _spy(evaluate, seen):
    def spied(model, loader, *rest):
        seen.append({s.name for s in loader.dataset.samples})
        return evaluate(model, loader, *rest)

    return spied


def test_cache_is_used_again_and_never_when_stale(tmp_path, image_folder):
    backbone = create_backbone("test_resnet", pretrained=False).freeze()
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    samples = load_catalog(str(image_folder)).samples

    def cached(crop_pct: float = 1.0):
        images = ImageDataset(samples, EvalTransform(backbone.preprocessing, crop_pct))
        calls.clear()
        found = cache_features(
            backbone, images, check_images([s.image for s in samples]), tmp_path / "c", batch_size=16
        )
        return found, len(calls)

    first, passes = cached()
    assert passes == 2
    assert first[5][0].dtype == torch.float16
    assert first.regions == backbone.regions
    with torch.no_grad():
        image = ImageDataset(samples, first.eval_transform)[5][0].unsqueeze(0)
        np.testing.assert_allclose(first[5][0].float(), backbone(image).patches[0], rtol=2e-3, atol=2e-3)
    assert first[5][1:] == (samples[5].label, 5)
    assert cached()[1] == 0  # nothing changed
    assert cached(crop_pct=0.9)[1] == 2  # another transform
    with torch.no_grad():
        next(backbone.parameters()).add_(1e-3)
    assert cached()[1] == 2  # other weights
    assert cached()[1] == 0
    stat = samples[0].image.stat()
    samples[0].image.write_bytes(samples[1].image.read_bytes())
    import os

    os.utime(samples[0].image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cached()[1] == 2  # another file behind the same name and time


def test_a_broken_cache_computation_leaves_no_cache(tmp_path, image_folder):
    backbone = create_backbone("test_resnet", pretrained=False).freeze()
    with torch.no_grad():
        next(backbone.parameters()).fill_(torch.nan)
    samples = load_catalog(str(image_folder)).samples
    images = ImageDataset(samples, EvalTransform(backbone.preprocessing))
    with pytest.raises(InputError, match=r"in at least 2\d samples: bird/000.png, .* and 1\d more"):
        cache_features(backbone, images, ["x"] * 30, tmp_path / "c")
    assert [path for path in (tmp_path / "c").rglob("*") if path.is_file()] == []


def test_every_image_with_nan_features_is_named(tmp_path, image_folder):
    class Fragile(torch.nn.Module):
        def forward(self, x):
            return torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 0.1, x.new_tensor(torch.nan), x)[:, :, ::32, ::32]

    backbone = create_backbone(Fragile())
    samples = load_catalog(str(image_folder)).samples
    images = ImageDataset(samples, EvalTransform(backbone.preprocessing))
    bright = [s.name for i, s in enumerate(samples) if images[i][0].mean() > 0.1]
    for name in (samples[3], samples[25]):
        Image.new("RGB", (40, 32), "white").save(name.image)
    expected = ", ".join([*bright, samples[3].name, samples[25].name])
    with pytest.raises(InputError, match=rf"in 2 samples: {expected};"):
        cache_features(backbone, images, ["x"] * 30, tmp_path / "c")


def test_nothing_is_stored_where_the_cache_is_off(tmp_path, image_folder, capsys):
    """The same run as with exact stored features, with a frozen backbone that runs in each epoch."""
    ends = {}
    for precision in ("float32", "off", "float8"):
        cache, out = tmp_path / f"cache-{precision}", tmp_path / precision
        words = ["--trainer.cache_dir", str(cache), "--trainer.cache_precision", precision, "--push.unique", "image"]
        options = ["--push.start_epoch", "1", "--push.interval", "1", "--train.epochs", "3", "--model.dropout", "0"]
        assert main(["train", "--data.path", str(image_folder), "--out", str(out), *SMALL, *words, *options]) == 0
        ends[precision] = load_file(out / "model.safetensors")
        assert cache.exists() == (precision != "off")
        assert main(["verify", str(out)]) == 0
    for name, value in ends["float32"].items():
        torch.testing.assert_close(ends["off"][name], value, atol=1e-4, rtol=1e-4)
    caches = [(tmp_path / f"cache-{precision}").rglob("*.npy") for precision in ("float32", "float8")]
    exact, short = (sum(file.stat().st_size for file in files) for files in caches)
    assert 3.5 < exact / short < 4.1
    line = refused(
        capsys, "train", "--data.path", image_folder, "--out", tmp_path / "run", *SMALL,
        "--trainer.cache_precision", "off", "--data.cached_views", "2",
    )  # fmt: skip
    assert "data.cached_views is 2, but trainer.cache_precision is off" in line


@pytest.mark.parametrize("what", ["biases", "connections"])
def test_a_refit_mends_a_shifted_bias(what):
    head = ProtoModel.create("resnet18", 3, pretrained=False, num_prototypes=2, embed_dim=8).head
    labels = torch.arange(300) % 3
    similarities = torch.rand(300, 3, 2) * 0.2
    similarities[torch.arange(300), labels] += 0.15
    shifted = torch.tensor([1.0, 0.0, -1.0])  # as after a hard push

    def accuracy() -> float:
        with torch.no_grad():
            logits = (similarities * head.weights()).sum(-1) + head.bias
        return float((logits.argmax(1) == labels).float().mean())

    accuracies = {}
    for decay in (0.0, 0.1, 1e6):
        with torch.no_grad():
            head.bias.copy_(shifted)
        before = {name: value.clone() for name, value in head.state_dict().items()}
        start = accuracy()
        refit(head, similarities, labels, None, what, decay=decay)
        accuracies[decay] = accuracy() - start
        moved = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {"bias"} if what == "biases" else moved == {"bias", "log_temperature", "connections"}
        assert all(p.grad is None for p in head.parameters())
        head.load_state_dict(before)
    assert accuracies[0.0] >= accuracies[0.1] > 0.1
    assert abs(accuracies[1e6]) < 0.05  # held where it was


@pytest.mark.parametrize("seed", range(10))
def test_classification_metrics_against_slow_versions(seed):
    random = np.random.default_rng(seed)
    count, classes = int(random.integers(5, 60)), 4
    labels = random.choice(3 if seed % 2 else 4, size=count)  # sometimes a class doesn't occur
    scores = random.dirichlet(np.ones(classes), size=count).round(2)  # ties
    found = classification_metrics(torch.from_numpy(scores), torch.from_numpy(labels), list("abcd"))
    predicted = torch.from_numpy(scores).argmax(1).numpy()
    recalls, f1s, aucs = [], [], []
    for c in range(classes):
        hits = sum((predicted == c) & (labels == c))
        if (labels == c).any():
            recalls.append(hits / sum(labels == c))
        if (labels == c).any() or (predicted == c).any():
            f1s.append(2 * hits / (sum(labels == c) + sum(predicted == c)))
        if 0 < sum(labels == c) < count:
            own, rest = scores[labels == c, c], scores[labels != c, c]
            aucs.append(np.mean([(a > b) + 0.5 * (a == b) for a in own for b in rest]))
    assert found["n"] == count
    assert found["accuracy"] == pytest.approx((predicted == labels).mean())
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["macro_f1"] == pytest.approx(np.mean(f1s))
    assert found["auroc"] == pytest.approx(np.mean(aucs))
    assert [found["per_class"][name]["n"] for name in "abcd"] == [int(sum(labels == c)) for c in range(4)]


def test_a_run_grows_and_prunes_and_opens_again(tmp_path):
    config = small(make_images(tmp_path / "images", ["bird", "cat", "dog"], 10))
    config.model.max_prototypes = 4
    resizing = {"grow": True, "grow_below": 1.0, "prune": True, "prune_cosine": 0.9}
    config.push = replace(config.push, final_decay=0.0, **resizing)  # also after the last epoch
    run = train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    pushes = [row for row in rows if "growth" in row]
    assert len(pushes) == 2
    assert any(row["growth"]["added"] for row in pushes)
    assert pushes[0]["growth"]["val_before"].keys() == {"balanced_accuracy", "auroc", "ece"}
    assert any(row["pruning"]["removed"] for row in pushes)
    counts = run.head.proto_manager.mask().sum(dim=1)
    again = open_run(tmp_path / "run")
    assert torch.equal(again.head.proto_manager.mask().sum(dim=1), counts)
    images = torch.randn(3, 3, 160, 160)
    assert torch.equal(again.model(images).logits, run.model(images).logits)
    checks = verify_anchors(again.model, again.head.proto_manager, again.transform, again.root, again.class_names)
    assert len(checks) == int(counts.sum())
    assert all(check.holds for check in checks)
    config.model.max_prototypes = 1
    with pytest.raises(InputError, match="no more than max_prototypes"):
        train(config, tmp_path / "other")


TUNED = {"freeze_backbone": False, "head_epochs": 1, "ema": 0.9}


@pytest.mark.parametrize(("options", "training"), [
    ({"anchoring": "live", "unique": "image"}, {}),
    ({"anchoring": "live"}, TUNED),
    ({"anchoring": "live", "start_epoch": 9}, {}),  # no push before the end
    ({"start_epoch": 0}, {}),  # one before there is anything to choose by
    ({}, TUNED),
])  # fmt: skip
def test_a_run_chooses_few_prototypes_once(tmp_path, options, training):
    images = make_images(tmp_path / "images", ["bird", "cat"], 10)
    make_images(images, ["dog"], 60)
    config = small(images, **training)
    config.model.num_prototypes = 6
    config.push = replace(config.push, rows=1, final_decay=0.0, **options)
    run = train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "choice" in row]
    assert row.get("final") if options.get("start_epoch") == 9 else row["push"] == 2
    counts = run.head.proto_manager.mask().sum(dim=1).tolist()
    assert row["choice"]["prototypes"] == dict(zip(run.class_names, counts, strict=True))
    assert min(counts) == 1
    assert max(counts) == 2
    assert len(row["choice"]["removed"]) == 18 - sum(counts)
    places = [tuple(place) for place in row["choice"]["removed"]]
    assert sorted(places + run.head.proto_manager.used_slots()) == [(c, k) for c in range(3) for k in range(6)]
    again = open_run(tmp_path / "run")
    checks = verify_anchors(again.model, again.head.proto_manager, again.transform, again.root, again.class_names)
    assert len(checks) == sum(counts)  # the best state is one of after the choice
    assert all(check.holds for check in checks)
    inputs = torch.randn(3, 3, 160, 160)
    out = again.model(inputs)
    assert torch.allclose(out.contributions.sum(-1) + again.head.bias, out.logits)
    assert torch.equal(out.logits, run.model(inputs).logits)


@pytest.mark.parametrize("training", [{}, TUNED | {"ema": None}])
def test_live_prototypes_are_their_own_nearest_patches(tmp_path, training):
    """Without looking at everything again: the same anchors and weights, from the anchors' images alone."""
    images, runs, reads = make_images(tmp_path / "images", ["bird", "cat", "dog"], 12), [], []
    for shortlist in (False, True):
        config = small(images, epochs=4, **training)
        config.push = replace(
            config.push,
            anchoring="live",
            start_epoch=1,
            interval=1,
            final_decay=0.0,
            unique="image",
            shortlist=shortlist,
        )
        out = tmp_path / str(shortlist)
        runs.append(train(config, out))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        reads.append(
            [note for row in rows if row.get("push", 1) > 1 for note in row.get("notes", ()) if "instead" in note]
        )
    assert reads[0] == []
    assert len(reads[1]) == 3
    anchors = [[(a.file, a.cell) for a in run.head.proto_manager.anchors] for run in runs]
    assert anchors[0] == anchors[1]
    states = [run.model.state_dict() for run in runs]
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-5, rtol=1e-4)


def test_other_prototypes_have_no_shortlist(tmp_path):
    config = small(tmp_path)
    config.push = replace(config.push, shortlist=True)
    with pytest.raises(InputError, match=r"push\.shortlist reads the anchors of live prototypes alone"):
        config.check()


@pytest.mark.parametrize("options", [{"prune": True}, {"grow": True}])
def test_a_choice_has_nothing_beside_it(tmp_path, options):
    config = small(tmp_path)
    config.push = replace(config.push, rows=2, **options)
    with pytest.raises(InputError, match="expected one way to remove them"):
        config.check()
