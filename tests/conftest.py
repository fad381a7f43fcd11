"""Shared fixtures: a small foreign model, small image folders, and the real dermoscopy images where they are."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from protopush import ProtoModel, PushMixin
from protopush._compat import ensure_torchvision
from protopush.cli import main
from protopush.nn.prototypes import PrototypeManager

ensure_torchvision()  # also for the process that hands out the tests: it imports what a warning comes from

HAM = Path(__file__).resolve().parents[2] / "shared" / "data" / "ham10000"

WORDS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ham() -> Path:
    if not (HAM / "manifest.csv").is_file():
        pytest.skip(f"the dermoscopy images are not at {HAM}")
    return HAM


@pytest.fixture(autouse=True)
def _log_as_imported() -> None:
    """Commands write the log to the stderr of their time; that of an earlier test is closed."""
    log = logging.getLogger("protopush")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)


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


@pytest.fixture
def toy() -> type[ToyNet]:
    return ToyNet


def make_images(root: Path, classes: list[str], per_class: int, size: tuple[int, int] = (40, 32)) -> Path:
    """Folders of noisy images whose mean colour tells the class."""
    random = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            pixels = random.integers(0, 60, (size[1], size[0], 3))
            pixels[..., number % 3] += 120 + 20 * (number // 3)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{index:03d}.png")
    return root


# A run that takes seconds; words after these override them.
SMALL = ["--model.backbone", "test_resnet", "--model.pretrained", "false", "--model.num_prototypes", "2",
         "--train.epochs", "2", "--trainer.device", "cpu", "--train.batch_size", "8",
         "--data.num_workers", "0"]  # fmt: skip


def train_small(root: Path, data: Path, epochs: int) -> Path:
    """A run over small images in ``root/run``, its cache beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        words = ["train", "--data.path", str(data), "--out", str(root / "run")]
        assert main([*words, *SMALL, "--train.epochs", str(epochs)]) == 0
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", ["bird", "cat", "dog"], 10)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Images this small are quicker so, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_prototypes_are_patches(model: ProtoModel, images: Tensor, grid: tuple[int, int]) -> None:
    """Each prototype is the embedding of the very patch that its anchor names."""
    manager = model.head.proto_manager
    for row, anchor in enumerate(manager.anchors):
        assert anchor is not None
        assert anchor.grid == grid
        patch = model.backbone(images[anchor.sample_id][None]).patches[0, anchor.cell]
        embedding = nn.functional.normalize(model.head.proj(patch), dim=-1)
        torch.testing.assert_close(manager.prototypes[row], embedding, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: no page is looked at")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium, args=WORDS)
        yield found
        found.close()
