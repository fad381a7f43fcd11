"""Shared fixtures: a small foreign model, small image folders, runs, and the real dermoscopy images where they are."""

from __future__ import annotations

import gc
import logging
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers import CLASSES, ToyNet, contents, made_once, make_images, make_masked_images, train_small
from protopush._compat import ensure_torchvision

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; what tests start would ignore it too
    signal.signal(signal.SIGINT, signal.default_int_handler)

ensure_torchvision()  # also for the process that hands out the tests: it imports what a warning comes from

HAM = Path(__file__).resolve().parents[2] / "shared" / "data" / "ham10000"

WORDS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


def pytest_collection_finish() -> None:
    """What is imported by now stays: counting a million such objects again and again took minutes."""
    gc.freeze()


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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory) -> Iterator[None]:
    """Nothing is read from or written to the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def toy() -> type[ToyNet]:
    return ToyNet


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", CLASSES, 10)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Iterator[Path]:
    """``images``, and a ``run`` of two epochs on them; a test that changes anything takes a copy."""
    root = made_once(
        tmp_path_factory, "home", lambda root: train_small(root, make_images(root / "images", CLASSES, 10), 2)
    )
    yield from unchanged(root)


@pytest.fixture(scope="session")
def masked_home(tmp_path_factory) -> Iterator[Path]:
    """``data`` with masks, and a ``run`` of one epoch on its manifest; a test that changes anything takes a copy."""
    root = made_once(tmp_path_factory, "masked", lambda root: train_small(root, make_masked_images(root / "data"), 1))
    yield from unchanged(root)


def unchanged(root: Path) -> Iterator[Path]:
    def state() -> dict[Path, bytes]:
        return {file: data for file, data in contents(root).items() if file.parts[0] != "cache"}

    before = state()
    yield root
    assert {file for file, data in before.items() ^ state().items()} == set()


@pytest.fixture
def run(home, tmp_path) -> Path:
    """A run of one's own."""
    return Path(shutil.copytree(home / "run", tmp_path / "run"))


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Images this small are quicker so, above all beside other tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
