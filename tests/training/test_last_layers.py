"""Fine-tuning of the last layers: on stored outputs of the first ones as on images, and in several orientations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from helpers import interrupted_in_epoch, make_images, refused
from protopush import create_backbone, open_run
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.features import Orientations, cache_features
from protopush.data.images import check_images
from protopush.data.manifest import DataConfig
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, Preprocessing, oriented
from protopush.evaluation.evaluate import mean_over_views
from protopush.training.config import ModelConfig, PushConfig, RunConfig, TrainConfig, TrainerConfig, WindowsConfig
from protopush.training.phases import LastLayers
from protopush.training.setup import prepare
from protopush.training.trainer import train


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("last-layers") / "images", ["bird", "cat", "dog"], 12)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path_factory.getbasetemp() / "last-layers-cache"))


def config(images: Path, views: int, windows: bool, anchoring: str) -> RunConfig:
    return RunConfig(
        data=DataConfig(path=str(images), num_workers=0, augment=False, cached_views=views),
        model=ModelConfig(
            backbone="test_resnet", pretrained=False, image_size=96, num_prototypes=2, embed_dim=16, dropout=0.0,
            windows=WindowsConfig(size=48, stride=48) if windows else None,
        ),
        push=PushConfig(start_epoch=1, interval=1, anchoring=anchoring, unique="image"),
        train=TrainConfig(
            epochs=3, head_epochs=1, freeze_backbone=False, trainable_stages=1, batch_size=8, backbone_lr=1e-3
        ),
        trainer=TrainerConfig(device="cpu", cache_precision="float32"),
    )  # fmt: skip


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("anchoring", ["off", "live"])
def test_losses_are_those_of_the_ordinary_way(images, tmp_path, windows, anchoring):
    found = []
    for views in (0, 1):
        train(config(images, views, windows, anchoring), tmp_path / str(views))
        found.append(rows(tmp_path / str(views)))
    epochs = [[row for row in some if "epoch" in row] for some in found]
    assert len(epochs[0]) == len(epochs[1]) == 3
    for ordinary, cached in zip(*epochs, strict=True):
        assert cached["loss"] == pytest.approx(ordinary["loss"], abs=1e-5)
        assert cached["val"]["auroc"] == pytest.approx(ordinary["val"]["auroc"], abs=1e-6)
    before, after = [open_run(tmp_path / str(views)).model.state_dict() for views in (0, 1)]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert all(check.holds for check in open_run(tmp_path / "1").verify())


def test_only_the_last_stage_has_moved(images, tmp_path):
    job = prepare(config(images, 8, windows=True, anchoring="live"))
    first = {name: value.clone() for name, value in job.model.backbone.state_dict().items()}
    train(job.config, tmp_path / "run")
    moved = {
        name for name, value in open_run(tmp_path / "run").model.backbone.state_dict().items()
        if not torch.equal(value, first[name])
    }  # fmt: skip
    assert moved
    assert all("layer4" in name for name in moved)
    assert not any("running" in name for name in moved)  # train.freeze_norms


def test_each_orientation_comes_up_in_training_and_the_first_in_pushes(images):
    job = prepare(config(images, 8, windows=True, anchoring="live"))
    stage = LastLayers(job)
    train = stage.train_loader.dataset
    upright = job.train.eval_view()
    for index in (0, 5):
        pixels = upright[index][0].unsqueeze(0)
        with torch.no_grad():
            expected = [stage.extract(oriented(pixels, view)).patches[0] for view in range(8)]
        seen = set()
        for _ in range(200):
            stored, label, number = train[index]
            (view,) = [v for v, one in enumerate(expected) if torch.allclose(stored, one, rtol=1e-3, atol=1e-3)]
            seen.add(view)
            assert (label, number) == (upright.samples[index].label, index)
        assert seen == set(range(8))
        for loader in (stage.plain_train_loader, stage.val_loader):
            assert not loader.dataset.random
        torch.testing.assert_close(train.eval_view()[index][0], expected[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("views", [2, 4, 8])
def test_orientations_are_all_different_and_those_of_pillow(views):
    ways = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180]
    pixels = torch.arange(3 * 5 * 4, dtype=torch.uint8).view(3, 5, 4)
    found = [oriented(pixels, view) for view in range(views)]
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for view, way in enumerate(ways[:views]):
        expected = picture if way is None else picture.transpose(way)
        assert found[view].permute(1, 2, 0).numpy().tobytes() == expected.tobytes()
    for view in range(4, views):
        flipped = picture if ways[view - 4] is None else picture.transpose(ways[view - 4])
        expected = flipped.transpose(Image.Transpose.TRANSPOSE)
        assert found[view].permute(1, 2, 0).numpy().tobytes() == expected.tobytes()
    assert len({some.numpy().tobytes() for some in found}) == views


def test_the_mean_over_views_is_the_sum_of_what_is_shown(images, tmp_path):
    train(config(images, 4, windows=True, anchoring="live"), tmp_path / "run")
    run = open_run(tmp_path / "run")
    pixels = torch.randn(3, 3, 96, 96)
    model = run.model.eval()
    with torch.no_grad():
        out = mean_over_views(model, pixels, 8)
        each = [model(oriented(pixels, view)) for view in range(8)]
    torch.testing.assert_close(out.logits, out.contributions.sum(-1) + model.head.bias)
    torch.testing.assert_close(out.contributions, out.similarities * model.head.weights())
    torch.testing.assert_close(out.logits, sum(one.logits for one in each) / 8)
    one, eight = run.evaluate("all"), run.evaluate("all", views=8)
    turned = run.evaluate("all", views=8)
    assert eight == turned
    assert eight["n"] == one["n"] == 36
    assert eight["ece"] != one["ece"]


def test_stored_precision_and_views_have_their_own_files(images, tmp_path):
    catalog = load_catalog(str(images), "auto", seed=0)
    dataset = ImageDataset(catalog.split("val"), EvalTransform(Preprocessing(size=(96, 96))))
    hashes = check_images([sample.image for sample in dataset.samples])
    backbone = create_backbone("resnet18", pretrained=False, size=(96, 96)).eval()
    half, single, several = (
        cache_features(backbone, dataset, hashes, tmp_path, views=views, precision=precision)
        for views, precision in ((1, "float16"), (1, "float32"), (4, "float16"))
    )
    assert len({half.folder, single.folder, several.folder}) == 3
    assert half[0][0].dtype == several[0][0].dtype == torch.float16
    pixels = dataset[0][0].unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(single[0][0], backbone(pixels).patches[0])
        four = Orientations(backbone, 4)(pixels).patches[0]
    stored = torch.stack([several.patches(0, view) for view in range(4)])
    torch.testing.assert_close(stored.float(), four, atol=0.01, rtol=0.01)


def test_a_run_on_stored_outputs_resumes_as_if_never_cut_off(images, tmp_path, monkeypatch):
    options = config(images, 8, windows=True, anchoring="live")
    train(options, tmp_path / "whole")
    with interrupted_in_epoch(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        train(options, tmp_path / "cut")
    train(options, tmp_path / "cut", resume=True)
    for (name, value), (_, other) in zip(
        open_run(tmp_path / "whole").model.state_dict().items(),
        open_run(tmp_path / "cut").model.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(value, other), name


REFUSED = [
    ("--train.trainable_stages 1", "train.trainable_stages is for a backbone that is trained"),
    ("--train.freeze_backbone false --data.cached_views 2", "all of the backbone is trained"),
    ("--data.cached_views 4 --data.flip_vertical false", "upside down"),
    ("--data.cached_views 2 --loss.off_mask 1", "upright"),
    ("--data.cached_views 3", "cached_views"),
    ("--train.freeze_backbone false --train.trainable_stages 9", "1 to 4, or a layer"),
    ("--train.freeze_backbone false --train.trainable_stages layer9", "no layer 'layer9'"),
]


@pytest.mark.parametrize(("words", "text"), REFUSED)
def test_what_means_nothing_is_refused(images, tmp_path, capsys, words, text):
    given = ["--data.path", images, "--model.backbone", "resnet18", "--model.pretrained", "false", *words.split()]
    assert text in refused(capsys, "train", *given, "--out", tmp_path / "run", logged=True)
    assert not (tmp_path / "run").exists()


def test_the_configuration_is_written_with_the_run(images, tmp_path):
    train(config(images, 2, windows=False, anchoring="off"), tmp_path / "run")
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (written["train"]["trainable_stages"], written["data"]["cached_views"]) == (1, 2)
    assert main(["evaluate", str(tmp_path / "run"), "--views", "4", "--json"]) == 0
