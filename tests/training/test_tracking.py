"""The trackers get what metrics.jsonl gets, and never stand in the way of a run."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from protopush.errors import InputError
from protopush.training import tracking
from protopush.training.config import RunConfig, TrainerConfig
from protopush.training.run_writer import RunWriter, append_metrics
from protopush.training.tracking import Tracker, Trackers, check_trackers, scalars

# TensorBoard writes in a thread: an error that we get is raised there as well, maybe a moment later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

VAL = {"n": 4, "auroc": 0.75, "per_class": {"no finding": {"sensitivity": 0.5, "f1": None}}}
PUSH = {"use_local": True, "min_dist": 0.125, "notes": ["one"], "guard": {"policy": "report", "taken_back": False}}
ROWS: list[dict[str, Any]] = [
    {"epoch": 1, "loss": 1.1, "cross_entropy": 0.7, "val": VAL},
    {"push": 1, **PUSH, "val_before": VAL, "val_after": {"auroc": 0.7}},
    {"epoch": 2, "loss": 0.9, "cross_entropy": 0.6, "val": None},
    {"push": 2, **PUSH, "val_before": None, "val_after": {"auroc": 0.8}, "final": "hard"},
    {"final": "live", "val_before": VAL, "val_after": {"auroc": 0.9}},
]
CONFIG = {"train": {"lr": 0.001, "epochs": 2}, "data": {"path": "images"}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    Image.new("RGB", (6, 4), "red").save(tmp_path / "run" / "prototypes.png")
    return tmp_path / "run"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "protopush.training" and r.levelno > logging.INFO]


def children() -> set[int]:
    """The processes that this one started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == os.getpid() and state != "Z":
                found.add(int(stat.parent.name))
    return found


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """W&B without a network and without the user's files; its service ends with the test. Gives others' processes."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb-own"))
    before = children()
    import wandb

    wandb.teardown()  # whatever it read from the environment before
    yield before
    with suppress(ConnectionError):
        wandb.teardown()
    deadline = time.monotonic() + 30
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children() - before


def test_numbers_and_nothing_else() -> None:
    assert scalars(ROWS[0]) == {
        "train/loss": 1.1,
        "train/cross_entropy": 0.7,
        "val/n": 4.0,
        "val/auroc": 0.75,
        "val/per_class/no finding/sensitivity": 0.5,
    }
    assert scalars(ROWS[2]) == {"train/loss": 0.9, "train/cross_entropy": 0.6}
    assert scalars(ROWS[3]) == {"final/min_dist": 0.125, "final/val_after/auroc": 0.8}
    assert {name.split("/")[0] for name in scalars(ROWS[1])} == {"push"}


def curves(run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_tensorboard_has_the_rows_of_metrics(run: Path) -> None:
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        for row in ROWS:
            append_metrics(run, row)
            trackers.log(row)
        assert curves(run).Scalars("train/loss")[-1].step == 2  # it can be watched while the run goes on
        trackers.picture("prototypes", run / "prototypes.png")
    found = curves(run)
    expected: dict[str, list[tuple[int, float]]] = {}
    epoch = 0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        epoch = row.get("epoch", row.get("push", epoch))
        for name, value in scalars(row).items():
            expected.setdefault(name, []).append((epoch, pytest.approx(value)))
    assert {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]} == expected
    image = found.Images("prototypes")[0]
    assert (image.step, image.width, image.height) == (2, 6, 4)
    text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "  lr: 0.001\n" in text


def test_tensorboard_forgets_what_a_resumed_run_does_again(run: Path) -> None:
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        for epoch in (1, 2, 3):
            trackers.log({"epoch": epoch, "loss": float(epoch)})
    with closing(Trackers(["tensorboard"], run, CONFIG, resumed_at=2)) as trackers:
        for epoch in (3, 4):
            trackers.log({"epoch": epoch, "loss": 10.0 * epoch})
    assert [(e.step, e.value) for e in curves(run).Scalars("train/loss")] == [(1, 1), (2, 2), (3, 30), (4, 40)]


def history(run: Path) -> list[list[dict[str, Any]]]:
    """What W&B's offline files hold, a list for each part of the run.

    They are logs as LevelDB writes them, after 7 bytes of W&B's own: blocks of 32 KiB; a piece is checksum, length,
    kind (1: whole, 2, 3, 4: first, middle, last part of a record) and content.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    parts = []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        data, at, content, rows = file.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, at)
            if at + 7 + length > len(data):
                break  # it is being written
            content += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):
                record, content = Record.FromString(content), b""
                if record.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                    rows.append({name: json.loads(value) for name, value in items.items() if name[0] != "_"})
        parts.append(rows)
    return parts


def written(run: Path, *rows: int) -> list[list[dict[str, Any]]]:
    """The history once it has so many rows in each part: W&B's service may still be writing when a run has finished."""
    deadline = time.monotonic() + 30
    while list(map(len, found := history(run))) != list(rows) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def test_wandb_offline_has_the_rows_of_metrics(run: Path, offline: set[int], capfd: pytest.CaptureFixture[str]) -> None:
    with closing(Trackers(["wandb"], run, CONFIG)) as trackers:
        for row in ROWS:
            trackers.log(row)
        trackers.picture("prototypes", run / "prototypes.png")
        wandb_run = trackers._live["wandb"].run
        assert wandb_run.config["train"] == CONFIG["train"]
        assert wandb_run.project == "protopush"
        assert wandb_run.name == "run"
        assert wandb_run.summary["train/loss"] == 0.9
        assert wandb_run.summary["final/val_after/auroc"] == 0.9
        assert (run / "wandb_id").read_text().strip() == wandb_run.id
    assert children() - offline  # so that the fixture's last look means something
    (rows,) = written(run, len(ROWS) + 1)
    *numbers, picture = rows
    assert numbers == [{"epoch": e, **scalars(r)} for e, r in zip((1, 1, 2, 2, 2), ROWS, strict=True)]
    assert (picture["epoch"], picture["prototypes/width"]) == (2, 6)
    assert capfd.readouterr() == ("", "")


