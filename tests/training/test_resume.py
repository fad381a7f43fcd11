"""A run that is cut off goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import protopush.training.run_writer as run_writer
from forked import Forked
from helpers import SMALL, make_images, python
from protopush.cli import main
from protopush.training.run_writer import append_metrics

TIMES = re.compile(r'"(images_per_second|seconds)": [\d.e+-]+')
# All that a run can remember: two phases, live anchors, an average, accumulated steps, augmentation, a guard.
FULL = ["--train.freeze_backbone", "false", "--train.epochs", "4", "--train.head_epochs", "2", "--train.ema", "0.9",
        "--train.accumulate", "2", "--train.clip_norm", "1", "--data.auto_augment", "rand-m9-mstd0.5-inc1",
        "--data.random_erasing", "0.3", "--push.start_epoch", "1", "--push.interval", "1", "--push.final_decay", "0",
        "--push.guard", "rollback", "--push.guard_budget", "0.05"]  # fmt: skip
CHOSEN = [*FULL, "--model.num_prototypes", "4", "--push.rows", "1", "--push.anchoring", "live"]
FROZEN = ["--train.epochs", "3", "--push.start_epoch", "2", "--push.interval", "1"]


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "images", ["bird", "cat", "dog"], 10)
    return root


@pytest.fixture(autouse=True)
def _cache(home, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache"))


def words(home: Path, out: Path, *more: str) -> list[str]:
    return ["train", "--data.path", str(home / "images"), "--out", str(out), *SMALL, "--model.image_size", "64", *more]


@pytest.fixture(scope="module")
def whole(home):
    """Uninterrupted runs, by their options."""
    known: dict[tuple[str, ...], Path] = {}

    def of(options: list[str]) -> Path:
        if tuple(options) not in known:
            out = home / f"whole{len(known)}"
            assert main(words(home, out, *options)) == 0
            known[tuple(options)] = out
        return known[tuple(options)]

    return of


def rows(run: Path) -> list[dict]:
    return [json.loads(TIMES.sub(r'"\1": 0', line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(run: Path, other: Path) -> None:
    assert rows(run) == rows(other)
    weights, others = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert (run / "prototypes.json").read_text() == (other / "prototypes.json").read_text()


def cut_off(monkeypatch, at: int, of: str) -> None:
    """Die at the ``at``-th file that is about to take its place, or in the middle of the ``at``-th line."""
    count = 0
    fsync = os.fsync

    def dying(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        fsync(descriptor)

    def half_a_line(folder: Path, row: dict) -> None:
        nonlocal count
        count += 1
        if count < at:
            return append_metrics(folder, row)
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row)[:20])
        raise Killed

    if of == "file":
        monkeypatch.setattr(os, "fsync", dying)
    else:
        monkeypatch.setattr(run_writer, "append_metrics", half_a_line)


CUTS = [
    *((FULL, "file", at) for at in (1, 2, 3, 4, 5, 6, 8, 14)),
    *((FULL, "line", at) for at in (1, 2, 4, 5, 8, 9)),
    *((CHOSEN, "file", at) for at in (2, 3)),
    *((CHOSEN, "line", at) for at in (2, 3, 6)),
    *((FROZEN, "file", at) for at in (1, 3, 5, 12)),
    *((FROZEN, "line", at) for at in (2, 3, 4)),
]  # fmt: skip


@pytest.mark.parametrize(  # each second one with the slow tests
    ("options", "of", "at"),
    [pytest.param(*cut, marks=[pytest.mark.slow] * (number % 2)) for number, cut in enumerate(CUTS)],
)
def test_a_run_cut_off_anywhere_ends_as_one_that_was_not(home, tmp_path, whole, monkeypatch, options, of, at):
    expected = whole(options)
    with monkeypatch.context() as patch:
        cut_off(patch, at, of)
        with pytest.raises(Killed):
            main(words(home, tmp_path / "run", *options))
    assert not (tmp_path / "run" / "config.json").exists()
    assert main([*words(home, tmp_path / "run", *options), "--resume"]) == 0
    assert_same(tmp_path / "run", expected)


@pytest.mark.parametrize("anchoring", ["off", "live"])
def test_a_process_that_is_killed(home, tmp_path, whole, anchoring):
    options = [*FULL, "--push.anchoring", anchoring, "--push.guard", "report"]
    expected = whole(options)
    process = Forked(*words(home, tmp_path / "run", *options))
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    while process.poll() is None and not checkpoint.is_file():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert main([*words(home, tmp_path / "run", *options), "--resume"]) == 0
    assert_same(tmp_path / "run", expected)


def test_a_whole_run_is_left_as_it_is(home, whole, capsys):
    run = whole(FROZEN)
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert main([*words(home, run, *FROZEN), "--resume"]) == 0
    assert "is whole: nothing is left to do" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before


def test_a_run_goes_on_with_its_own_options_only(home, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        cut_off(patch, 3, "line")
        with pytest.raises(Killed):
            main(words(home, tmp_path / "run", *FROZEN))
    capsys.readouterr()
    assert main([*words(home, tmp_path / "run", *FROZEN, "--train.lr", "0.5"), "--resume"]) == 2
    assert "started with other options (train.lr was 0.001, is 0.5)" in capsys.readouterr().err
    assert main([*words(home, tmp_path / "run", *FROZEN, "--train.lr", "0.5")]) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "checkpoints" / "last.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert main([*words(home, tmp_path / "run", *FROZEN), "--resume"]) == 2
    assert "damaged file" in capsys.readouterr().err
    assert main([*words(home, tmp_path / "run", *FROZEN), "--overwrite"]) == 0


def test_a_full_disk_gets_one_line_and_leaves_the_last_good_checkpoint(home, tmp_path):
    """The limit of a file's size stands in for the disk: the same error comes from the same write."""
    out = tmp_path / "run"
    limit = 40_000  # metrics fit, but not the second, larger checkpoint
    first = [*words(home, out, *FROZEN), "--model.embed_dim", "16", "--train.patience", "9"]
    script = (
        "import resource, signal, sys; from protopush.cli import main\n"
        "import protopush.training.run_writer as run_writer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = run_writer.save_checkpoint\n"
        "def full(folder, state):\n"
        f"    if state['epoch'] == 2: resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))\n"
        "    save(folder, state)\n"
        "run_writer.save_checkpoint = full\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    found = Forked(*first, program=script)
    assert found.wait() == 2, found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"protopush: error: cannot write .*last\.pt \(.*\); make room or choose another folder", last)
    assert "Traceback" not in found.stderr
    assert torch.load(out / "checkpoints" / "last.pt", weights_only=True)["epoch"] == 1
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["last.pt"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    assert main([*first, "--resume"]) == 0


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that nobody can write in: /sys of Linux")
def test_a_read_only_folder_is_told_before_the_work(home, capsys):
    assert main(words(home, Path("/sys/kernel/run"), *FROZEN)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert re.search(r"cannot write in /sys/kernel \(.*\); choose another --out", lines[0])


@pytest.mark.slow
def test_twenty_kills_at_random_times():
    script = Path(__file__).parents[1] / "scripts" / "kill_twenty.py"
    found = python(script)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "kill 20:" in found.stdout
    assert "largest difference of a weight: 0; same lines of metrics.jsonl: True" in found.stdout
