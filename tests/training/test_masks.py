"""Masks in training: anchors lie on them, and similarity off them is penalised; none is needed to predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import SMALL
from protopush import open_run
from protopush.cli import main
from protopush.data.dataset import mask_shares, read_mask
from protopush.data.manifest import DataConfig
from protopush.evaluation.measure import measure
from protopush.runs.run import open_split

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = ["--model.image_size", "64", "--model.windows.size", "24", "--model.windows.stride", "8"]
LIVE = ["--push.anchoring", "live", "--push.start_epoch", "1", "--push.interval", "1", "--train.epochs", "6"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose halves both show the class, each in a colour of its own; the mask is the left half."""
    root = tmp_path_factory.mktemp("halves")
    random, rows = np.random.default_rng(0), ["image,label,split,mask"]
    Image.fromarray(np.repeat(np.repeat([[255, 0]], 32, axis=1), 64, axis=0).astype(np.uint8)).save(root / "mask.png")
    for label, number in np.ndindex(3, 12):
        pixels = random.integers(0, 60, (64, 64, 3))
        pixels[:, :32, label] += 120
        pixels[:, 32:, (label + 1) % 3] += 180
        Image.fromarray(pixels.astype(np.uint8)).save(root / f"{label}-{number}.png")
        rows.append(f"{label}-{number}.png,class{label},{'train' if number < 8 else 'val'},mask.png")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root / "manifest.csv"


def trained(manifest: Path, out: Path, *words: str) -> dict[str, float]:
    assert main(["train", *SMALL, *WINDOWS, *LIVE, "--data.path", str(manifest), *words, "--out", str(out)]) == 0
    run = open_run(out)
    train, catalog = open_split(DataConfig(**run.data), "train", run.class_names, run.transform, run.folder)
    known = {sample.name: sample for sample in catalog.samples}
    found = measure(run, train, "train", known, resamples=0, faithfulness=0).numbers["localization"]
    assert found is not None
    shares = []
    for anchor in run.head.proto_manager.anchors:
        assert anchor is not None
        assert anchor.box is not None
        sample, (x0, y0, x1, y1) = known[str(anchor.sample_id)], anchor.box
        share = float(mask_shares(sample, run.transform, [anchor.region])[0])
        assert share == pytest.approx(read_mask(sample)[y0:y1, x0:x1].mean(), abs=1e-9)  # box and region are one place
        shares.append(share)
    return {**found, "least": min(shares)}


def test_anchors_lie_on_masks_and_peaks_move_there(manifest: Path, tmp_path: Path) -> None:
    without = trained(manifest, tmp_path / "without")
    anchored = trained(manifest, tmp_path / "anchored", "--push.min_mask_share", "0.6")
    both = trained(manifest, tmp_path / "both", "--push.min_mask_share", "0.6", "--loss.off_mask", "5")
    assert without["least"] < 0.6 <= min(anchored["least"], both["least"])
    assert without["peaks_on_mask"] < both["peaks_on_mask"]
    assert both["peaks_on_mask"] > 0.9


def test_off_mask_needs_masks_and_patches_that_have_one(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--data.path", open_run(home / "run").data["path"], "--out", str(tmp_path / "run")]
    for words in (["--push.min_mask_share", "0.5"], ["--loss.off_mask", "1"]):
        assert main(["train", *SMALL, *words, *out]) == 2
        assert "has a mask; expected a manifest with a column 'mask'" in capsys.readouterr().err
    assert main(["train", *SMALL, "--loss.off_mask", "1", "--train.freeze_backbone", "false", *out]) == 2
    assert "expected a frozen backbone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_image_without_a_mask_is_not_restricted(masked_home: Path) -> None:
    run = open_run(masked_home / "run")
    dataset, _ = open_split(DataConfig(**run.data), "train", run.class_names, run.transform, run.folder)
    bare = replace(dataset.samples[0], mask=None)
    assert torch.equal(mask_shares(bare, run.transform, [(0.0, 0.0, 8.0, 8.0)]), torch.ones(1, dtype=torch.float64))
