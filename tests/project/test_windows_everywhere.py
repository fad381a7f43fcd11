"""Windows and stages through all that a run can do: every box, map and number is that of the regions."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import protopush
from helpers import SMALL, make_masked_images, refused
from protopush.backbones import Features
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image
from protopush.data.regions import Regions
from protopush.data.sources import load_catalog
from protopush.errors import InputError
from protopush.push import grow_prototypes
from protopush.runs.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {
    "windows": ["--model.image_size", "96", "--model.windows.size", "32", "--model.windows.stride", "16"],
    "stage": ["--model.image_size", "64", "--model.stage", "1"],
    "plain": ["--model.image_size", "64"],
}
LIVE = ["--push.anchoring", "live", "--push.start_epoch", "0", "--push.unique", "image", "--data.crop_pct", "0.9",
        "--model.max_prototypes", "3", "--train.epochs", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    """``data`` (40x32 pixels, with masks) and a run of each kind on it: live, on the middle of the images."""
    root = tmp_path_factory.mktemp("everywhere")
    data = ["--data.path", str(make_masked_images(root / "data"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        for name, words in KINDS.items():
            assert main(["train", *data, "--out", str(root / name), *SMALL, *LIVE, *words]) == 0
        yield root


@pytest.fixture
def run(home, tmp_path) -> Path:
    """The run on windows, of one's own."""
    return Path(shutil.copytree(home / "windows", tmp_path / "run"))


def answer(capsys, *words: object, code: int = 0) -> dict:
    """What a command prints with ``--json``."""
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == code
    found: dict = json.loads(capsys.readouterr().out)
    return found


def anchors_of(folder: Path) -> list[dict]:
    entries = json.loads((folder / "prototypes.json").read_text())["prototypes"]
    return [entry["anchor"] for entry in entries]


def assert_anchors_are_windows(folder: Path) -> None:
    """Each anchor is the crop of its file: what the backbone makes of its region alone is the prototype."""
    opened = open_run(folder)
    manager, net = opened.head.proto_manager, opened.model.backbone.model
    for c, k in manager.used_slots():
        anchor = manager.anchor(c, k)
        assert anchor is not None
        assert anchor.region == opened.model.backbone.regions.boxes[anchor.cell]
        assert anchor.sees == anchor.box
        pixels = opened.transform(read_image(opened.root / anchor.file))
        x0, y0, x1, y1 = map(int, anchor.region)
        with torch.no_grad():
            feature = net.embed(pixels[None, :, y0:y1, x0:x1])
            embedding = torch.nn.functional.normalize(opened.head.proj(feature), dim=-1)
        torch.testing.assert_close(opened.head.prototypes()[c, k], embedding[0], rtol=0, atol=1e-5)


def test_the_run_keeps_its_windows(home):
    opened = open_run(home / "windows")
    assert opened.model.backbone.is_local
    assert len(opened.model.backbone.regions) == 25
    assert_anchors_are_windows(home / "windows")
    assert len(list((home / "windows" / "prototypes").glob("*.jpg"))) == 6
    assert main(["verify", str(home / "windows")]) == 0


def test_explanations_show_windows(home, tmp_path, capsys):
    image = home / "data" / "images" / "cat" / "009.png"
    found = answer(capsys, "explain", home / "windows", image, "--out", tmp_path, "--why_not", "dog")
    (told,) = found if isinstance(found, list) else [found]
    opened = open_run(home / "windows")
    regions, view = opened.model.backbone.regions, opened.transform.view((40, 32))
    with torch.no_grad():
        maps = opened.model(opened.transform(read_image(image))[None]).maps[0]
    x0, y0, x1, y1 = view.seen
    assert (x0, y0) != (0, 0)  # something is left out
    for evidence in told["classes"]:
        for match in evidence["matches"]:
            assert match["sees"] == match["box"] == list(view.original_box(regions.boxes[match["cell"]]))
            left, top, right, bottom = match["box"]
            assert x0 <= left < right <= x1
            assert y0 <= top < bottom <= y1
            own = maps[match["class_index"], match["prototype"]]
            np.testing.assert_allclose(match["values"], own, atol=1e-6)
            assert max(match["values"]) == match["values"][match["cell"]] == match["similarity"]
    assert told["regions"] == json.loads(json.dumps(regions.to_dict()))
    assert Image.open(tmp_path / "009.png").width == 1480


def test_a_local_model_has_no_region_to_check(home, tmp_path, capsys):
    image = home / "data" / "images" / "cat" / "009.png"
    words = ["explain", home / "windows", image, "--out", tmp_path, "--regions", "true"]
    assert "the box is all" in refused(capsys, *words)
    assert not list(tmp_path.iterdir())
    words[1] = home / "stage"
    assert main([str(word) for word in words]) == 0


