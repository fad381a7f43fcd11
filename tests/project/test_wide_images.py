"""Inputs that are no squares, through all that a run can do: rows are never taken for columns.

(ONNX: ``tests/runs/test_export.py``, whose runs have 64 x 96 pixels.)"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from helpers import SMALL, refused
from protopush.cli import main
from protopush.data.images import read_image
from protopush.data.transforms import Preprocessing, TrainTransform, as_pixels
from protopush.runs.run import open_run

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEIGHT = 200, 100  # of the files; in the model's input, 96 x 64 pixels, they are 128 x 64, less 16 on both sides
SCALE, LEFT = 0.64, 16
PART = (148, 72, 170, 96)  # far right, at the bottom, and seen: up to pixel 175
KINDS = {
    "windows": ["--model.windows.size", "32", "--model.windows.stride", "16", "--push.anchoring", "live"],
    "stage": ["--model.windows", "null", "--model.stage", "1"],
}
BLUR = 5  # pixels of the file, by which resizing carries over the edge of a box


def draw(file: Path, label: int, seed: int) -> None:
    """Grey noise with a red or a blue part far right, at the bottom."""
    pixels = np.random.default_rng(seed).integers(60, 180, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    ImageDraw.Draw(picture).rectangle(PART, fill=("red", "blue")[label])
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("wide")
    for place, (split, count) in enumerate((("train", 6), ("val", 2), ("test", 2))):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                draw(root / "data" / split / name / f"{index}.png", label, 100 * place + 10 * label + index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        for name, words in KINDS.items():
            given = ["--data.path", str(root / "data"), "--out", str(root / name), "--model.image_size", "[64, 96]"]
            assert main(["train", *given, *SMALL, "--train.epochs", "1", "--push.start_epoch", "0", *words]) == 0
        yield root


def on_file(region: list[float]) -> list[int]:
    """A region of the input in pixels of the file, by hand: columns are cropped, rows are not."""
    x0, y0, x1, y1 = region
    return [round(edge / SCALE) for edge in (x0 + LEFT, y0, x1 + LEFT, y1)]


def anchors_of(run: Path) -> list[dict]:
    return [entry["anchor"] for entry in json.loads((run / "prototypes.json").read_text())["prototypes"]]


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_lie_where_they_are_said_to_lie(home, kind):
    run = open_run(home / kind)
    regions = run.model.backbone.regions
    assert run.transform.preprocessing.size == regions.size == (64, 96)
    assert max(box[2] for box in regions.boxes) == 96
    assert max(box[3] for box in regions.boxes) == 64
    for anchor in anchors_of(home / kind):
        assert anchor["region"] == list(regions.boxes[anchor["cell"]])
        assert anchor["box"] == on_file(anchor["region"])
        assert anchor["sees"] == on_file(list(regions.sees[anchor["cell"]]))
        assert anchor["image_size"] == [WIDTH, HEIGHT]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_what_a_cell_sees_in_the_file_changes_it(home, kind):
    run = open_run(home / kind)
    regions, random_ = run.model.backbone.regions, np.random.default_rng(0)
    pixels = np.asarray(read_image(home / "data" / "test" / "cat" / "0.png"))
    cells = [0, len(regions) - 1, regions.raster[1] - 1] if kind == "stage" else range(len(regions))

    def patches(values: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return run.model.backbone(run.transform(Image.fromarray(values))[None]).patches[0]

    whole = patches(pixels)
    for cell in cells:
        x0, y0, x1, y1 = on_file(list(regions.sees[cell]))
        noise = random_.integers(0, 255, pixels.shape, dtype=np.uint8)
        outside, inside = noise.copy(), pixels.copy()
        rows = slice(max(y0 - BLUR, 0), y1 + BLUR)
        columns = slice(max(x0 - BLUR, 0), x1 + BLUR)
        outside[rows, columns] = pixels[rows, columns]
        inside[y0:y1, x0:x1] = noise[y0:y1, x0:x1]
        torch.testing.assert_close(patches(outside)[cell], whole[cell], atol=1e-4, rtol=1e-4)
        assert (patches(inside)[cell] - whole[cell]).abs().max() > 1e-3


def test_the_box_of_the_part_holds_the_part(home):
    """Of all patches those that change most where the part is painted over are those whose boxes hold it."""
    for kind in KINDS:
        run = open_run(home / kind)
        image = read_image(home / "data" / "test" / "cat" / "0.png")
        bare = image.copy()
        ImageDraw.Draw(bare).rectangle(PART, fill=(120, 120, 120))
        with torch.no_grad():
            with_part, without = (run.model.backbone(run.transform(one)[None]).patches[0] for one in (image, bare))
        best = int((with_part - without).norm(dim=1).argmax())
        x0, y0, x1, y1 = on_file(list(run.model.backbone.regions.boxes[best]))
        assert min(x1, PART[2]) > max(x0, PART[0])
        assert min(y1, PART[3]) > max(y0, PART[1])


def test_crops_hold_the_pixels_of_the_box(home):
    for anchor, file in zip(anchors_of(home / "windows"), sorted((home / "windows" / "prototypes").glob("class*.png")),
                            strict=True):  # fmt: skip
        picture = Image.open(home / "data" / anchor["file"]).convert("RGB").resize((128, 64), Image.Resampling.BILINEAR)
        x0, y0, x1, y1 = map(int, anchor["region"])
        crop = Image.open(file)
        assert crop.size == (32, 32)
        assert np.array_equal(np.asarray(crop), np.asarray(picture)[y0:y1, x0 + LEFT : x1 + LEFT])


@pytest.mark.parametrize("kind", KINDS)
def test_commands(home, tmp_path, capsys, kind):
    run, image = home / kind, home / "data" / "test" / "cat" / "1.png"
    assert main(["verify", str(run), *(["--local", "--images", "2"] if kind == "windows" else [])]) == 0
    if kind == "windows":
        assert main(["verify", str(run), "--crops"]) == 0
        assert main(["rebuild", str(run), "--out", str(tmp_path / "again")]) == 0
        assert main(["verify", str(tmp_path / "again"), "--root", str(home / "data")]) == 0
    assert main(["explain", str(run), str(image), "--out", str(tmp_path / "explained")]) == 0
    told = json.loads((tmp_path / "explained" / "1.json").read_text())
    assert told["image_size"] == [WIDTH, HEIGHT]
    regions = open_run(run).model.backbone.regions
    for evidence in told["classes"]:
        for match in evidence["matches"]:
            assert match["box"] == on_file(list(regions.boxes[match["cell"]]))
    assert main(["predict", str(run), str(image.parent), "--out", str(tmp_path / "table.csv")]) == 0
    with (tmp_path / "table.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["file"].endswith("1.png"))
    found = {one["class_name"]: one["probability"] for one in told["classes"]}
    for name, probability in found.items():
        assert float(row[f"probability_{name}"]) == pytest.approx(probability, abs=1e-4)
    assert main(["report", str(run), "--out", str(tmp_path / "page.html"), "--faithfulness", "2"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "96 × 64 pixels" in page
    x0, y0, x1, y1 = anchors_of(run)[0]["box"]
    share = [100 * x0 / WIDTH, 100 * y0 / HEIGHT, 100 * (x1 - x0) / WIDTH, 100 * (y1 - y0) / HEIGHT]
    frames = re.findall(r"left: ?([\d.]+)%; ?top: ?([\d.]+)%; ?width: ?([\d.]+)%; ?height: ?([\d.]+)%", page)
    assert any(np.allclose([float(one) for one in frame], share, atol=0.02) for frame in frames)
    capsys.readouterr()


def test_the_app_shows_the_boxes_of_the_command(home):
    pytest.importorskip("gradio")
    from protopush.app.explain_tab import Shown
    from protopush.app.run_store import RunStore
    from protopush.app.upload import read_upload

    store = RunStore(home / "windows")
    run = store.run()
    shown = Shown.of(run, read_upload(home / "data" / "test" / "cat" / "0.png"))
    for match in shown.explain(store, run).classes[0].matches:
        assert list(match.box) == on_file(list(run.model.backbone.regions.boxes[match.cell]))


@pytest.mark.parametrize(("size", "wide", "high"), [((64, 64), 640, 480), ((64, 128), 640, 320), ((128, 64), 320, 640)])
def test_random_crops_keep_the_shape_of_things(size, wide, high):
    """The scale along rows over that along columns, measured on a picture whose colours are its coordinates."""
    x, y = np.meshgrid(np.linspace(0, 255, wide), np.linspace(0, 255, high))
    picture = Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).astype(np.uint8))
    preprocessing = Preprocessing(size=size)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    transform, stretched = TrainTransform(preprocessing), []
    for _ in range(60):
        pixels = as_pixels(transform(picture), preprocessing).float()
        across = (pixels[0, :, -1] - pixels[0, :, 0]).abs().mean() / size[1] * wide
        down = (pixels[1, -1] - pixels[1, 0]).abs().mean() / size[0] * high
        stretched.append(float(across / down))
    assert 0.9 < np.median(stretched) < 1.1


def test_sizes_that_are_none(home, tmp_path, capsys):
    words = ["train", "--data.path", home / "data", "--out", tmp_path / "run", *SMALL, "--model.image_size"]
    assert "model.image_size is [64, 7]; expected at least 8" in refused(capsys, *words, "[64, 7]")
    message = refused(capsys, *words, "[64, 96, 3]")
    assert "model.image_size is [64, 96, 3]; expected pixels of a side, or [height, width]" in message
    words = ["evaluate", home / "windows", "--views", 8]
    assert "expected square; give 4 views" in refused(capsys, *words, logged=True)
