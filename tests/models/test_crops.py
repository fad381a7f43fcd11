"""Crops are the prototypes: they give them back alone, and a trained backbone embeds them at every step."""

from __future__ import annotations

import io
import shutil
from base64 import b64decode
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import SMALL, make_images
from protopush import ProtoModel, open_run
from protopush.cli import main
from protopush.data.files import read_json, write_json
from protopush.data.images import read_image, sha256_of
from protopush.errors import InputError
from protopush.explain import explain_image
from protopush.explain.figure_style import COLOURS, TILE, WIDE
from protopush.explain.panel import BETWEEN, LEFT
from protopush.models.crops import crop_features, crop_name
from protopush.models.model_folder import Run
from protopush.preserve_state import preserve_state
from protopush.report.build import environment
from protopush.report.cases import contribution_rows
from protopush.report.prototype_cards import Cards, Frame
from protopush.training.run_writer import RunWriter

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = ["--model.image_size", "64", "--model.windows.size", "[32,48]", "--model.windows.stride", "[16,16]"]
LIVE = ["--push.anchoring", "live", "--push.start_epoch", "1", "--push.interval", "1"]
ARMS = {
    "frozen": [],
    "hard": ["--push.anchoring", "off", "--push.unique", "image"],
    "tuned": ["--train.freeze_backbone", "false", "--train.head_epochs", "1", "--train.epochs", "3"],
    "averaged": ["--train.freeze_backbone", "false", "--train.ema", "0.9"],
}


