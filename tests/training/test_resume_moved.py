"""A run that was cut off goes on where its images lie now, with other workers, and never on other images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from helpers import CLASSES, SMALL, interrupted_in_epoch, make_images, refused
from protopush import open_run
from protopush.cli import main
from protopush.runs.split_record import read_split

OPTIONS = [*SMALL, "--train.epochs", "3", "--train.head_epochs", "1", "--train.freeze_backbone", "false",
           "--data.augment", "false", "--push.start_epoch", "1", "--push.interval", "1"]  # fmt: skip


def words(data: Path, out: Path) -> list[str]:
    return ["train", "--data.path", str(data), "--out", str(out), *OPTIONS]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Images, a whole run, and the same run cut off in its third epoch."""
    root = tmp_path_factory.mktemp("moved")
    make_images(root / "images", CLASSES, 10)
    for seed, file in enumerate(sorted((root / "images").rglob("*.png"))):  # no two are the same file
        Image.open(file).rotate(seed % 7).save(file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        assert main(words(root / "images", root / "whole")) == 0
        with interrupted_in_epoch(patch, 3):
            assert main(words(root / "images", root / "cut")) == 130
    return root


@pytest.fixture
def moved(home, tmp_path) -> tuple[Path, Path]:
    """A copy of the images in another place, and of the run that was cut off."""
    shutil.copytree(home / "images", tmp_path / "elsewhere")
    shutil.copytree(home / "cut", tmp_path / "run")
    return tmp_path / "elsewhere", tmp_path / "run"


def assert_ends_as(run: Path, other: Path) -> None:
    weights, others = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert (run / "prototypes.json").read_bytes() == (other / "prototypes.json").read_bytes()
    assert (run / "split.csv").read_bytes() == (other / "split.csv").read_bytes()


def test_it_goes_on_where_the_images_are_now_and_says_what_differs(home, moved, capsys):
    data, run = moved
    assert main([*words(data, run), "--data.num_workers", "1", "--resume"]) == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if "Going on with other options" in line)
    assert f"data.path was {home / 'images'}, is {data}" in said
    assert "data.num_workers was 0, is 1" in said
    assert_ends_as(run, home / "whole")
    assert json.loads((run / "config.json").read_text())["data"]["path"] == str(data)
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["path"] == str(data)
    assert all(check.holds for check in open_run(run).verify())


def test_images_and_classes_that_came_later_have_no_part_and_the_order_is_the_recorded_one(home, moved, capsys):
    data, run = moved
    make_images(data, ["ant"], 2)
    Image.open(data / "cat" / "000.png").rotate(90).save(data / "cat" / "new.png")
    names = [*sorted(read_split(run), reverse=True), "cat/new.png", "ant/000.png", "ant/001.png"]
    with (data / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *([name, name.split("/")[0]] for name in names)])
    assert main([*words(data / "manifest.csv", run), "--resume"]) == 0
    assert "3 images came after the training began, and have no part: cat/new.png" in capsys.readouterr().err
    assert_ends_as(run, home / "whole")


@pytest.mark.parametrize("place", ["elsewhere", "images"])
@pytest.mark.parametrize("what", ["changed", "missing", "relabelled", "all others"])
def test_other_images_are_refused_by_name(home, moved, capsys, what, place):
    data, run = moved
    if place == "images":  # in the very place where they were
        options = yaml.safe_load((run / "config.yaml").read_text())
        options["data"]["path"] = str(data)
        (run / "config.yaml").write_text(yaml.safe_dump(options))
    files = sorted(data.rglob("*.png"))
    if what == "changed":
        Image.new("RGB", (40, 32), "red").save(files[3])
        expected = "1 images of the run in {run} are other files (SHA-256): bird/003.png; expected those that"
    elif what == "missing":
        files[3].unlink()
        expected = "1 images of the run in {run} are missing under {data}: bird/003.png; expected those that"
    elif what == "relabelled":
        rows = [[name, "cat" if name == "bird/003.png" else name.split("/")[0]] for name in read_split(run)]
        with (data / "m.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["image", "label"], *rows])
        expected = "have another class or group: bird/003.png (was 'bird', is 'cat'); expected those that"
        data = data / "m.csv"
    else:
        for seed, file in enumerate(files):
            Image.new("RGB", (40, 32), (seed, 0, 9)).save(file)
        expected = "30 images of the run in {run} are other files (SHA-256): bird/000.png, bird/001.png"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    line = refused(capsys, *words(data, run), "--resume", logged=True)
    assert expected.format(run=run, data=data) in line
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("option", "was", "now"), [
    ("model.num_prototypes", "2", "3"),
    ("model.backbone", "test_resnet", "test_vit"),
    ("data.split_seed", "0", "5"),
    ("train.seed", "0", "1"),
    ("train.batch_size", "8", "4"),
    ("train.lr", "0.001", "0.01"),
])  # fmt: skip
def test_what_would_make_it_another_run_is_refused_with_both_values(moved, capsys, option, was, now):
    data, run = moved
    assert f"({option} was {was}, is {now})" in refused(capsys, *words(data, run), f"--{option}", now, "--resume")


def test_options_that_came_with_a_newer_version_are_as_they_were_by_default(home, moved):
    data, run = moved
    options = yaml.safe_load((run / "config.yaml").read_text())
    del options["push"]["rows"], options["data"]["max_megapixels"], options["train"]["sampling"]
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    rows = (run / "split.csv").read_text().splitlines()
    (run / "split.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows) + "\n")  # it had no labels
    assert main([*words(data, run), "--resume"]) == 0
    assert read_split(run) == {name: {**row} for name, row in read_split(run).items() if "label" not in row}
    assert (run / "model.safetensors").read_bytes() == (home / "whole" / "model.safetensors").read_bytes()


def test_another_precision_goes_on(moved, capsys):
    data, run = moved
    assert main([*words(data, run), "--trainer.precision", "16-mixed", "--resume"]) == 0
    assert "trainer.precision was 32-true, is 16-mixed" in capsys.readouterr().err
