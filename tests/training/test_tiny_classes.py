"""Classes of one image and a few, classes that a split lacks, more prototypes than patches: right, or refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from helpers import SMALL, refused, save_noise
from protopush import open_run
from protopush.cli import main

CLASSES = ["a", "b", "c"]


def make(root: Path, *parts: tuple[str, str, int]) -> Path:
    """A manifest of so many images for each (class, split)."""
    rows = []
    for name, split, count in parts:
        for _ in range(count):
            file = f"{name}{len(rows)}.png"
            save_noise(root / file, CLASSES.index(name), len(rows))
            rows.append([file, name, split])
    with (root / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "split"], *rows])
    return root / "m.csv"


def words(manifest: Path, *more: str) -> list[str]:
    return ["train", "--data.path", str(manifest), "--out", str(manifest.parent / "run"), *SMALL, *more]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Path:
    """One image of each of two classes, and no other split."""
    root = tmp_path_factory.mktemp("single")
    assert main(words(make(root, ("a", "", 1), ("b", "", 1)))) == 0
    return root


@pytest.fixture(scope="module")
def lacking(tmp_path_factory) -> tuple[Path, str]:
    """Validation and test images of two of three classes, more prototypes than patches, an image each; and the log."""
    root = tmp_path_factory.mktemp("lacking")
    parts = [("a", "train", 1), ("b", "train", 4), ("c", "train", 4)]
    manifest = make(root, *parts, *((name, split, 2) for split in ("val", "test") for name in "bc"))
    more = ["--model.num_prototypes", "30", "--push.unique", "image", "--push.start_epoch", "1", "--push.interval", "1",
            "--push.guard", "report", "--train.prior", "balanced"]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("protopush.training.setup.logger.warning", lambda text, *more: lines.append(text % more))
        assert main(words(manifest, *more)) == 0
    return root, "\n".join(lines)


def test_one_image_a_class_goes_through_all_that_needs_no_other_split(single, capsys):
    run, manifest = single / "run", single / "m.csv"
    assert main(["evaluate", str(run), "--data.split", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["n"], sum(map(sum, found["confusion"])), found["per_class"]["a"]["n"]) == (2, 2, 1)
    assert main(["predict", str(run), str(manifest), "--out", str(single / "p.csv")]) == 0
    assert "nothing_similar is empty: no image in split 'val'" in capsys.readouterr().out
    assert main(["explain", str(run), str(single / "a0.png"), "--out", str(single / "x"), "--why_not", "b"]) == 0
    assert main(["push", str(run), "--out", str(single / "pushed"), "--unique", "image"]) == 0
    assert main(["verify", str(run)]) == 0
    for command in ("evaluate", "report"):
        line = refused(capsys, command, run, logged=True)
        assert "no image in split 'test' under" in line
        assert "expected one of: train" in line
    line = refused(capsys, "forbid", run, "--image", "a0.png", "--reason", "no", logged=True)
    assert "no allowed patch is left for a:0, a:1; add training images or forbid less; nothing was changed" in line
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_images_a_class(tmp_path, capsys, count):
    manifest = make(tmp_path, ("a", "", count), ("b", "", count))
    assert main(words(manifest, "--model.num_prototypes", "9", "--push.anchoring", "live", "--push.unique", "image",
                      "--push.start_epoch", "0", "--push.interval", "1")) == 0  # fmt: skip
    assert all(check.holds for check in open_run(tmp_path / "run").verify())
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data.split", "all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2 * count


def test_a_class_that_a_split_lacks_is_named_and_the_means_are_over_the_others(lacking, capsys):
    (root, log), run = lacking, str(lacking[0] / "run")
    assert "no validation images of a: the best epoch is chosen by the other classes" in log
    assert main(["evaluate", run]) == 0
    said = capsys.readouterr()
    assert "no images of a in split 'test': means are over the other classes" in said.err
    assert said.out.rstrip().endswith("no images of a: means are over the other classes")
    assert "nan" not in said.out.lower()
    assert main(["evaluate", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["predict", run, str(root / "m.csv"), "--out", str(root / "p.csv")]) == 0
    with (root / "m.csv").open() as manifest, (root / "p.csv").open() as table:
        pairs = list(zip(csv.DictReader(manifest), csv.DictReader(table), strict=True))
    shares = []
    for name in "bc":
        right = [row["predicted"] == name for one, row in pairs if (one["label"], one["split"]) == (name, "test")]
        assert len(right) == 2
        shares.append(sum(right) / 2)
    assert found["balanced_accuracy"] == pytest.approx(sum(shares) / 2)
    row = found["per_class"]["a"]
    assert (row["n"], row["sensitivity"], row["auroc"]) == (0, None, None)
    assert main(["report", run, "--faithfulness", "2", "--resamples", "20"]) == 0
    page = (root / "run" / "report.html").read_text(encoding="utf-8")
    assert "No images of a: means are over the other classes." in page


def test_more_prototypes_than_patches_share_them_and_each_is_a_real_patch(lacking):
    run = open_run(lacking[0] / "run")
    checks = run.verify()
    assert len(checks) == 90
    assert all(check.holds for check in checks)
    assert {check.file for check in checks if check.class_name == "a"} == {"a0.png"}


@pytest.mark.parametrize(("parts", "more", "expected"), [
    ([("a", "", 5)], [], "only one class (a) under"),
    ([("a", "train", 3), ("b", "val", 2)], [], "classes without a training image: b"),
    ([("a", "train", 3), ("b", "train", 3), ("a", "val", 2)], ["--train.select", "auroc"],
     "train.select is auroc, but all 2 validation images are of one class; expected two or more"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_before_an_image_is_read(
    tmp_path, capsys, monkeypatch, parts, more, expected
):
    monkeypatch.setattr("protopush.data.images._check", lambda *_: pytest.fail("read"))
    assert expected in refused(capsys, *words(make(tmp_path, *parts), *more))
    assert not (tmp_path / "run").exists()
