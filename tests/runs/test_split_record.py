"""Splits that a run keeps: files that come, go and move never turn training images into others."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import CLASSES, interrupted_in_epoch, refused
from protopush import open_run
from protopush.cli import main
from protopush.data.manifest import DataConfig
from protopush.runs.split_record import NEW, open_catalog, read_split


def make(root: Path, seed: int, per_class: int, start: int = 0) -> None:
    """Images of each class, with numbers from ``start`` on; no two are alike."""
    random = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(start, start + per_class):
            pixels = random.integers(0, 90, (32, 32, 3))
            pixels[..., number] += 120
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03d}.png")


def words(data: Path, out: Path, epochs: int) -> list[str]:
    given = ["train", "--data.path", data, "--model.backbone", "test_resnet", "--model.pretrained", "false",
             "--model.windows", "null", "--model.num_prototypes", 1, "--train.epochs", epochs,
             "--out", out]  # fmt: skip
    return list(map(str, given))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("split-record")
    make(root / "data", 0, 20)
    assert main(words(root / "data", root / "run", 2)) == 0
    return root


def splits(data: Path, run: Path) -> dict[str, str]:
    catalog = open_catalog(DataConfig(path=str(data), source="auto"), CLASSES, run)
    return {sample.name: sample.split for sample in catalog.samples}


def test_the_run_holds_name_hash_split_and_group_of_every_image(home):
    rows = read_split(home / "run")
    assert len(rows) == 60
    assert {row["split"] for row in rows.values()} == {"train", "val", "test"}
    assert all(len(row["sha256"]) == 64 for row in rows.values())


def test_images_that_come_later_move_no_other_one(home, tmp_path, caplog):
    before = {name: row["split"] for name, row in read_split(home / "run").items()}
    shutil.copytree(home / "data", tmp_path / "data")
    make(tmp_path / "data", 1, 5, start=20)
    with caplog.at_level(logging.WARNING):
        after = splits(tmp_path / "data", home / "run")
    assert {name: after[name] for name in before} == before
    assert {split for name, split in after.items() if name not in before} == {NEW}
    assert "15 images came after the training" in caplog.text
    drawn_again = splits(tmp_path / "data", tmp_path / "no run")
    assert any(drawn_again[name] != split for name, split in before.items())  # what would have happened


def test_missing_images_are_named_and_the_others_stay(home, tmp_path, caplog):
    before = {name: row["split"] for name, row in read_split(home / "run").items()}
    shutil.copytree(home / "data", tmp_path / "data")
    (tmp_path / "data" / "cat" / "003.png").unlink()
    with caplog.at_level(logging.WARNING):
        after = splits(tmp_path / "data", home / "run")
    assert after == {name: split for name, split in before.items() if name != "cat/003.png"}
    assert "1 images of the training are missing: cat/003.png" in caplog.text


def test_other_images_of_the_same_names_have_the_splits_of_their_source(home, tmp_path):
    make(tmp_path / "data", 2, 12)
    assert splits(tmp_path / "data", home / "run") == splits(tmp_path / "data", tmp_path / "no run")


def test_a_training_image_is_never_tested_whatever_its_name(home, tmp_path, capsys, caplog):
    data = tmp_path / "data"
    make(data / "test", 3, 2)
    make(data / "train", 4, 1)
    trained = [name for name, row in read_split(home / "run").items() if row["split"] == "train"]
    for number, name in enumerate(trained[:2]):
        shutil.copy(home / "data" / name, data / "test" / "cat" / f"copy{number}.png")
    run = open_run(home / "run")
    run.data.update(path=str(data))
    with caplog.at_level(logging.WARNING):
        assert run.evaluate("test")["n"] == 6
    assert "since the run was trained on these files: test/cat/copy0.png, test/cat/copy1.png" in caplog.text
    for name in CLASSES:
        shutil.rmtree(data / "test" / name)
        (data / "test" / name).mkdir()
        of_class = next(one for one in trained if one.startswith(name))
        shutil.copy(home / "data" / of_class, data / "test" / name / "x.png")
    text = refused(capsys, "evaluate", home / "run", "--data.path", data, logged=True)
    assert "the run was trained on every image of 'test'" in text


def test_a_run_that_goes_on_keeps_its_splits(home, tmp_path, monkeypatch):
    shutil.copytree(home / "data", tmp_path / "data")
    given = words(tmp_path / "data", tmp_path / "run", 3)
    with interrupted_in_epoch(monkeypatch, 3):
        assert main(given) == 130
    before = read_split(tmp_path / "run")
    make(tmp_path / "data", 5, 3, start=20)
    assert main([*given, "--resume"]) == 0
    assert read_split(tmp_path / "run") == before
    anchors = {anchor.file for anchor in open_run(tmp_path / "run").head.proto_manager.anchors}
    assert all(before[file]["split"] == "train" for file in anchors)
