"""Each example as its docstring says: run as a script, on small images, with right and with wrong words."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from forked import torchrun
from helpers import make_images

EXAMPLES = Path(__file__).parents[2] / "examples"
DDP = ["--backbone", "test_convnext", "--size", "64", "--epochs", "2", "--push-start", "1", "--push-interval", "1"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("examples") / "images"
    for split, count in {"train": 9, "val": 1, "test": 2}.items():
        make_images(root / split, ["bird", "cat", "dog"], count)
    return root


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_tell_how_to_run_them(script):
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert f"python examples/{script.name} " in text.split('"""')[1]


@pytest.fixture
def printed(monkeypatch, capsys):
    """What a script prints; in this process, which has imported all that it needs."""

    def of(script: str, *words: object) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return of


def test_your_own_model_prints_what_each_push_did(images, printed):
    words = ["--epochs", "16", "--classes", "cat", "bird", "--per-class", "7"]
    told, header, *rows = printed("your_own_model.py", images, *words).splitlines()
    assert told == "14 training, 2 validation images: cat, bird"
    assert header.split() == ["epoch", "min_dist", "after", "mean_dist", "after", "accuracy", "after"]
    values = [[float(word) for word in row.split()] for row in rows]
    assert [row[0] for row in values] == [8, 12]
    for _, least, least_after, mean, mean_after, *accuracies in values:
        assert 0 < least_after < least <= mean <= 2
        assert mean_after < mean
        assert all(accuracy in (0.0, 0.5, 1.0) for accuracy in accuracies)  # one image of each class
    assert values[1][3] < values[0][3]


@pytest.mark.slow
@pytest.mark.ddp
def test_train_ddp_in_one_process_and_in_two(images, printed):
    two = torchrun(EXAMPLES / "train_ddp.py", images, *DDP)
    assert two.returncode == 0, two.stderr
    for out, told in ((printed("train_ddp.py", images, *DDP), "1 process,"), (two.stdout, "2 processes,")):
        first, second, last = out.splitlines()  # rank 0 alone prints
        for epoch, line in enumerate((first, second), start=1):
            assert line.startswith(f"epoch {epoch}: 27 images, 108 patches, mean distance ")  # each image once
            before, after = map(float, re.findall(r"\d\.\d+", line))
            assert after < before
        assert re.fullmatch(rf"{told} the same prototypes on each: sha256 [0-9a-f]{{16}}", last)


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("your_own_model.py", [], "the following arguments are required: data"),
        ("your_own_model.py", ["nowhere"], "error: no such file: nowhere"),
        ("your_own_model.py", ["IMAGES", "--epochs", "two"], "error: argument --epochs: invalid int value: 'two'"),
        ("your_own_model.py", ["IMAGES", "--epochs", "2"], "error: no push would follow any of 2 epochs"),
        (
            "your_own_model.py",
            ["IMAGES", "--classes", "cat", "wolf"],
            "['cat', 'wolf']; expected one or more of ('bird',",
        ),
        ("your_own_model.py", ["IMAGES", "--per-class", "0"], "error: 0 images of ["),
        ("train_ddp.py", ["nowhere"], "error: no such file: nowhere"),
        ("train_ddp.py", ["IMAGES", "--size", "ten"], "argument --size: invalid positive value: 'ten'"),
        ("train_ddp.py", ["IMAGES", "--backbone", "resnet1"], "error: timm has no model 'resnet1'"),
    ],
)
def test_wrong_words_give_one_line_and_exit_code_2(images, script, words, told, monkeypatch, capsys):
    words = [str(images) if word == "IMAGES" else word for word in words]
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert told in err
    assert err.count("\n") == 1