def test_predictions_are_those_of_the_windows(home, tmp_path, capsys):
    capsys.readouterr()
    out, folder = tmp_path / "found.csv", home / "data" / "images" / "dog"
    assert main(["predict", str(home / "windows"), str(folder), "--out", str(out), "--data.num_workers", "0"]) == 0
    opened = open_run(home / "windows")
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    for row in rows:
        pixels = opened.transform(read_image(folder / Path(row["file"]).name))
        with torch.no_grad():
            output = opened.model(pixels[None])
        assert row["predicted"] == opened.class_names[int(output.logits.argmax())]
        assert float(row["best_similarity"]) == pytest.approx(float(output.similarities.amax()), abs=1e-4)


def test_evaluation_report_and_gallery(home, run, capsys):
    numbers = answer(capsys, "evaluate", run, "--data.num_workers", "0")
    assert numbers["n"] == 6
    found = answer(capsys, "report", run, "--resamples", "0", "--faithfulness", "2", "--data.num_workers", "0")
    page = Path(found["report"]).read_text()
    assert "cuts the image into 25 windows, each of which is seen alone" in page
    assert "nothing outside the box can change this" in page
    assert "Measured in 8 places" in page
    assert found["localization"] is not None
    assert (run / "prototypes.png").stat().st_size > 10_000
    for kind, said in {"stage": "sees more than its box", "plain": "sees the whole image"}.items():
        opened = protopush.open_run(home / kind, num_workers=0, device="cpu")
        page, _ = opened.report(home / f"{kind}.html", audit=False, resamples=0, faithfulness=1)
        assert said in page.read_text()
        assert "nothing outside the box can change this" not in page.read_text()


@pytest.mark.parametrize("words", [["--prototype", "cat:1"], ["--image", "IMAGE"], ["--mask_column"]])
def test_forbidding_and_undoing(home, run, capsys, words):
    before = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file()}
    old = anchors_of(run)
    words = [old[2]["file"] if word == "IMAGE" else word for word in words]
    share = ["--min_share", "0.9"] if words == ["--mask_column"] else []
    made = answer(capsys, "forbid", run, *words, *share, "--reason", "ruler", "--data.num_workers", "0")
    new = anchors_of(run)
    assert made["replaced"]
    assert new != old
    assert_anchors_are_windows(run)
    if share:
        opened = open_run(run)
        for anchor in new:  # masks are the left half of the original
            x0, _, x1, _ = anchor["box"]
            assert anchor["file"].endswith("000.png") or (min(x1, 20) - x0) / (x1 - x0) >= 0.8
        assert opened.model.backbone.is_local
    assert main(["verify", str(run)]) == 0
    answer(capsys, "forbid", run, "--undo", "1", "--reason", "no", "--data.num_workers", "0")
    after = {file.name: file.read_bytes() for file in run.iterdir() if file.is_file() and file.name in before}
    assert after == before


def test_another_push(home, tmp_path, capsys):
    words = ["push", home / "windows", "--out", tmp_path / "pushed", "--unique", "group", "--data.num_workers", "0"]
    found = answer(capsys, *words, "--momentum", "0")
    assert len(found["prototypes"]) == 6
    assert_anchors_are_windows(tmp_path / "pushed")
    assert main(["verify", str(tmp_path / "pushed"), "--local", "--images", "2", "--data.num_workers", "0"]) == 0


def test_growth_takes_windows(home):
    opened = open_run(home / "windows")
    dataset = ImageDataset(load_catalog(home / "data" / "manifest.csv").split("train"), opened.transform)
    grown = grow_prototypes(opened.model, DataLoader(dataset, batch_size=5), "cpu", min_coverage=1.0)
    assert grown.added
    manager = opened.head.proto_manager
    for c in range(3):
        anchor = manager.anchor(c, 2)
        assert anchor is not None
        assert anchor.region == opened.model.backbone.regions.boxes[anchor.cell]
        assert anchor.box == anchor.sees == opened.transform.view((40, 32)).original_box(anchor.region)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_to_share_opens_the_same(home, tmp_path, kind):
    model = protopush.load(home / kind)
    model.save_pretrained(tmp_path / "shared")
    again = protopush.load(tmp_path / "shared")
    assert again.backbone.regions == model.backbone.regions
    assert again.head.proto_manager.anchors == model.head.proto_manager.anchors
    images = torch.randn(2, 3, *model.backbone.preprocessing.size)
    with torch.no_grad():
        for one, two in zip(model(images), again(images), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["windows", "stage"])
