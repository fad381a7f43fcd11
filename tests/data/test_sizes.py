"""Images of every size, one limit of pixels in all commands, and tables of many rows."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import CLASSES, SMALL, make_images, refused
from protopush import open_run
from protopush.app.upload import Limits, read_upload
from protopush.cli import main
from protopush.data.images import check_images, image_size, read_image, read_mask_file
from protopush.data.transforms import INTERPOLATIONS, RESAMPLING, EvalTransform, Preprocessing
from protopush.errors import InputError
from protopush.predict.inputs import Pictures, Strings

THIN = [(1, 1), (1, 5000), (5000, 1), (2, 3), (1, 300)]  # (width, height)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run on images of which five of each class are tiny or thin, in every split."""
    root = tmp_path_factory.mktemp("sizes")
    make_images(root / "images", CLASSES, 10)
    random = np.random.default_rng(1)
    for number, name in enumerate(CLASSES):
        for place, (width, height) in enumerate(THIN):
            pixels = random.integers(0, 90, (height, width, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name / f"thin{place}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        words = ["--out", str(root / "run"), *SMALL, "--data.allow_duplicates", "true"]
        assert main(["train", "--data.path", str(root / "images"), *words]) == 0
    return root


@pytest.fixture(autouse=True)
def _cache(home, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache"))


@pytest.mark.parametrize("command", [
    "evaluate {run} --data.split all",
    "report {run} --faithfulness 2 --resamples 0",
    "verify {run} --local --images 2",
    "predict {run} {data} --out {new}/p.csv",
    "data audit {data}",
    "forbid {run} --image bird/thin1.png --reason thin",
    "explain {run} {data}/cat/thin1.png --out {new} --regions",
    "explain {run} {data}/cat/thin0.png {data}/cat/thin2.png {data}/cat/thin3.png {data}/cat/thin4.png --out {new}",
])  # fmt: skip
def test_tiny_and_thin_images_go_through_every_command(home, tmp_path, capsys, command):
    places = {"run": home / "run", "data": home / "images", "new": tmp_path}
    code = main(command.format(**places).split())
    said = capsys.readouterr()
    assert code == 0 or command.startswith("data"), said.err  # an audit may find leaks
    if command.startswith("predict"):
        assert "images (" in said.out
        assert "without a prediction" not in said.out
    if command.startswith("data"):
        assert "images with a side below 32 pixels" in said.out


@pytest.mark.parametrize("how", [name for name in INTERPOLATIONS if name in RESAMPLING])
@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 5000), (5000, 3), (3, 4999)])
def test_of_a_narrow_image_the_same_pixels_are_made_as_of_the_whole(monkeypatch, how, size):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    image, transform = Image.fromarray(pixels), EvalTransform(Preprocessing(size=(32, 48), interpolation=how), 0.875)
    whole = np.asarray(transform.visible(image)).astype(int)
    monkeypatch.setattr("protopush.data.transforms.NARROW", 0)
    seen = np.asarray(transform.visible(image)).astype(int)
    assert seen.shape == (32, 48, 3)
    if how == "nearest":  # a pixel between two may be either
        assert (seen != whole).mean() < 0.05
        return
    view = transform.view(size)
    (x, y), (width, height) = view.offset, view.crop
    rows_first = image.resize((size[0], view.resized[1]), RESAMPLING[how]).resize(view.resized, RESAMPLING[how])
    other = np.asarray(rows_first.crop((x, y, x + width, y + height))).astype(int)
    assert min(abs(seen - whole).max(), abs(seen - other).max()) <= 2  # Pillow rounds between rows and columns


def test_a_line_takes_no_more_memory_than_a_picture(tmp_path, monkeypatch):
    """1 x 100,000 pixels would cover 224 x 224 with 5,000,000,000."""
    Image.new("RGB", (1, 100_000), (10, 200, 30)).save(tmp_path / "line.png")
    transform, made = EvalTransform(Preprocessing()), []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *more, **how: made.append(size) or resize(self, size, *more, **how)
    )
    tensor, problem = Pictures(Strings([str(tmp_path / "line.png")]), transform)[0]
    assert (problem, made) == ("", [(224, 224)])
    assert torch.allclose(tensor, transform(Image.new("RGB", (9, 9), (10, 200, 30))))


def test_one_limit_holds_in_all_commands(home, tmp_path, capsys):
    """40 x 32 pixels are within 0.005 million, and 1 x 5000; 100 x 90 are beyond it."""
    data, run = tmp_path / "images", home / "run"
    make_images(data, CLASSES, 10)
    make_images(data / "large", ["x"], 1, size=(100, 90))
    large = data / "cat" / "large.png"
    (data / "large" / "x" / "000.png").rename(large)
    (data / "large" / "x").rmdir()
    (data / "large").rmdir()
    limit, why = ["--data.max_megapixels", "0.005"], "100 x 90 pixels, more than data.max_megapixels 0.005"
    advice = "remove or replace them, or raise data.max_megapixels"
    for words in (
        ["train", "--data.path", data, "--out", tmp_path / "run", *SMALL],
        ["explain", run, large, "--out", tmp_path / "explained"],
        ["evaluate", run, "--data.path", data, "--data.split", "all"],
        ["report", run, "--data.path", data, "--data.split", "all"],
        ["push", run, "--data.path", data, "--data.split", "all", "--out", tmp_path / "pushed"],
        ["verify", run, "--local", "--data.path", data, "--data.split", "all"],
    ):
        line = refused(capsys, *words, *limit, logged=True) if words[0] != "verify" else None
        if line is None:
            assert main([*map(str, words), *limit]) == 2
            line = capsys.readouterr().err.splitlines()[-1]
        assert f"1 unreadable image: {large} ({why}); expected whole image files; {advice}" in line
    assert list(tmp_path.iterdir()) == [data]
    assert main(["data", "audit", str(data), *limit, "--json"]) in (0, 1)
    assert json.loads(capsys.readouterr().out)["unreadable"] == {"cat/large.png": why}
    words = ["predict", run, data, "--out", tmp_path / "p.csv", "--threshold", "0", "--json", *limit]
    assert main(list(map(str, words))) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == {why: 1}
    with pytest.raises(InputError, match=r"large\.png has 0 megapixels; at most 0\.005 are allowed"):
        read_upload(large, Limits(megapixels=0.005))


def test_a_run_keeps_its_limit_until_another_is_given(home, tmp_path):
    run = home / "run"
    assert open_run(run).data["max_megapixels"] == 100
    assert open_run(run, max_megapixels=300).data["max_megapixels"] == 300
    with pytest.raises(InputError, match=r"data\.max_megapixels is 0; expected more than 0"):
        open_run(run, max_megapixels=0)


def test_pillows_own_limit_is_neither_an_error_nor_a_warning_and_stays_as_it_was(tmp_path, monkeypatch):
    Image.new("L", (400, 300), 255).save(tmp_path / "a.png")
    Image.new("RGB", (400, 300), "red").save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for file in (tmp_path / "a.png", tmp_path / "a.jpg"):
            assert read_image(file).size == image_size(file) == (400, 300)
            assert read_upload(file).image.size == (400, 300)
            assert len(check_images([file] * 50)) == 50
        assert read_mask_file(tmp_path / "a.png").all()
    assert Image.MAX_IMAGE_PIXELS == 1000
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
