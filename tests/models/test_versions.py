"""A library upgrade is not a damaged file: the message names the versions and what differs between them."""

from __future__ import annotations

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

from helpers import SMALL, refused
from protopush.cli import main
from protopush.data.images import sha256_of
from protopush.models.stored_run import current_versions, version_change

OLD = f"saved with timm 0.9.16, read with timm {timm.__version__}; pip install timm==0.9.16 reads it as it was saved"


def edit(run: Path, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))


def rename_weights(run: Path) -> None:
    """As if a library had given its layers other names; the file is whole and its hash is on record."""
    state = load_file(run / "model.safetensors")
    names = {name: name.replace("layer4.0.conv1", "layer4.0.first") for name in state}
    save_file({names[name]: value for name, value in state.items()}, run / "model.safetensors")
    edit(run, weights_sha256=sha256_of(run / "model.safetensors"))


def test_a_run_records_what_saved_it(run):
    versions = json.loads((run / "config.json").read_text())["versions"]
    assert versions == current_versions()
    assert {"protopush", "torch", "timm", "pillow"} <= set(versions)
    assert versions["torch"] == torch.__version__
    assert main(["report", str(run), "--faithfulness", "0", "--resamples", "0"]) == 0
    assert f"timm {timm.__version__}" in (run / "report.html").read_text()


def test_weights_of_other_names_are_those_of_another_version(run, capsys):
    rename_weights(run)
    edit(run, versions=current_versions() | {"timm": "0.9.16"})
    message = refused(capsys, "evaluate", run)
    assert "do not fit the model that config.json describes" in message
    assert "missing: backbone.model.layer4.0.conv1.weight; unexpected: backbone.model.layer4.0.first.weight" in message
    assert message.endswith(OLD)
    assert "damaged" not in message
    assert len(message.splitlines()) == 1


def test_of_the_same_versions_they_are_another_run_s(run, capsys):
    rename_weights(run)
    message = refused(capsys, "verify", run)
    assert message.endswith("take the run's files from one copy")
    assert "saved with" not in message


def test_a_model_that_the_library_no_longer_has(run, capsys):
    config = json.loads((run / "config.json").read_text())
    backbone = config["backbone"] | {"recipe": {"name_or_module": "test_resnet_gone"}}
    edit(run, backbone=backbone, versions=current_versions() | {"timm": "0.9.16"})
    message = refused(capsys, "evaluate", run)
    assert "timm has no model 'test_resnet_gone'" in message
    assert message.endswith(f"the run was {OLD}")


def test_a_run_from_before_versions_were_recorded_opens(run, capsys):
    config = json.loads((run / "config.json").read_text())
    del config["versions"]
    (run / "config.json").write_text(json.dumps(config | {"protopush": "0.0.9"}))
    assert main(["verify", str(run)]) == 0
    rename_weights(run)
    assert "saved with protopush 0.0.9, read with protopush" in refused(capsys, "evaluate", run)


def test_verify_says_so_where_similarities_are_off(run, capsys):
    entries = json.loads((run / "prototypes.json").read_text())
    entries["prototypes"][0]["anchor"]["similarity_after"] -= 0.01
    (run / "prototypes.json").write_text(json.dumps(entries))
    capsys.readouterr()
    assert main(["verify", str(run)]) == 1
    assert "Other versions" not in capsys.readouterr().err
    edit(run, versions=current_versions() | {"timm": "0.9.16"})
    assert main(["verify", str(run)]) == 1
    assert f"the run was {OLD}" in capsys.readouterr().err


def test_a_checkpoint_of_another_version(run, home, capsys):
    file = run / "checkpoints" / "last.pt"
    state = torch.load(file, weights_only=True)
    assert state["versions"] == current_versions()
    state["versions"]["timm"] = "0.9.16"
    state["model"]["head.other"] = state["model"].pop("head.bias")
    torch.save(state, file)
    (run / "config.json").unlink()  # as a run that was cut off
    out = ["--out", str(run), "--resume"]
    message = refused(capsys, "train", "--data.path", home / "images", *SMALL, *out)
    assert "does not fit the model and optimizer of this run" in message
    assert 'Missing key(s) in state_dict: "head.bias"' in message
    assert OLD in message


def test_a_library_that_is_not_there():
    assert "read with no somelib" in version_change({"somelib": "1.0"})


def test_another_build_of_a_release_is_no_change():
    release = torch.__version__.partition("+")[0]
    assert version_change({"torch": f"{release}+cu999"}) == ""
    assert version_change({"torch": "1.13.1+cu117"}).endswith("pip install torch==1.13.1 reads it as it was saved")