@pytest.fixture(scope="module")
def crops_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on windows, one for each of ``ARMS``; their images are away."""
    crops_home = tmp_path_factory.mktemp("crops")
    make_images(crops_home / "data", ["bird", "cat", "dog"], 10, (80, 64))
    for name, words in ARMS.items():
        wish = ["--data.path", str(crops_home / "data"), "--out", str(crops_home / name), *WINDOWS, *LIVE, *words]
        assert main(["train", *SMALL, *wish]) == 0
    (crops_home / "data").rename(crops_home / "away")
    return crops_home


@pytest.mark.parametrize("arm", ARMS)
def test_crops_alone_give_back_the_prototypes(crops_home: Path, tmp_path: Path, arm: str) -> None:
    run, folder = open_run(crops_home / arm), tmp_path / "run"
    checks = run.verify(crops=True)
    assert len(checks) == 6
    assert all(check.holds for check in checks), [check.problem for check in checks]
    with pytest.raises(InputError, match="no such folder"):
        run.verify()  # the images are away
    # Prototypes that somebody has wiped out come back.
    shutil.copytree(crops_home / arm, folder)
    weights = load_file(folder / "model.safetensors")
    known = weights["head.proto_manager.prototypes"].clone()
    for name in ("prototypes", "anchor_features"):
        if f"head.proto_manager.{name}" in weights:
            weights[f"head.proto_manager.{name}"].zero_().add_(0.1)
    save_file(weights, folder / "model.safetensors")
    write_json(
        folder / "config.json",
        read_json(folder / "config.json") | {"weights_sha256": sha256_of(folder / "model.safetensors")},
    )
    assert main(["verify", str(folder), "--crops"]) == 1
    assert main(["rebuild", str(folder), "--out", str(tmp_path / "rebuilt")]) == 0
    rebuilt = open_run(tmp_path / "rebuilt")
    torch.testing.assert_close(rebuilt.head.proto_manager.prototypes.detach(), known, rtol=0, atol=1e-5)
    assert all(check.holds for check in rebuilt.verify(crops=True))


def test_crop_is_what_the_model_sees_in_the_box(crops_home: Path) -> None:
    run = open_run(crops_home / "frozen")
    for c, k in run.head.proto_manager.used_slots():
        anchor = run.head.proto_manager.anchor(c, k)
        assert anchor is not None
        with Image.open(crops_home / "away" / str(anchor.file)) as picture:
            seen = run.transform.visible(picture.convert("RGB"))
        wanted = seen.crop(tuple(map(int, anchor.region)))
        with Image.open(crops_home / "frozen" / "prototypes" / crop_name(c, k)) as crop:
            assert (crop.mode, crop.size, crop.tobytes()) == ("RGB", wanted.size, wanted.tobytes())


def test_crop_that_is_missing_changed_or_broken_is_named(
    crops_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(crops_home / "frozen", folder)
    (folder / "prototypes" / crop_name(0, 0)).unlink()
    (folder / "prototypes" / crop_name(0, 1)).write_bytes(b"no picture")
    file = folder / "prototypes" / crop_name(1, 0)
    with Image.open(file) as crop:
        crop.point(lambda value: 255 - value).save(file)
    faults = [check.fault for check in open_run(folder).verify(crops=True)]
    assert faults == ["crop_missing", "crop_missing", "similarity_off", "", "", ""]
    assert main(["verify", str(folder), "--crops"]) == 1
    assert "no crop in prototypes/" in capsys.readouterr().out
    assert main(["rebuild", str(folder), "--out", str(tmp_path / "new")]) == 2
    assert "cannot rebuild bird:0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_run_on_whole_images_has_no_crops(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not list((run / "prototypes").glob("*.png"))
    assert main(["verify", str(run), "--crops"]) == 2
    assert "expected a run on windows" in capsys.readouterr().err


def test_shared_folder_has_crops_and_no_whole_image(crops_home: Path, tmp_path: Path) -> None:
    (crops_home / "away").rename(crops_home / "data")
    try:
        open_run(crops_home / "tuned").model.save_pretrained(tmp_path / "shared")
    finally:
        (crops_home / "data").rename(crops_home / "away")
    names = sorted(file.name for file in (tmp_path / "shared" / "prototypes").iterdir())
    assert names == sorted(crop_name(c, k) for c in range(3) for k in range(2))
    assert all(check.holds for check in open_run(tmp_path / "shared").verify(crops=True))
    model = ProtoModel.from_pretrained(str(tmp_path / "shared"))
    model.save_pretrained(tmp_path / "again")  # without the images the crops go along
    assert all(check.holds for check in open_run(tmp_path / "again").verify(crops=True))


@pytest.fixture(scope="module")
def shared_folder(crops_home: Path) -> Path:
    """What ``save_pretrained`` writes of a run on windows; the images are away again."""
    (crops_home / "away").rename(crops_home / "data")
    open_run(crops_home / "frozen").model.save_pretrained(crops_home / "shared")
    (crops_home / "data").rename(crops_home / "away")
    return crops_home / "shared"


def assert_is_crop(tile: Image.Image, folder: Path, slot: tuple[int, int]) -> None:
    """The tile is the crop, but for a frame of two pixels."""
    with Image.open(folder / "prototypes" / crop_name(*slot)) as crop:
        wanted = np.asarray(crop.resize(tile.size, Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(tile)[2:-2, 2:-2], wanted[2:-2, 2:-2])


def framed_in(picture: Image.Image, ink: tuple[int, int, int], left: int, width: int) -> tuple[int, int, int, int]:
    """The frame of this colour in some columns of a picture."""
    rows, columns = np.nonzero((np.asarray(picture.convert("RGB"))[:, left : left + width] == ink).all(axis=-1))
    return left + int(columns.min()), int(rows.min()), left + int(columns.max()) + 1, int(rows.max()) + 1


def test_gallery_of_a_shared_folder_shows_crops(shared_folder: Path) -> None:
    with Image.open(shared_folder / "prototypes.png") as gallery:
        for c in range(3):
            second = framed_in(gallery, COLOURS[c], 32 + 288, 264)
            assert second[2] - second[0] == second[3] - second[1] == 129  # the part; nothing is framed beside it
            for k, box in enumerate([(32, second[1], 161, second[3]), second]):
                assert_is_crop(gallery.crop(box), shared_folder, (c, k))
                assert gallery.getpixel((box[2] + 16, box[1] + 10)) == TILE


def test_panels_on_a_shared_folder_show_crops(
    crops_home: Path, shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, draw = list[str](), ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: object, text: str, **how: object) -> None:
        written.append(text)
        draw(self, xy, text, **how)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    (found,) = open_run(shared_folder).explain([crops_home / "away" / "cat" / "003.png"], tmp_path, why_not="dog")
    best, left = found["classes"][0]["matches"][0], WIDE.margin + LEFT + BETWEEN + 2 * (WIDE.side + WIDE.gap)
    with Image.open(found["panel"]) as panel:
        tile = panel.crop(framed_in(panel, COLOURS[0], left, WIDE.side))
        assert_is_crop(tile, shared_folder, (best["class_index"], best["prototype"]))
    assert Path(found["why_not"]["panel"]).is_file()
    assert written.count("whole image not") + written.count("whole image not shared") == 2 + 4
    assert "no picture" not in written


def test_report_on_a_shared_folder_shows_crops(crops_home: Path, shared_folder: Path) -> None:
    run = open_run(shared_folder)
    for c, k in run.head.proto_manager.used_slots():
        cards = Cards(run, crops_home / "nowhere")
        card = cards.card(c, k)
        assert (card["source"], card["part"].frames) == (None, (Frame(0, 0, 100, 100),))
        assert card["missing"].startswith("Its training image is not shared")
        with (
            Image.open(io.BytesIO(b64decode(card["part"].uri.partition(",")[2]))) as shown,
            Image.open(shared_folder / "prototypes" / crop_name(c, k)) as crop,
        ):
            assert shown.size == crop.size
            assert np.abs(np.asarray(shown, dtype=float) - np.asarray(crop)).mean() < 20  # a JPEG of noise
    found = explain_image(run.model, crops_home / "away" / "cat" / "003.png", run.transform, run.class_names)
    pictures = {"here": card["part"], "there": card["part"], "source": None, "ident": "x"}
    row = contribution_rows(found.classes[0])[0] | pictures
    html = str(environment().get_template("macros.html.j2").module.looks_like(row))
    assert "whole image not shared" in html
    assert "no picture" not in html


def test_app_on_a_shared_folder_shows_crops(shared_folder: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed: pip install protopush[app]")
    from protopush.app.review_tabs import TILE as SIDE
    from protopush.app.review_tabs import thumbnails

    for c in range(3):
        for k, (both, _) in enumerate(thumbnails(open_run(shared_folder), c)):
            assert_is_crop(both.crop((0, 0, SIDE, SIDE)), shared_folder, (c, k))
            assert both.getpixel((SIDE + 18, 10)) == TILE


def test_crop_that_cannot_be_read_is_not_drawn(shared_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shared_folder, tmp_path / "run"))
    (folder / "prototypes" / crop_name(0, 0)).write_bytes(b"no picture")
    run = open_run(folder)
    assert (run.crop(0, 0), run.source(0, 0)) == (None, None)
    assert run.source(0, 1) is not None
    assert Cards(run, folder).card(0, 0)["missing"] == "The run keeps no picture of its training image."


def test_crop_of_another_patch_is_not_handed_on(shared_folder: Path, tmp_path: Path) -> None:
    """A prototype that was pushed within its image, where nobody can read that image: the old crop shows a lie."""
    model = ProtoModel.from_pretrained(shared_folder)
    manager = model.head.proto_manager
    anchor = manager.anchor(1, 0)
    assert anchor is not None
    x0, y0, x1, y1 = anchor.region
    manager.anchors[manager.index(1, 0)] = replace(anchor, region=(x0 + 16, y0, x1 + 16, y1))
    model.save_pretrained(tmp_path / "again")
    names = {file.name for file in (tmp_path / "again" / "prototypes").iterdir()}
    assert names == {crop_name(c, k) for c in range(3) for k in range(2)} - {crop_name(1, 0)}


def test_forbidden_patch_leaves_another_crop(crops_home: Path, tmp_path: Path) -> None:
    (crops_home / "away").rename(crops_home / "data")
    try:
        shutil.copytree(crops_home / "tuned", tmp_path / "run")
        before = (tmp_path / "run" / "prototypes" / crop_name(0, 0)).read_bytes()
        wish = ["--prototype", "bird:0", "--reason", "a rim", "--data.num_workers", "0"]
        assert main(["forbid", str(tmp_path / "run"), *wish]) == 0
        assert (tmp_path / "run" / "prototypes" / crop_name(0, 0)).read_bytes() != before
        assert all(check.holds for check in open_run(tmp_path / "run").verify(crops=True))
    finally:
        (crops_home / "data").rename(crops_home / "away")


def test_prototypes_are_their_crops_at_every_step_of_a_trained_backbone(crops_home: Path) -> None:
    run = open_run(crops_home / "tuned")
    model = run.model.train()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    first = None
    for _ in range(4):
        out = model(images)
        with preserve_state(model):
            slow = torch.stack(
                [run.head.embed(crop_features(run, slot)) for slot in run.head.proto_manager.used_slots()]
            )
        used = out.prototypes.flatten(0, 1)[run.head.proto_manager.valid_mask]
        torch.testing.assert_close(used, slow, rtol=0, atol=1e-5)
        first = slow if first is None else first
        optimizer.zero_grad()
        nn.functional.cross_entropy(out.logits, labels).backward()
        weight = next(model.backbone.parameters())
        assert weight.grad is not None
        assert float(weight.grad.abs().sum()) > 0
        optimizer.step()
        model.train()
        for module in model.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    assert first is not None
    assert float((slow - first).abs().max()) > 1e-4  # the backbone has moved, and the prototypes with it


@pytest.mark.parametrize("average", [[], ["--train.ema", "0.9"]], ids=["plain", "averaged"])
def test_every_epoch_ends_with_prototypes_that_are_their_crops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, average: list[str]
) -> None:
    """Every checkpoint of a training, and the best state in it, against windows cut from the image files."""
    checkpoint = RunWriter.checkpoint

    def keep(writer: RunWriter, epoch: int, state: Mapping[str, Any]) -> None:
        checkpoint(writer, epoch, state)
        shutil.copy(writer.folder / "checkpoints" / "last.pt", tmp_path / f"{epoch}.pt")

    monkeypatch.setattr(RunWriter, "checkpoint", keep)
    data = make_images(tmp_path / "data", ["bird", "cat", "dog"], 10, (80, 64))
    words = [
        "--push.start_epoch",
        "0",
        "--push.interval",
        "3",
        "--train.freeze_backbone",
        "false",
        "--train.epochs",
        "5",
    ]
    wish = ["--data.path", str(data), "--out", str(tmp_path / "run"), *WINDOWS, *LIVE, *words, *average]
    assert main(["train", *SMALL, *wish, "--train.backbone_lr", "0.01"]) == 0
    run, before = open_run(tmp_path / "run"), torch.zeros(6, 128)
    for epoch in range(1, 6):
        saved = torch.load(tmp_path / f"{epoch}.pt", weights_only=True)
        for state, anchors in ((saved["model"], saved["anchors"]), (saved["best"]["state"], saved["best"]["anchors"])):
            assert not run.model.load_state_dict(state, strict=False).missing_keys
            known = state["head.proto_manager.prototypes"]
            torch.testing.assert_close(known, from_files(run, anchors), rtol=0, atol=1e-5)
        now = saved["model"]["head.proto_manager.prototypes"]
        assert float((now - before).abs().max()) > 1e-3  # each epoch has moved them
        before = now


def from_files(run: Run, anchors: list[dict[str, Any]]) -> torch.Tensor:
    """The unit embeddings of anchors, one by one, from the windows of their image files."""
    found = []
    with preserve_state(run.model):
        for anchor in anchors:
            x0, y0, x1, y1 = map(int, anchor["region"])
            pixels = run.transform(read_image(run.root / anchor["file"]))[None, :, y0:y1, x0:x1]
            found.append(run.head.embed(run.model.backbone.embed_crops(pixels))[0])
    return torch.stack(found)


def test_windows_refuse_batch_norms_that_learn_from_batches(
    crops_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--data.path",
        str(crops_home / "away"),
        "--train.freeze_backbone",
        "false",
        "--train.freeze_norms",
        "false",
    ]
    assert main(["train", *SMALL, *WINDOWS, *LIVE, *words, "--out", str(crops_home / "none")]) == 2
    assert "leave train.freeze_norms true" in capsys.readouterr().err
    assert not (crops_home / "none").exists()
