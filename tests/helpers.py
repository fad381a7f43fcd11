"""Images, models, runs and commands that tests of several rooms need."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from forked import Forked
from protopush import ProtoModel, PushMixin
from protopush.cli import main
from protopush.data.manifest import Catalog
from protopush.data.regions import Regions
from protopush.data.sources.dermoscopy import CLASSES as ISIC_CLASSES
from protopush.data.transforms import View
from protopush.nn.prototypes import PrototypeManager
from protopush.training.trainer import Trainer

# Data.

CLASSES = ["bird", "cat", "dog"]
SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 2


def make_images(root: Path, classes: list[str], per_class: int, size: tuple[int, int] = (40, 32)) -> Path:
    """Folders of noisy images whose mean colour is their class's."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = random.integers(0, 60, (size[1], size[0], 3))
            pixels[..., number % 3] += 120 + 20 * (number // 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root


# What undoes each EXIF orientation, so that the file's pixels lie as a camera writes them.
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def save_turned(picture: Image.Image, file: Path, orientation: int) -> None:
    """A picture as a camera of this EXIF orientation saves it."""
    exif, undo = Image.Exif(), TURNED[orientation]
    exif[0x0112] = orientation
    (picture if undo is None else picture.transpose(undo)).save(file, exif=exif)


def make_masked_images(root: Path) -> Path:
    """A manifest of 40x32 pictures, each but the first of a class with a mask: its left half."""
    make_images(root / "images", CLASSES, 10)
    mask = np.zeros((32, 40), dtype=np.uint8)
    mask[:, :20] = 255
    rows = []
    for name in CLASSES:
        for i, split in enumerate(SPLITS):
            path = root / "masks" / f"{name}-{i}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(mask).save(path)
            rows.append([f"images/{name}/{i:03d}.png", name, split, f"masks/{path.name}" if i else ""])
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "split", "mask"], *rows])
    return root / "manifest.csv"


