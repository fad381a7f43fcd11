"""``protopush verify``: it tells apart a missing file, a changed file, other weights and a similarity that is off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import refused
from protopush.cli import main
from protopush.nn.prototypes import Anchor


@pytest.fixture
def images(home, tmp_path) -> Path:
    return Path(shutil.copytree(home / "images", tmp_path / "images"))


def entries(run: Path) -> list[dict]:
    return json.loads((run / "prototypes.json").read_text())["prototypes"]


def told(capsys, run: Path, root: Path, code: int = 1) -> tuple[dict[tuple[str, int], dict], str]:
    """What verify says, as JSON by prototype and as a table."""
    capsys.readouterr()
    assert main(["verify", str(run), "--root", str(root), "--json"]) == code
    values = json.loads(capsys.readouterr().out)
    assert values["holds"] == all(a["holds"] for a in values["anchors"]) == (code == 0)
    assert main(["verify", str(run), "--root", str(root)]) == code
    return {(a["class_name"], a["prototype"]): a for a in values["anchors"]}, capsys.readouterr().out


def faults(found: dict[tuple[str, int], dict]) -> dict[str, set[str]]:
    """The faults of each file."""
    files = {a["file"] for a in found.values()}
    return {file: {a["fault"] for a in found.values() if a["file"] == file} for file in files}


def change_weights(run: Path, scale: float = 0.01) -> None:
    weights = load_file(run / "model.safetensors")
    weights["head.proj.0.weight"] += scale * torch.randn_like(weights["head.proj.0.weight"])
    save_file(weights, run / "model.safetensors")


def test_green(run, images, capsys):
    found, table = told(capsys, run, images, 0)
    assert len(found) == 6
    assert all(a["fault"] == "" and a["problem"] == "" for a in found.values())
    assert all(a["measured"] == pytest.approx(a["recorded"], abs=1e-5) for a in found.values())
    assert table.startswith("All 6 anchors hold")


@pytest.mark.parametrize(("fault", "problem"), [("file_missing", "file missing"), ("file_changed", "file changed")])
def test_a_file_that_is_gone_or_another(run, images, capsys, fault, problem):
    file = entries(run)[0]["anchor"]["file"]
    others = {e["anchor"]["file"] for e in entries(run)} - {file}
    if fault == "file_missing":
        (images / file).unlink()
    else:
        with (images / file).open("ab") as opened:
            opened.write(b"\0")  # the picture is the same, the file isn't
    found, table = told(capsys, run, images)
    assert faults(found) == {file: {fault}} | {other: {""} for other in others}
    assert all(a["problem"] == problem and a["measured"] is None for a in found.values() if a["file"] == file)
    assert problem in table
    assert file in table
    assert not any(other in table for other in others)


def test_other_weights_and_what_counts_before_them(run, images, capsys):
    change_weights(run)
    found, table = told(capsys, run, images)
    assert {a["fault"] for a in found.values()} == {"weights_changed"}
    assert "6 of 6 anchors do not hold" in table
    assert table.count("weights changed") == 6
    assert all(a["measured"] != pytest.approx(a["recorded"], abs=1e-4) for a in found.values())

    first, *others = sorted({e["anchor"]["file"] for e in entries(run)})
    (images / first).unlink()
    (images / others[0]).write_bytes((images / others[1]).read_bytes())
    expected = {first: {"file_missing"}, others[0]: {"file_changed"}}
    found, _ = told(capsys, run, images)
    assert faults(found) == expected | {file: {"weights_changed"} for file in others[1:]}


def test_weights_of_another_record_are_other_weights(run, images, capsys):
    values = json.loads((run / "prototypes.json").read_text())
    (run / "prototypes.json").write_text(json.dumps(values | {"weights_sha256": "0" * 64}))
    assert {a["fault"] for a in told(capsys, run, images)[0].values()} == {"weights_changed"}


def test_a_similarity_that_is_off_while_file_and_weights_are_as_recorded(run, images, capsys):
    values = json.loads((run / "prototypes.json").read_text())
    values["prototypes"][0]["anchor"]["similarity_after"] = 0.9
    values["prototypes"][3]["anchor"]["cell"] = 24 - values["prototypes"][3]["anchor"]["cell"]
    values["prototypes"][4]["anchor"]["cell"] = 25
    values["prototypes"][5]["anchor"]["file"] = "../../etc/passwd"
    (run / "prototypes.json").write_text(json.dumps(values))
    found, table = told(capsys, run, images)
    assert [a["fault"] for a in found.values()] == [
        "similarity_off", "", "", "similarity_off", "no_such_cell", "outside_root"
    ]  # fmt: skip
    assert table.count("similarity is off") == 2
    assert "0.900000" in table


def test_a_prototype_without_anchor(run, images, capsys):
    values = json.loads((run / "prototypes.json").read_text())
    values["prototypes"][1]["anchor"] = None
    (run / "prototypes.json").write_text(json.dumps(values))
    assert told(capsys, run, images)[0]["bird", 1]["fault"] == "no_anchor"


def test_weights_that_cannot_be_loaded_are_an_error(run, images, capsys):
    whole = (run / "model.safetensors").read_bytes()
    for damage in (whole[:-100], b"", b"text" * 100):
        (run / "model.safetensors").write_bytes(damage)
        assert "damaged file" in refused(capsys, "verify", run, "--root", images)
    (run / "model.safetensors").unlink()
    assert "no such file" in refused(capsys, "verify", run, "--root", images)


def test_weights_that_are_not_numbers_are_other_weights(run, images, capsys):
    change_weights(run, float("nan"))
    found, _ = told(capsys, run, images)
    assert {(a["fault"], a["measured"]) for a in found.values()} == {("weights_changed", None)}


def test_only_verify_opens_other_weights(run, images, tmp_path, capsys):
    change_weights(run)
    assert "damaged file" in refused(capsys, "evaluate", run)
    assert "damaged file" in refused(capsys, "push", run, "--out", tmp_path / "out")
    assert "damaged file" in refused(capsys, "forbid", run, "--prototype", "cat:0", "--reason", "r")


@pytest.mark.parametrize("name", ["config.json", "prototypes.json"])
def test_newer_formats_are_refused(run, capsys, name):
    values = json.loads((run / name).read_text())
    (run / name).write_text(json.dumps(values | {"format": 2}))
    line = refused(capsys, "verify", run)
    assert f"{name} has format 2, newer than 1" in line
    assert "update protopush" in line
    del values["format"]
    (run / name).write_text(json.dumps(values))
    assert "damaged file" in refused(capsys, "verify", run)


def test_the_margin_stands_beside_the_anchor(run):
    for entry in entries(run):
        anchor = Anchor.from_dict(entry["anchor"])
        assert anchor.runner_up is not None
        assert entry["margin"] == anchor.similarity - anchor.runner_up
        assert entry["margin"] > -1e-6
