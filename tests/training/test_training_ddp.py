"""Training in two real processes: the curve of one with twice the batch, and each sample counted once."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forked import protopush, torchrun
from helpers import make_images
from protopush.cli import main

pytestmark = pytest.mark.ddp

# Layer norms, no dropout, no augmentation: nothing depends on how a batch is divided. All losses, all kinds of pushes.
WORDS = shlex.split("""
--model.backbone test_convnext --model.pretrained false --model.num_prototypes 2 --model.dropout 0
--model.max_prototypes 3 --train.epochs 4 --train.head_epochs 2 --train.freeze_backbone false --train.ema 0.9
--data.num_workers 0 --data.augment false --data.allow_duplicates true
--loss.cluster 0.3 --loss.separation 0.3 --loss.consistency 0.5
--loss.label_smoothing 0.1 --push.start_epoch 1 --push.interval 1 --push.final_decay 0 --push.guard report
--push.grow true --push.grow_below 1 --trainer.device cpu""")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ddp")
    for split, count in (("train", 10), ("val", 5)):  # 30 divide by 2, batches of 8 leave an odd rest; 15 don't
        make_images(root / "images" / split, ["bird", "cat", "dog"], count)
    return root


def run(home: Path, how: str, *words: str) -> Path:
    words = ("train", "--data.path", str(home / "images"), *WORDS, "--out", str(home / how), *words)
    cache = str(home / f"cache-{how}")
    if how == "torchrun":
        found = torchrun("-m", "protopush", *words, PROTOPUSH_CACHE=cache)
    else:
        found = protopush(*words, "--trainer.devices", 2, PROTOPUSH_CACHE=cache)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("Trained") == 1  # one process reports
    assert found.stderr.count("Epoch 1/4") == 1
    return home / how


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(home) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(home / "cache-alone"))
        words = ["train", "--data.path", str(home / "images"), *WORDS, "--train.batch_size", "16"]
        assert main([*words, "--out", str(home / "alone")]) == 0
    return home / "alone"


@pytest.mark.parametrize("how", [pytest.param("torchrun", marks=pytest.mark.slow), "devices"])
def test_two_processes_have_the_curve_of_one_with_twice_the_batch(home, alone, how):
    two = run(home, how, "--train.batch_size", "8")
    assert [row.keys() for row in rows(two)] == [row.keys() for row in rows(alone)]
    for one, other in zip(rows(alone), rows(two), strict=True):
        for term in ("loss", "cross_entropy", "grounding", "cluster", "separation", "orthogonality", "consistency"):
            if term in one:
                assert other[term] == pytest.approx(one[term], abs=1e-4)
        for when in ("val", "val_before", "val_after", "val_refitted"):
            if one.get(when):
                assert other[when]["n"] == one[when]["n"] == 15
                assert other[when]["auroc"] == pytest.approx(one[when]["auroc"], abs=1e-6)
        if "min_dist" in one:
            assert other["min_dist"] == pytest.approx(one["min_dist"], abs=1e-4)
    assert any(row.get("growth", {}).get("added") for row in rows(two))
    weights, others = (load_file(folder / "model.safetensors") for folder in (alone, two))
    assert max(float((weights[name].double() - others[name].double()).abs().max()) for name in weights) < 1e-4
    assert torch.load(two / "checkpoints" / "last.pt", weights_only=True)["epoch"] == 4
    assert main(["verify", str(two), "--device", "cpu"]) == 0


def test_two_processes_choose_the_same_prototypes(home, monkeypatch):
    words = shlex.split("--push.grow false --model.num_prototypes 6 --model.max_prototypes 6 --push.rows 2")
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache-chosen"))
    images = ["--data.path", str(home / "images"), "--train.batch_size", "16", "--out", str(home / "chosen-alone")]
    assert main(["train", *WORDS, *words, *images]) == 0
    two = run(home, "chosen", *words, "--train.batch_size", "8")
    choices = [row["choice"] for folder in (home / "chosen-alone", two) for row in rows(folder) if "choice" in row]
    assert len(choices) == 2
    losses = [[choice.pop(name) for name in ("loss_before", "loss_after")] for choice in choices]
    assert choices[0] == choices[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert choices[0]["prototypes"] == {"bird": 2, "cat": 2, "dog": 2}
    weights, others = (load_file(folder / "model.safetensors") for folder in (home / "chosen-alone", two))
    assert max(float((weights[name].double() - others[name].double()).abs().max()) for name in weights) < 1e-4


def test_one_process_tells_what_is_wrong_and_all_end(home, tmp_path):
    words = ["train", "--data.path", home / "nothing", *WORDS, "--out", tmp_path / "run"]
    found = protopush(*words, "--trainer.devices", 2)
    assert found.returncode == 2
    assert found.stderr.count("protopush: error") == 1
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()