def noise(label: int, number: int, size: int = 32) -> np.ndarray:
    """Noise whose mean colour is its label's."""
    pixels = np.random.default_rng([label, number]).integers(0, 60, (size, size, 3))
    pixels[..., label % 3] += 100 + 20 * (label // 3)
    return pixels.astype(np.uint8)


def save_noise(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(label, number)).save(path)


def write_table(path: Path, header: str, rows: list[list[object]], separator: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header.replace(",", separator), *(separator.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A plain tar, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def edit(path: Path, old: str, new: str) -> None:
    """Put new text in the place of old, which is there."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def counts(catalog: Catalog) -> dict[str, dict[str, int]]:
    """Images by split and class."""
    found: dict[str, Counter[str]] = {}
    for sample in catalog.samples:
        found.setdefault(sample.split, Counter())[catalog.classes[sample.label]] += 1
    return {split: dict(number) for split, number in found.items()}


def make_isic(root: Path, parts: tuple[str, ...] = ("Training", "Validation", "Test"), lesions: int = 4) -> Path:
    """ISIC 2018 in small: seven classes, two images of each training lesion, the second another class's neighbour."""
    groupings, number = [], 0
    for part in parts:
        rows = []
        for label in range(7):
            for lesion in range(lesions if part == "Training" else 1):
                for _ in range(2):
                    name, number = f"ISIC_{number:07d}", number + 1
                    rows.append([name, *(float(label == other) for other in range(7))])
                    save_noise(root / f"ISIC2018_Task3_{part}_Input" / f"{name}.jpg", label, number)
                    if part == "Training":
                        groupings.append([name, f"HAM_{label}{lesion:06d}", "histopathology"])
        name = f"ISIC2018_Task3_{part}_GroundTruth"
        write_table(root / name / f"{name}.csv", f"image,{','.join(ISIC_CLASSES)}", rows)
        for text in ("ATTRIBUTION.txt", "LICENSE.txt"):
            (root / f"ISIC2018_Task3_{part}_Input" / text).write_text("CC-BY-NC")
    write_table(
        root / "ISIC2018_Task3_Training_LesionGroupings.csv", "image,lesion_id,diagnosis_confirm_type", groupings
    )
    return root


# Models.


class ToyNet(PushMixin, nn.Module):
    """Somebody else's model: images are patches (B, L, C) already; anything goes in between."""

    def __init__(self, classes: int, prototypes: int, channels: int = 6, dim: int | None = None) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.proj = nn.Identity() if dim is None else nn.Sequential(nn.Linear(channels, dim), nn.Dropout(0.5))
        self.head.proto_manager = PrototypeManager(classes, prototypes, dim or channels)
        self.norm = nn.BatchNorm1d(channels)  # in train mode its statistics would move

    def extract_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = images.flatten(2).transpose(1, 2) if images.ndim == 4 else images
        self.norm(patches.transpose(1, 2))
        return patches.mean(1, keepdim=True), patches


def cell_box(view: View, cell: int, grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """A cell of a (rows, columns) grid over what the model sees, in pixels of the original."""
    return view.original_box(Regions.grid(grid, (view.crop[1], view.crop[0])).boxes[cell])


def assert_prototypes_are_patches(model: ProtoModel, images: Tensor, grid: tuple[int, int]) -> None:
    """Each prototype is the embedding of the very patch that its anchor names."""
    manager = model.head.proto_manager
    for row, anchor in enumerate(manager.anchors):
        assert anchor is not None
        assert anchor.region == model.backbone.regions.boxes[anchor.cell]
        assert model.backbone.regions.raster == grid
        patch = model.backbone(images[anchor.sample_id][None]).patches[0, anchor.cell]
        embedding = nn.functional.normalize(model.head.proj(patch), dim=-1)
        torch.testing.assert_close(manager.prototypes[row], embedding, atol=1e-5, rtol=1e-5)


# Runs.

# A run that takes seconds; words after these override them.
SMALL = ["--model.backbone", "test_resnet", "--model.pretrained", "false", "--model.num_prototypes", "2",
         "--train.epochs", "2", "--trainer.device", "cpu", "--train.batch_size", "8",
         "--data.num_workers", "0", "--model.windows", "null"]  # fmt: skip


def train_small(root: Path, data: Path, epochs: int) -> Path:
    """A run over small images in ``root/run``, its cache beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        words = ["train", "--data.path", str(data), "--out", str(root / "run")]
        assert main([*words, *SMALL, "--train.epochs", str(epochs)]) == 0
    return root


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first process of a test session makes and the others find (as the docs of pytest-xdist do)."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    done = folder.with_suffix(".made")
    with FileLock(folder.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@contextmanager
def interrupted_in_epoch(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    """Within the block a training is interrupted when its epoch of this number, from 1, begins."""
    epoch = Trainer.epoch

    def cut_off(self: Trainer, place: int) -> dict[str, float]:
        if place + 1 == number:
            raise KeyboardInterrupt
        return epoch(self, place)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "epoch", cut_off)
        yield


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def anchors(run: Path) -> dict[tuple[str, int], dict]:
    found = json.loads((run / "prototypes.json").read_text())["prototypes"]
    return {(entry["class"], entry["prototype"]): entry["anchor"] for entry in found}


# Processes and commands.


def start_ranks(main: Callable[[int, int, str], None], world: int, folder: Path) -> None:
    """``main(rank, world, folder)``, a function of a module, in ``world`` processes."""
    start = f"import sys; sys.path[:] = {sys.path}; from {main.__module__} import {main.__name__} as main\n"
    ranks = [Forked(program=f"{start}main({rank}, {world}, {str(folder)!r})") for rank in range(world)]
    while (codes := {rank.poll() for rank in ranks}) <= {None, 0} and None in codes:
        time.sleep(0.01)
    for rank in ranks:  # where one has failed, the others would wait for it
        if rank.poll() is None:
            os.kill(rank.pid, signal.SIGKILL)
    assert codes == {0}, "\n".join(rank.stderr for rank in ranks)


def python(*words: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with one thread: its exit code, and all that it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd, env=environment
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], *words: object, code: int = 2, logged: bool = False) -> str:
    """The one line that a refused command prints; ``logged``: the last one, after those of its log."""
    capsys.readouterr()
    assert main([str(word) for word in words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    *log, line = err.splitlines()
    assert log == [] or logged
    assert line.startswith("protopush: error: ")
    assert not any("Traceback" in line or "error: " in line for line in log)
    return line
