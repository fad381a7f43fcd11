"""On a GPU all is as on the CPU: pushes, training in mixed precision and compiled, features, predictions, NCCL.

``PROTOPUSH_TEST_DEVICE=cpu pytest -m gpu tests/gpu`` runs the same on the CPU (gloo in place of NCCL), which proves no
more than that the tests themselves work.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed
from torch.multiprocessing import spawn
from torch.utils.data import DataLoader, DistributedSampler

from helpers import SMALL, interrupted_in_epoch, python
from protopush import ProtoModel, open_run
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.features import cache_features
from protopush.data.images import check_images
from protopush.data.sources import load_catalog
from protopush.testing import ProceduralParts

DEVICE = os.environ.get("PROTOPUSH_TEST_DEVICE", "cuda")
PLENTY = DEVICE == "cpu" or torch.cuda.device_count() > 1
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_gpus = pytest.mark.skipif(not PLENTY, reason="NCCL needs two GPUs for two ranks")
WINDOWS = {"size": 32, "stride": 16}
PUSHES = {
    "momentum": ({}, {"momentum": 0.9}),
    "hard": ({}, {"momentum": 0.0, "unique": "image"}),
    "live": ({"anchoring": "live"}, {}),
    "windows": ({"windows": WINDOWS, "anchoring": "live", "crop_size": 32}, {"unique": "image"}),
}
SMALL_WINDOWS = [
    *SMALL[:-2], "--model.windows.size", "32", "--model.image_size", "64", "--trainer.device", DEVICE
]  # fmt: skip
# Two phases, of which the first stores features; live anchors; a push after each epoch.
TUNED = [
    *SMALL_WINDOWS, "--train.freeze_backbone", "false", "--train.head_epochs", "1", "--train.epochs", "4",
    "--push.anchoring", "live", "--push.start_epoch", "1", "--push.interval", "1", "--push.final_decay", "0",
]  # fmt: skip
HOW = [
    *(pytest.param(precision, "false", id=precision) for precision in ("32-true", "bf16-mixed", "16-mixed")),
    pytest.param("bf16-mixed", "true", id="compiled"),
]


@pytest.fixture
def exact(monkeypatch) -> None:
    """Convolutions in float32: by default a GPU rounds their factors to ten bits (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Drawn images, and on windows a run of two epochs with a frozen backbone, trained on the device."""
    root = tmp_path_factory.mktemp("gpu")
    ProceduralParts(30, size=(64, 64)).write(root)
    words = ["train", "--data.path", str(root / "manifest.csv"), "--out", str(root / "run"), *SMALL_WINDOWS]
    assert main(words) == 0
    return root


def pushed(kind: str, device: str, rank: int = 0, world: int = 1) -> tuple[list[tuple[int, int]], torch.Tensor]:
    """The anchors of all prototypes; beside each its similarity and the runner-up's, then the prototypes."""
    torch.manual_seed(4)  # no two candidates so near to each other that rounding could decide
    data = ProceduralParts(24, size=(64, 64))
    options, push = PUSHES[kind]
    model = ProtoModel.create("test_resnet", 3, pretrained=False, num_prototypes=3, **options)
    loader = DataLoader(data, 5, sampler=DistributedSampler(data, world, rank))
    report = model.to(device).push_prototypes(loader, device, **push)
    anchors = [one.anchor for one in report.prototypes]
    rows = torch.tensor([(one.similarity, one.similarity_after, one.runner_up) for one in anchors])
    model.eval()
    with torch.no_grad():
        prototypes = model.head.prototypes().flatten(0, 1).cpu()
    return [(one.sample_id, one.cell) for one in anchors], torch.cat([rows, prototypes], dim=1)


@pytest.mark.parametrize("kind", PUSHES)
def test_a_push_is_that_of_the_cpu(exact, kind):
    (anchors, expected), (found, numbers) = pushed(kind, "cpu"), pushed(kind, DEVICE)
    assert (expected[:, 0] - expected[:, 2]).abs().min() > 1e-4
    assert found == anchors
    torch.testing.assert_close(numbers, expected, atol=1e-4, rtol=0)


def test_a_run_is_verified_on_both(home):
    for device in ("cpu", DEVICE):
        assert main(["verify", str(home / "run"), "--local", "--device", device]) == 0


def test_stored_features_are_those_of_the_cpu(exact, home, tmp_path):
    run = open_run(home / "run", device="cpu")
    images = ImageDataset(load_catalog(str(home / "manifest.csv")).samples, run.transform)
    hashes = check_images([sample.image for sample in images.samples])
    for precision, tolerance in (("float32", 1e-4), ("float16", 1e-2)):
        expected, found = (
            cache_features(
                run.model.backbone.to(device), images, hashes, tmp_path / str(place), device, precision=precision
            ).array
            for place, device in enumerate(("cpu", DEVICE))
        )
        assert expected.dtype == found.dtype == precision
        np.testing.assert_allclose(found, expected, atol=tolerance, rtol=tolerance)


def test_predictions_and_explanations_are_those_of_the_cpu(exact, home, tmp_path):
    files, tables, told = sorted(map(str, (home / "images").glob("*.png")))[:12], [], []
    for place, device in enumerate(("cpu", DEVICE)):
        run = open_run(home / "run", device=device, num_workers=0)
        run.predict(files, tmp_path / f"{place}.csv", threshold=0.5)
        tables.append(list(csv.reader((tmp_path / f"{place}.csv").open())))
        explained = json.dumps(run.explain(files[:4], tmp_path / str(place), why_not="class 0"))
        told.append(json.loads(explained.replace(str(tmp_path / str(place)), "")))
    assert len(tables[0]) == 13
    same(*tables)
    same(*told)


def same(one: Any, other: Any) -> None:
    """Assert that all is equal, numbers to 1e-4, also those that a table has as text."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        same(list(one.values()), list(other.values()))
    elif isinstance(one, (list, tuple)):
        for left, right in zip(one, other, strict=True):
            same(left, right)
    elif isinstance(one, float) or (isinstance(one, str) and re.fullmatch(r"-?\d+\.\d+(e-\d+)?", one)):
        assert float(other) == pytest.approx(float(one), abs=1e-4)
    else:
        assert other == one


def rank_main(rank: int, world: int, folder: str) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    torch.backends.cudnn.allow_tf32 = False
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    distributed.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({kind: pushed(kind, DEVICE, rank, world) for kind in PUSHES}, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


@two_gpus
def test_two_ranks_end_as_one_process(tmp_path):
    spawn(rank_main, (2, str(tmp_path)), nprocs=2)  # what is forked can't use CUDA if its parent has
    for kind in PUSHES:
        anchors, expected = pushed(kind, "cpu")
        (first, numbers), (second, others) = (torch.load(tmp_path / f"rank{rank}.pt")[kind] for rank in (0, 1))
        assert first == second == anchors
        assert torch.equal(numbers, others)
        torch.testing.assert_close(numbers, expected, atol=1e-4, rtol=0)


@two_gpus
def test_two_processes_train(home, tmp_path):
    words = ["train", "--data.path", home / "manifest.csv", "--out", tmp_path / "run", *TUNED, "--trainer.devices", 2]
    found = python("-m", "protopush", *words)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("Trained") == 1
    assert main(["verify", str(tmp_path / "run"), "--local", "--device", "cpu"]) == 0


@pytest.mark.parametrize(("precision", "compiled"), HOW)
def test_training_goes_on_and_is_verified_on_the_cpu(home, tmp_path, monkeypatch, precision, compiled):
    out = tmp_path / "run"
    words = ["train", "--data.path", str(home / "manifest.csv"), "--out", str(out), *TUNED,
             "--trainer.precision", precision, "--trainer.compile", compiled]  # fmt: skip
    with interrupted_in_epoch(monkeypatch, 3):
        assert main(words) == 130
    assert torch.load(out / "checkpoints" / "last.pt", weights_only=True)["epoch"] == 2
    assert main([*words, "--resume"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if "cross_entropy" in row]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in epochs)
    assert sum("min_dist" in row for row in rows) >= 4
    assert main(["verify", str(out), "--local", "--device", "cpu"]) == 0
