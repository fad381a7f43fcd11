"""``protopush predict``: every column against one image at a time, and the same bytes however often it is cut off."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from forked import Forked, torchrun
from helpers import refused
from protopush.cli import main
from protopush.data.manifest import Sample
from protopush.errors import InputError
from protopush.explain import explain_image
from protopush.models.model_folder import Run
from protopush.predict import inputs as predicted_inputs
from protopush.predict import prediction as predicting
from protopush.predict import resumable_csv
from protopush.predict import threshold as thresholds
from protopush.predict.inputs import Pictures, Strings, list_inputs
from protopush.predict.prediction import predict, shown
from protopush.predict.resumable_csv import ResumableCsv
from protopush.predict.threshold import Threshold, halved, largest_threshold
from protopush.runs.run import open_run

CLASSES = ["bird", "cat", "dog"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _cache(home, monkeypatch) -> None:
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache"))


@pytest.fixture
def run(home) -> Run:
    return open_run(home / "run")


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened, strict=True))


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def told(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main(["predict", *map(str, words), "--device", "cpu", "--data.num_workers", "0", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# The oracle: one image at a time, through protopush.explain.


def check_row(run: Run, row: dict[str, str], file: str, top: int, threshold: float) -> None:
    found = explain_image(run.model, file, run.transform, run.class_names, top_classes=len(run.class_names))
    said = found.classes[0]
    assert (row["file"], row["predicted"], row["error"]) == (file, said.class_name, "")
    assert float(row["probability"]) == pytest.approx(said.probability, abs=2e-6)
    for evidence in found.classes:
        assert float(row[f"probability_{evidence.class_name}"]) == pytest.approx(evidence.probability, abs=2e-6)
    for n in range(top):
        cells = [row[f"top{n + 1}_{what}"] for what in ("prototype", "similarity", "file", "cell")]
        if n >= len(said.matches):
            assert cells == ["", "", "", ""]
            continue
        match = said.matches[n]
        assert cells[0] == f"{said.class_name}:{match.prototype}"
        assert float(cells[1]) == pytest.approx(match.similarity, abs=2e-6)
        anchor = match.anchor
        assert cells[2:] == (["", ""] if anchor is None else [anchor.file, str(anchor.cell)])
    best = max(match.similarity for evidence in found.classes for match in evidence.matches)
    assert float(row["best_similarity"]) == pytest.approx(best, abs=2e-6)
    assert row["nothing_similar"] == str(int(float(row["best_similarity"]) < threshold))


def test_every_column_is_what_one_image_alone_gives(home, run, tmp_path):
    manager = run.head.proto_manager
    manager.valid_mask[1] = False  # bird has one prototype, cat:0 no anchor
    manager.anchors[2] = None
    files = sorted(str(path) for path in (home / "images").rglob("*.png"))
    best = []
    for file in files:
        classes = explain_image(run.model, file, run.transform, CLASSES).classes
        best.append(max(match.similarity for evidence in classes for match in evidence.matches))
    threshold = round(sorted(best)[12], 6)
    found = predict(run, [str(home / "images")], tmp_path / "a.csv", top=2, threshold=threshold)
    rows = table(tmp_path / "a.csv")
    assert len(rows) == 30
    for row, file in zip(rows, files, strict=True):
        check_row(run, row, file, 2, threshold)
    assert 11 <= found["nothing_similar"] <= 13
    assert found["nothing_similar"] == sum(row["nothing_similar"] == "1" for row in rows)
    assert found["predicted"] == {name: Counter(row["predicted"] for row in rows)[name] for name in CLASSES}
    assert (
        any(row["top2_prototype"] == "" for row in rows if row["predicted"] == "bird") or not found["predicted"]["bird"]
    )
    assert list(rows[0]) == [
        "file", "predicted", "probability", "probability_bird", "probability_cat", "probability_dog",
        "top1_prototype", "top1_similarity", "top1_file", "top1_cell",
        "top2_prototype", "top2_similarity", "top2_file", "top2_cell", "best_similarity", "nothing_similar", "error",
    ]  # fmt: skip


def test_logits_that_are_not_finite_are_told_in_the_row(home, run, tmp_path):
    with torch.no_grad():
        run.head.bias[0] = math.nan
    found = predict(run, [str(home / "images" / "cat")], tmp_path / "a.csv", threshold=0.5)
    assert found["unreadable"] == 10
    assert {row["error"] for row in table(tmp_path / "a.csv")} == {"the model's logits are not finite"}
    assert {row["predicted"] for row in table(tmp_path / "a.csv")} == {""}


# Which images.


def test_folders_manifests_and_files_in_order(home, tmp_path, capsys):
    root = shutil.copytree(home / "images", tmp_path / "in")
    (root / "a").mkdir()
    for name in ("a/x.PNG", "a.png", "cat/.hidden.png", ".secret/000.png"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "dog" / "000.png", root / name)
    (root / "cat" / "notes.txt").write_text("no image")
    listed = list_inputs([str(root)])
    files = [path for path in root.rglob("*") if path.suffix in (".png", ".PNG") and "/." not in str(path)]
    assert [listed.names[i] for i in range(len(listed.names))] == [str(path) for path in sorted(files)]
    assert listed.labels is None

    lines = ["label,image", "a label,in/dog/001.png", ',"in\\dog/002.png"', f"x,{root}/dog/003.png"]
    (tmp_path / "m.csv").write_text("\n".join(lines), encoding="utf-8")
    told(capsys, home / "run", root / "a.png", tmp_path / "m.csv", "--out", tmp_path / "o.csv", "--threshold", "0")
    rows = table(tmp_path / "o.csv")
    names = ["a.png", "dog/001.png", "dog/002.png", "dog/003.png"]
    assert [row["file"] for row in rows] == [str(root / name) for name in names]
    assert [row["label"] for row in rows] == ["", "a label", "", "x"]
    assert list(rows[0])[:2] == ["file", "label"]
    (tmp_path / "n.csv").write_text("image\nin/dog/001.png\n")
    told(capsys, home / "run", tmp_path / "n.csv", "--out", tmp_path / "p.csv", "--threshold", "0")
    assert "label" not in table(tmp_path / "p.csv")[0]


def test_loops_of_links_do_no_harm(home, tmp_path, caplog):
    root = shutil.copytree(home / "images" / "cat", tmp_path / "in")
    (root / "loop").symlink_to(root)
    (root / "self.png").symlink_to(root / "self.png")
    (root / "link.png").symlink_to(root / "000.png")
    (root / "folder.png").symlink_to(tmp_path)
    listed = list_inputs([str(root)]).names
    assert len(listed) == 12
    assert "loop" in caplog.text
    assert "folder.png" in caplog.text


def test_names_that_are_no_unicode_or_need_quotes(home, tmp_path, capsys):
    source = home / "images" / "cat" / "000.png"
    names = [b"caf\xe9.png", b'a "b", c.png', b"line\nbreak.png", "=1+1 \u00fc.png".encode(), b"r\r.png"]
    (tmp_path / "in").mkdir()
    for name in names:
        shutil.copy(source, os.path.join(os.fsencode(tmp_path / "in"), name))  # noqa: PTH118
    told(capsys, home / "run", tmp_path / "in", "--out", tmp_path / "o.csv", "--threshold", "0")
    rows = table(tmp_path / "o.csv")
    expected = sorted(os.fsdecode(name) for name in names)
    assert [Path(row["file"]).name for row in rows] == [shown(name) for name in expected]
    assert [row["error"] for row in rows] == [""] * 5
    assert (tmp_path / "o.csv").read_bytes().count(rb"caf\xe9.png") == 1


def test_strings_are_those_that_were_put_in():
    words = ["", "a", "\u00fc\udcff", "b" * 1000, ""]
    strings, other = Strings(), Strings()
    for word in words:
        strings.append(word)
        other.append(word)
    assert [strings[i] for i in range(5)] == words
    assert strings[-2] == "b" * 1000
    assert strings.sha256() == other.sha256()
    other.append("")
    assert strings.sha256() != other.sha256()
    with pytest.raises(IndexError):
        strings[5]


# Files that can't be read.


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that would be huge."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""))
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_what_cannot_be_read_is_told_in_its_row(home, run, tmp_path, capsys):
    root = shutil.copytree(home / "images", tmp_path / "in")
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    whole.save(root / "whole.jpg")
    (root / "bomb.png").write_bytes(png_header(30000, 30000))
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("no picture")
    (root / "truncated.jpg").write_bytes((root / "whole.jpg").read_bytes()[:-400])
    Image.new("L", (1, 60000)).save(root / "line.png")
    (root / "self.png").symlink_to(root / "self.png")
    (root / "m.csv").write_text("image,label\ngone.png,cat\ncat/000.png,cat\n.,cat\n")
    found = told(capsys, home / "run", root, root / "m.csv", "--out", tmp_path / "o.csv", "--threshold", "0.5")
    rows = table(tmp_path / "o.csv")
    errors = {Path(row["file"]).name: row["error"] for row in rows if row["error"]}
    assert errors.keys() == {
        "bomb.png",
        "empty.jpg",
        "text.jpg",
        "truncated.jpg",
        "self.png",
        "gone.png",
        "in",
    }
    assert "more than data.max_megapixels 100" in errors["bomb.png"]
    assert (errors["empty.jpg"], errors["text.jpg"], errors["gone.png"]) == ("empty file", "not an image", "missing")
    assert "truncated" in errors["truncated.jpg"]
    assert "symbolic links" in errors["self.png"]
    assert "directory" in errors["in"].lower()
    assert (found["images"], found["unreadable"], sum(found["predicted"].values())) == (40, 7, 33)
    assert sum(found["problems"].values()) == 7
    for row in rows:
        if row["error"]:
            assert {value for key, value in row.items() if key not in ("file", "label", "error")} == {""}
        else:
            check_row(run, row, row["file"], 2, 0.5)


def test_an_image_that_vanishes_or_breaks_a_decoder_does_not_end_the_run(home, run, tmp_path, monkeypatch):
    root = shutil.copytree(home / "images" / "cat", tmp_path / "in")
    read = Pictures.__getitem__

    def vanishing(self, index):
        (root / "003.png").unlink(missing_ok=True)
        return read(self, index)

    monkeypatch.setattr(Pictures, "__getitem__", vanishing)
    monkeypatch.setattr("protopush.predict.inputs.read_image", breaking(root / "005.png"))
    predict(run, [str(root)], tmp_path / "o.csv", threshold=0.5)
    errors = [row["error"] for row in table(tmp_path / "o.csv")]
    assert errors == ["", "", "", "missing", "", "a decoder's bug", "", "", "", ""]


def breaking(bad: Path):
    from protopush.data.images import read_image

    def read(path, max_megapixels):
        if Path(path) == bad:
            raise TypeError("a decoder's bug\nin two lines")
        return read_image(path, max_megapixels)

    return read


# Cut off at any moment.


def test_a_reader_that_dies_is_one_line(home, tmp_path, monkeypatch, capsys):
    words = (home / "run", home / "images", "--threshold", "0.5", "--out", tmp_path / "o.csv")
    with monkeypatch.context() as patch:
        read = Pictures.__getitem__
        patch.setattr(Pictures, "__getitem__", lambda self, i: os._exit(1) if i == 28 else read(self, i))
        assert "a process that reads images died" in refused(capsys, "predict", *words, "--data.num_workers", "1")
    # Its batch, the fourth, is asked for when the second is here, so that the first has been written.
    assert 0 < told(capsys, *words)["resumed_from"] <= 24


@pytest.mark.parametrize("lost", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_reader_that_dies_while_its_batch_is_fetched(home, tmp_path, monkeypatch, capsys, lost):
    """PyTorch raises its own error for a dead reader only if it is asked before the connection breaks."""

    def fetch(self, *_, **__):
        raise lost

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", fetch)
    words = (home / "run", home / "images", "--threshold", "0.5", "--out", tmp_path / "o.csv")
    assert "a process that reads images died" in refused(capsys, "predict", *words, "--data.num_workers", "1")


def cut_after(monkeypatch, batches: int) -> None:
    """Ctrl-C while batch number ``batches`` is computed."""
    run_model, seen = predicted_inputs.run_model, iter(range(batches))

    def cut(*args, **options):
        if next(seen, None) is None:
            raise KeyboardInterrupt
        return run_model(*args, **options)

    monkeypatch.setattr(predicted_inputs, "run_model", cut)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_interrupted_and_started_again(home, tmp_path, monkeypatch, capsys, batches):
    words = ("--out", tmp_path / "o.csv", "--share", "0.4", "--top", "1")
    told(capsys, home / "run", home / "images", "--out", tmp_path / "whole.csv", "--share", "0.4", "--top", "1")
    with monkeypatch.context() as patch:
        cut_after(patch, batches)
        start = ["predict", str(home / "run"), str(home / "images"), *map(str, words), "--data.num_workers", "0"]
        assert main(start) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert left(tmp_path) - {"whole.csv"} <= {".o.csv.belongs.json", ".o.csv.part-0"}
    with (tmp_path / ".o.csv.part-0").open("ab") as file:
        file.write(b'\n[2, [["/half/a/ro')
    seen = []
    run_model = predicted_inputs.run_model
    monkeypatch.setattr(predicted_inputs, "run_model", lambda *args: seen.append(1) or run_model(*args))
    monkeypatch.setattr(predicting, "calibrate", lambda *_: pytest.fail("the threshold is known"))
    found = told(capsys, home / "run", home / "images", *words)
    assert len(seen) == 4 - batches
    assert found["resumed_from"] == 8 * batches
    assert found["threshold"]["source"] == "validation"
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert left(tmp_path) == {"o.csv", "whole.csv"}


def test_interrupted_before_the_side_file(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    with monkeypatch.context() as patch:
        cut_after(patch, 0)
        out = ["--out", str(tmp_path / "o" / "o.csv"), "--data.num_workers", "0"]
        assert main(["predict", str(home / "run"), str(home / "images"), *out]) == 130
    assert left(tmp_path / "o") == set()
    told(capsys, home / "run", home / "images", "--out", tmp_path / "o" / "o.csv")
    assert left(tmp_path / "o") == {"o.csv"}


def test_killed_and_started_again(home, tmp_path, capsys):
    lines = [f"{home}/images/{CLASSES[i % 3]}/00{i % 10}.png,{i}" for i in range(480)]
    (tmp_path / "m.csv").write_text("\n".join(["image,label", *lines]))
    words = [str(home / "run"), str(tmp_path / "m.csv"), "--threshold", "0.5", "--device", "cpu"]
    process = Forked("predict", *words, "--out", tmp_path / "o.csv", "--data.num_workers", "1")
    part, until = tmp_path / ".o.csv.part-0", time.monotonic() + 300
    while not (part.exists() and part.stat().st_size > 5000) and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not done
    assert left(tmp_path) == {"m.csv", ".o.csv.belongs.json", ".o.csv.lock", ".o.csv.part-0"}
    found = told(capsys, home / "run", tmp_path / "m.csv", "--threshold", "0.5", "--out", tmp_path / "o.csv")
    assert 0 < found["resumed_from"] < 480
    told(capsys, home / "run", tmp_path / "m.csv", "--threshold", "0.5", "--out", tmp_path / "whole.csv")
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [int(row["label"]) for row in table(tmp_path / "o.csv")] == list(range(480))
    assert left(tmp_path) == {"m.csv", "o.csv", "whole.csv"}


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_write_what_one_writes(home, tmp_path, capsys):
    out, share = tmp_path / "two" / "o.csv", ["--share", "0.4", "--top", "2"]
    words = [str(home / "run"), str(home / "images"), *share, "--device", "cpu", "--data.num_workers", "0", "--json"]
    done = torchrun("-m", "protopush", "predict", *words, "--out", out, PROTOPUSH_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    one = told(capsys, home / "run", home / "images", "--out", tmp_path / "one.csv", *share)
    assert out.read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert left(tmp_path / "two") == {"o.csv"}
    clock = ("out", "seconds", "images_per_second")
    assert {k: v for k, v in found.items() if k not in clock} == {k: v for k, v in one.items() if k not in clock}


# What does not belong together.


def begun(home: Path, out: Path, monkeypatch) -> list[object]:
    with monkeypatch.context() as patch:
        cut_after(patch, 1)
        words = [home / "run", home / "images", "--threshold", "0.5", "--out", out]
        assert main(["predict", *map(str, words), "--data.num_workers", "0", "--device", "cpu"]) == 130
    return words


def test_other_words_are_refused_and_overwrite_begins_anew(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "o.csv"
    words = begun(home, out, monkeypatch)
    part = tmp_path / ".o.csv.part-0"
    before = part.read_bytes()
    assert "other options" in refused(capsys, "predict", *words, "--top", "1")
    assert "other options" in refused(capsys, "predict", *words, "--threshold", "0.6")
    assert "other options" in refused(capsys, "predict", home / "run", home / "images", "--out", out)
    assert "other images: 30," in refused(capsys, "predict", home / "run", home / "images" / "cat", *words[2:])
    other = shutil.copytree(home / "run", tmp_path / "run")
    values = json.loads((other / "prototypes.json").read_text())
    (other / "prototypes.json").write_text(json.dumps(values | {"more": 1}))
    assert "other prototypes" in refused(capsys, "predict", other, *words[1:])
    assert part.read_bytes() == before
    side = tmp_path / ".o.csv.belongs.json"
    text = side.read_text()
    for damage in (
        "",
        "{}",
        "[]",
        text[:-20],
        text.replace('"format": 1', '"format": 2'),
        text.replace('"share"', '"sheer"'),
    ):
        side.write_text(damage)
        assert "damaged" in refused(capsys, "predict", *words)
    side.unlink()
    assert "is gone" in refused(capsys, "predict", *words)
    found = told(capsys, *words, "--overwrite")
    assert found["resumed_from"] == 0
    whole = out.read_bytes()
    assert "exists already" in refused(capsys, "predict", *words)
    assert out.read_bytes() == whole
    out.write_text("something else")
    told(capsys, *words, "--overwrite")
    assert out.read_bytes() == whole
    assert left(tmp_path) == {"o.csv", "run"}


def test_another_process_is_writing(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resumable_csv, "PATIENCE", 0.1)
    lock = tmp_path / ".o.csv.lock"
    code = f"import filelock\nwith filelock.FileLock({str(lock)!r}): print('locked', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    words = (home / "run", home / "images", "--threshold", "0.5", "--out", tmp_path / "o.csv")
    assert "another process is writing" in refused(capsys, "predict", *words)
    other.kill()
    other.wait()
    told(capsys, *words)
    assert left(tmp_path) == {"o.csv"}


def test_bad_words_are_one_line_and_nothing_is_left(home, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("picture,label\na.png,cat\n")
    (tmp_path / "blank.csv").write_text("image,label\n,cat\na.png,cat\n,dog\n")
    (tmp_path / "none.csv").write_text("image\n")
    (tmp_path / "file").touch()
    before = left(tmp_path)
    run, images, out = home / "run", home / "images", ("--out", tmp_path / "o.csv")
    monkeypatch.setattr(predicting, "calibrate", lambda *_: pytest.fail("work began"))
    cases = {
        (tmp_path / "nothing", images, *out): "no such run folder",
        (run, tmp_path / "nothing", *out): "no such file",
        (run, tmp_path / "empty", *out): "no images in",
        (run, tmp_path / "bad.csv", *out): "no column 'image'",
        (run, tmp_path / "blank.csv", *out): "lines 2, 4",
        (run, tmp_path / "none.csv", *out): "no rows",
        (run, images, *out, "--top", "-1"): "expected 0 or more",
        (run, images, *out, "--share", "1"): "--share 1.0",
        (run, images, *out, "--data.num_workers", "-1"): "expected 0 or more",
        (run, images, "--out", tmp_path): "is a folder",
        (run, images, "--out", tmp_path / "file" / "o.csv"): "cannot write",
        (run, tmp_path / "bad.csv", "--out", tmp_path / "bad.csv", "--overwrite"): "is one of the files to read",
        (run, images): "required: out",
        (run, images, *out, "--shere", "1"): "did you mean 'share'",
    }
    for words, message in cases.items():
        assert message in refused(capsys, "predict", *words), words
        assert left(tmp_path) == before
    with pytest.raises(InputError, match="expected a cosine"):
        predict(open_run(run), [str(images)], tmp_path / "o.csv", threshold=math.nan)


def test_a_full_disk_is_one_line_and_the_rest_goes_on_later(home, tmp_path, capsys, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    words = begun(home, tmp_path / "o.csv", monkeypatch)
    part = tmp_path / ".o.csv.part-0"
    rows = part.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(ResumableCsv, "part", lambda self, process: Path("/dev/full"))
        assert "No space left on device" in refused(capsys, "predict", *words, "--data.num_workers", "0", logged=True)
    assert part.read_bytes() == rows
    assert told(capsys, *words)["resumed_from"] == 8


# The threshold.


@pytest.mark.parametrize("share", [0.0, 0.05, 0.29, 0.5, 0.99])
@pytest.mark.parametrize("count", [1, 7, 20, 100])
def test_the_threshold_is_the_largest_that_flags_at_most_the_share(share, count):
    values = np.round(np.random.default_rng(count).normal(0.7, 0.1, count), 2).tolist()  # with ties
    value = largest_threshold(values, share)

    def flagged(threshold: float) -> int:
        return sum(v < threshold for v in values)

    allowed = round(share * 100) * count // 100
    assert value in values
    assert flagged(value) <= allowed
    assert all(flagged(other) > allowed for other in values if other > value)


def test_the_threshold_on_a_known_distribution():
    """Uniform similarities: a share of 5 % is the 0.05 quantile, and new ones are flagged so often."""
    chance = random.Random(0)
    value = largest_threshold([chance.random() for _ in range(20000)], 0.05)
    assert value == pytest.approx(0.05, abs=0.005)
    assert sum(chance.random() < value for _ in range(20000)) / 20000 == pytest.approx(0.05, abs=0.008)


def best_of(run: Run, file: Path) -> float:
    classes = explain_image(run.model, file, run.transform, CLASSES).classes
    return max(match.similarity for evidence in classes for match in evidence.matches)


def test_it_is_set_on_val_and_measured_on_test(home, run, tmp_path, capsys):
    from protopush.data.sources import load_catalog

    catalog = load_catalog(run.data["path"], run.data["source"], seed=run.data["split_seed"])
    val, test = (sorted(best_of(run, s.image) for s in catalog.split(name)) for name in ("val", "test"))
    found = told(capsys, home / "run", home / "images", "--out", tmp_path / "o.csv", "--share", "0.4", "--top", "0")
    threshold = found["threshold"]
    assert threshold["value"] == pytest.approx(val[int(0.4 * len(val))], abs=2e-6)
    assert (threshold["set_images"], threshold["set_flagged"]) == (len(val), int(0.4 * len(val)))
    assert (threshold["measured_on"], threshold["measured_images"]) == ("the test images", len(test))
    assert threshold["measured_flagged"] == sum(b < threshold["value"] - 2e-6 for b in test)
    assert threshold["false_alarms"] == threshold["measured_flagged"] / len(test)
    rows = table(tmp_path / "o.csv")
    assert found["nothing_similar"] == sum(float(row["best_similarity"]) < threshold["value"] for row in rows)
    assert Threshold.from_dict(threshold).to_dict() == threshold


def test_without_test_images_val_is_halved_by_group_and_known_similarities_are_kept(
    home, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    files = sorted((home / "images").rglob("*.png"))
    lines = ["image,label,split,group"]
    lines += [
        f"{f},{f.parent.name},{'train' if i % 2 else 'val'},{'t' if i % 2 else 'v'}{i // 4}"
        for i, f in enumerate(files)
    ]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    words = (home / "run", files[0], "--data.path", tmp_path / "m.csv", "--share", "0.25", "--top", "0", "--out")
    threshold = told(capsys, *words, tmp_path / "o.csv")["threshold"]
    samples = [Sample(f, f.name, 0, "val", f"v{i // 4}") for i, f in enumerate(files) if i % 2 == 0]
    first, second = halved(samples)
    assert {s.group for s in first}.isdisjoint(s.group for s in second)
    assert len(first) + len(second) == 15
    assert abs(len(first) - len(second)) <= 3
    value = sorted(best_of(run, s.image) for s in first)[len(first) // 4]
    assert threshold["value"] == pytest.approx(value, abs=2e-6)
    assert threshold["set_on"].startswith("half")
    assert (threshold["set_images"], threshold["measured_images"]) == (len(first), len(second))
    assert threshold["measured_flagged"] == sum(best_of(run, s.image) < value - 2e-6 for s in second)

    monkeypatch.setattr(thresholds, "run_over", lambda *_, **__: pytest.fail("they are known"))
    assert told(capsys, *words, tmp_path / "p.csv")["threshold"] == threshold
    capsys.readouterr()
    again = [str(w) for w in (*words, tmp_path / "q.csv")]
    assert main(["predict", *again]) == 0
    out = capsys.readouterr().out
    assert "false alarms on the other half of the validation images, which it was not set on" in out
    assert re.search(r"q\.csv: 1 images \(bird \d, cat \d, dog \d\)", out)


def test_without_data_the_column_is_empty_unless_a_number_is_given(home, tmp_path, capsys):
    run = shutil.copytree(home / "run", tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    values["data"]["path"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(values))
    image = home / "images" / "cat" / "000.png"
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "o.csv"), "--top", "0"]) == 0
    out, err = capsys.readouterr()
    assert err.count("no such file") == 1
    assert "nothing_similar is empty" in out
    row = table(tmp_path / "o.csv")[0]
    assert row["nothing_similar"] == ""
    assert float(row["best_similarity"]) <= 1
    found = told(capsys, run, image, "--out", tmp_path / "p.csv", "--top", "0", "--threshold", "1.01")
    assert table(tmp_path / "p.csv")[0]["nothing_similar"] == "1"
    assert (found["nothing_similar"], found["threshold"]["source"]) == (1, "given")
    assert found["threshold"]["false_alarms"] is None


def test_validation_images_that_cannot_be_read_do_not_count(home, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    root = shutil.copytree(home / "images", tmp_path / "images")
    for split, names in {"train": "0123", "val": "45678", "test": "9"}.items():
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in names:
                (root / name / f"00{number}.png").rename(root / split / name / f"00{number}.png")
    for name in CLASSES:
        (root / name).rmdir()
    (root / "val" / "cat" / "004.png").write_bytes(b"")
    config = predicting.DataConfig(path=str(root), source="folder")
    found = thresholds.calibrate(run, config, 0.05)
    assert (found.set_images, found.measured_images) == (14, 3)
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"")
    found = thresholds.calibrate(run, config, 0.05)
    assert (found.value, found.source) == (None, "none")
    assert "can be read" in found.problem


def test_the_benchmark_runs(home, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import predict_speed

    words = [str(home / "run"), str(home / "images"), "--images", "9", "--repetitions", "2", "--workers", "0"]
    assert predict_speed.main([*words, "--device", "cpu", "--out", str(tmp_path / "speed.json")]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["images"] == 9
    assert len(found["comparisons"]) == 2  # by the clock, and by the processors' time
    for comparison in found["comparisons"]:
        bare, ours = (comparison["timings"][side] for side in ("bare forward", "predict"))
        assert len(bare) == 2
        assert min(bare + ours) > 0
        ratio = comparison["results"][-1]
        assert ratio["values"] == [b / o for b, o in zip(bare, ours, strict=True)]
        assert ratio["goal"] == ">= 0.9"
    assert "9 images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        predict_speed.main([str(home / "run"), str(tmp_path / "nothing")])
    assert stopped.value.code == 2
    assert "no such file" in capsys.readouterr().err