def test_onnx_has_the_windows_inside(home, tmp_path, kind):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    opened = protopush.open_run(home / kind, device="cpu")
    done = opened.export(tmp_path / "model.onnx")
    assert done.difference <= 1e-4
    session = onnxruntime.InferenceSession(str(done.file), providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, *opened.transform.preprocessing.size)
    names = ["logits", "similarities", "best_cells"]
    with torch.no_grad():
        wanted = opened.model(images)
    for count in (1, 2, 5):
        logits, similarities, cells = session.run(names, {"images": images[:count].numpy()})
        np.testing.assert_allclose(logits, wanted.logits[:count], atol=1e-4)
        np.testing.assert_allclose(similarities, wanted.similarities[:count], atol=1e-4)
        assert cells.max() < len(opened.model.backbone.regions)
    said = json.loads(session.get_modelmeta().custom_metadata_map["regions"])
    assert Regions.from_dict(said) == opened.model.backbone.regions


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_local_is_measured(home, capsys, kind):
    words = ["verify", home / kind, "--local", "--images", "3", "--data.num_workers", "0", "--device", "cpu"]
    found = answer(capsys, *words)["locality"]
    assert found["claimed"] == (kind == "windows")
    assert len(found["places"]) == 6 + 3
    if kind == "windows":
        assert found["largest"] <= 1e-6
    else:
        assert found["largest"] > 1e-3
        assert max(place["beyond"] for place in found["places"]) <= 1e-6
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert ("Nothing outside a box" in said) == (kind == "windows")
    assert ("only that replaced which it does not see" in said) == (kind == "stage")


@pytest.mark.parametrize("images", [3, 1000])  # more than there are: all of them
def test_the_proof_shows_how_far_it_is(home, tmp_path, monkeypatch, images):
    steps = {}

    @contextmanager
    def bar(what, total):
        steps[what] = [total, 0]

        def advance(count):
            steps[what][1] += count

        yield advance

    monkeypatch.setattr("protopush.runs.progress.bar", bar)
    run = protopush.open_run(home / "windows", device="cpu", num_workers=0)
    places = len(run.locality(images=images))
    assert steps.pop("Replacing what lies outside the boxes") == [places, places]
    run.report(tmp_path / "report.html", resamples=0, audit=False, faithfulness=images)
    assert steps["Replacing what lies outside the boxes"] == [min(places, 6 + 16)] * 2


def test_a_claim_that_is_not_kept_is_found(home, run, capsys, monkeypatch):
    """The embedding of a window that is given the image's mean besides: no box can hide that."""
    from protopush.backbones.windows import WindowedModel

    forward = WindowedModel.forward
    monkeypatch.setattr(
        WindowedModel, "forward", lambda self, images: forward(self, images + images.mean(dim=(1, 2, 3), keepdim=True))
    )
    words = ["verify", run, "--local", "--images", "2", "--data.num_workers", "0", "--device", "cpu"]
    assert answer(capsys, *words, code=1)["locality"]["largest"] > 1e-6


def test_a_stage_sees_more_than_its_cells_and_less_than_the_image(home):
    opened = open_run(home / "stage")
    regions = opened.model.backbone.regions
    stored = json.loads((home / "stage" / "config.json").read_text())["backbone"]["recipe"]
    assert stored["stage"] == 1
    assert tuple(map(tuple, stored["sees"])) == regions.sees
    for box, seen in zip(regions.boxes, regions.sees, strict=True):
        assert seen[0] <= box[0] < box[2] <= seen[2]
        assert (seen[2] - seen[0]) * (seen[3] - seen[1]) < 64 * 64
        assert seen != box
    assert not opened.model.backbone.is_local
    for anchor in opened.head.proto_manager.anchors:
        if anchor is not None:
            view = opened.transform.view((40, 32))
            assert anchor.sees == view.original_box(regions.sees[anchor.cell])
            assert anchor.sees != view.seen
    features: Features = opened.model.backbone(torch.zeros(1, 3, 64, 64))
    assert features.regions == regions


# The default.


def test_windows_are_the_default_and_are_left_out_by_null(home, tmp_path):
    words = ["train", "--data.path", str(home / "data/manifest.csv"), "--out", str(tmp_path / "run"), *SMALL]
    words = words[: words.index("--model.windows")]  # as people train, but for the size of things
    assert main([*words, "--train.epochs", "1", "--model.image_size", "128", "--data.num_workers", "0"]) == 0
    regions = open_run(tmp_path / "run").model.backbone.regions
    assert (len(regions), regions.boxes[1], regions.is_local) == (9, (32.0, 0.0, 96.0, 64.0), True)
    assert not open_run(home / "plain").model.backbone.is_local


def test_a_window_that_is_the_whole_image_is_refused(home, tmp_path, capsys):
    words = ["train", "--data.path", str(home / "data/manifest.csv"), "--out", str(tmp_path / "run"), *SMALL]
    words = words[: words.index("--model.windows")]
    message = refused(capsys, *words, "--model.image_size", "64")
    assert "model.windows.size is 64, and images have 64x64 pixels: one window is all of an image" in message
    assert "--model.windows null" in message
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_takes_no_picture_of_that_size_says_what_helps():
    with pytest.raises(InputError, match=r"does not take windows of 64x64 pixels .*window_input 224, which enlarges"):
        protopush.create_backbone("levit_128s", pretrained=False, windows=64)
    enlarged = protopush.create_backbone("levit_128s", pretrained=False, windows=64, window_input=224)
    assert enlarged.is_local