def test_wandb_goes_on_with_the_same_run(
    run: Path, offline: set[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "moles")
    caplog.set_level(logging.INFO)
    ids = []
    for epochs, resumed_at in (((1, 2), None), ((2, 3), 1), ((1,), None)):
        with closing(Trackers(["wandb"], run, CONFIG | {"resumed": resumed_at}, resumed_at)) as trackers:
            for epoch in epochs:
                trackers.log({"epoch": epoch, "loss": 1 / epoch})
            assert trackers._live["wandb"].run.project == "moles"
        ids.append((run / "wandb_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert [[row["epoch"] for row in part] for part in written(run, 2, 2, 1)] == [[1, 2], [2, 3], [1]]
    assert not warnings(caplog)


def test_wandb_leaves_a_run_of_the_caller_alone(run: Path, offline: set[int], tmp_path: Path) -> None:
    import wandb

    with wandb.init(dir=tmp_path, settings=wandb.Settings(silent=True)) as own:
        with closing(Trackers(["wandb"], run, CONFIG)) as trackers:
            trackers.log(ROWS[0])
        own.log({"still": 1})
        assert wandb.run is own
        assert dict(own.config) == {}
        assert own.summary["still"] == 1


def test_without_a_login_the_work_does_not_start(
    offline: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    check_trackers(["wandb", "tensorboard"])  # offline needs none
    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^no login at W&B \(No API key .*\); run `wandb login`, or set WANDB_MODE"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TensorBord", "unknown tracker 'TensorBord'; did you mean 'tensorboard'?"),
        ("mlflow", "unknown tracker 'mlflow'; expected tensorboard or wandb"),
    ],
)
def test_unknown_names_are_refused(run: Path, name: str, message: str) -> None:
    for act in (check_trackers, lambda names: Trackers(names, run, CONFIG)):
        with pytest.raises(InputError) as caught:
            act(["tensorboard", name])
        assert str(caught.value) == message
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_starts(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    for act in (check_trackers, lambda names: Trackers(names, run, CONFIG)):
        with pytest.raises(InputError, match=rf"{name} .*; pip install 'protopush\[track\]'$"):
            act([name])


class Broken(Tracker):
    """Fails from its second row on."""

    package = "json"
    rows = 0
    closed: list[bool]

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed_at: int | None) -> None:
        self.closed = []

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self.rows += 1
        if self.rows > 1:
            raise OSError("No space left on device\nand more")

    def picture(self, name: str, path: Path, epoch: int) -> None:
        raise AssertionError("it is off")

    def close(self, failed: bool) -> None:
        self.closed.append(failed)
        raise OSError("Still no space")


def test_a_failing_tracker_is_switched_off_alone(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(tracking.TRACKERS, "broken", Broken)
    with closing(Trackers(["broken", "tensorboard"], run, CONFIG)) as trackers:
        broken = trackers._live["broken"]
        for row in ROWS:
            append_metrics(run, row)
            trackers.log(row)
        trackers.picture("prototypes", run / "prototypes.png")
        trackers.close()  # and once more at the end of the block
    assert warnings(caplog) == [
        "Tracking with broken is off from here on (No space left on device); metrics.jsonl has every row"
    ]
    assert broken.rows == 2
    assert broken.closed == [True]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == len(ROWS)
    assert [event.step for event in curves(run).Scalars("train/loss")] == [1, 2]


def test_tensorboard_without_its_folder(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        shutil.rmtree(run / "tensorboard")
        for row in ROWS:
            trackers.log(row)
    (run / "tensorboard").write_text("in the way")
    with closing(Trackers(["tensorboard"], run, CONFIG)) as trackers:
        trackers.log(ROWS[0])
    first, second = warnings(caplog)
    assert "off from here on ([Errno 2]" in first
    assert "tensorboard is off from here on" in second


def test_wandb_without_its_service(run: Path, offline: set[int], caplog: pytest.LogCaptureFixture) -> None:
    start = time.monotonic()
    with closing(Trackers(["wandb"], run, CONFIG)) as trackers:
        trackers.log(ROWS[0])
        (service,) = children() - offline
        os.kill(service, signal.SIGKILL)
        while children() - offline:
            time.sleep(0.01)
        for row in ROWS[1:]:
            trackers.log(row)
        trackers.picture("prototypes", run / "prototypes.png")
    assert time.monotonic() - start < 10
    (line,) = warnings(caplog)  # what wandb says of it depends on when it notices
    assert re.fullmatch(r"Tracking with wandb is off from here on \(.+\); metrics.jsonl has every row", line)


def test_a_run_that_breaks_off_is_reported_as_failed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    pictures: list[Path] = []
    monkeypatch.setattr(Broken, "close", lambda self, failed: closed.append(failed))
    monkeypatch.setattr(Broken, "picture", lambda self, name, path, epoch: pictures.append(path))
    monkeypatch.setitem(tracking.TRACKERS, "broken", Broken)
    config = RunConfig(trainer=TrainerConfig(track=["broken"]))
    writer = RunWriter(run, config)
    writer.start()
    with pytest.raises(KeyboardInterrupt), writer:
        raise KeyboardInterrupt
    assert (closed, pictures) == ([True], [])
    with RunWriter(run, config) as writer:
        writer.start()
    assert (closed, pictures) == ([True, False], [run / "prototypes.png"])
