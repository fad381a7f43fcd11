"""The command line as a newcomer meets it: right words, wrong words, bad files; nothing half-written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import SMALL, make_images, python, refused
from protopush.cli import main
from protopush.cli.commands import COMMANDS
from protopush.cli.parser import parser_of
from protopush.runs.split_record import read_split


def test_help_does_not_import_torch():
    code = "import sys; from protopush.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    found = python("-c", code)
    assert found.returncode == 0
    assert all(command in found.stdout for command in COMMANDS)


def test_parsing_options_does_not_import_torch():
    code = (
        "import sys; from protopush.cli import main; from protopush.cli.commands import COMMANDS\n"
        "for c in COMMANDS:\n"
        "    try: main([*c.split(), '--help'])\n"
        "    except SystemExit as e: assert e.code == 0\n"
        "sys.exit('torch' in sys.modules)"
    )
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    assert all(option in found.stdout for option in ("--train.epochs", "--share", "--threshold", "--format"))


def test_explaining_imports_only_what_it_needs(home, tmp_path):
    unneeded = {"lightning_fabric", "torchmetrics", "scipy", "matplotlib", "gradio", "transformers", "jinja2", "onnx"}
    words = ["explain", home / "run", home / "images" / "cat" / "000.png", "--out", tmp_path, "--why_not", "bird"]
    code = f"import sys; from protopush.cli import main; assert main({[str(word) for word in words]}) == 0\n"
    found = python("-c", code + f"print({unneeded} & {{name.partition('.')[0] for name in sys.modules}})")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "set()"
    assert (tmp_path / "000.png").is_file()


def test_evaluate(home, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(home / "run"), "--data.split", "test", "--json", "--device", "cpu"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == ["n", "accuracy", "balanced_accuracy", "macro_f1", "auroc", "ece", "confusion", "per_class"]
    assert values["n"] == sum(row["split"] == "test" for row in read_split(home / "run").values())
    assert list(values["per_class"]) == ["bird", "cat", "dog"]
    assert main(["evaluate", str(home / "run"), "--data.path", str(home / "images"), "--data.split", "val"]) == 0
    assert "balanced accuracy" in capsys.readouterr().out


def test_push_writes_a_new_run_and_leaves_the_first(home, tmp_path, capsys):
    before = {p: p.read_bytes() for p in (home / "run").rglob("*") if p.is_file()}
    words = ["push", home / "run", "--data.path", home / "images", "--momentum", "0.9", "--use_local", "true"]
    capsys.readouterr()
    assert main([str(w) for w in (*words, "--out", tmp_path / "run2", "--json")]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert len(report["prototypes"]) == 6
    assert report["prototypes"][0]["anchor"]["file"].startswith("bird/")
    assert report["prototypes"][0]["anchor"]["box"] is not None
    assert "Collecting LOCAL patch features for prototype push..." in err
    assert {p: p.read_bytes() for p in (home / "run").rglob("*") if p.is_file()} == before
    assert main(["verify", str(tmp_path / "run2")]) == 0
    assert "the run itself" in refused(capsys, *words, "--out", home / "run")
    assert "add --overwrite" in refused(capsys, *words, "--out", tmp_path / "run2")
    (tmp_path / "run2" / "old.txt").touch()
    assert main([str(w) for w in (*words, "--out", tmp_path / "run2", "--overwrite")]) == 0
    assert {p.name for p in (tmp_path / "run2").iterdir()} == {
        "candidates.safetensors", "config.json", "config.yaml", "metrics.jsonl", "model.safetensors", "prototypes",
        "prototypes.json", "prototypes.png", "split.csv",
    }  # fmt: skip
    assert len((tmp_path / "run2" / "metrics.jsonl").read_text().splitlines()) == 1


def test_push_can_be_unique_and_guarded(home, tmp_path, capsys):
    words = ["push", home / "run", "--data.path", home / "images", "--momentum", "0", "--unique", "image"]
    capsys.readouterr()
    assert main([str(w) for w in (*words, "--guard", "report", "--out", tmp_path / "run2", "--json")]) == 0
    report = json.loads(capsys.readouterr().out)
    files = [p["anchor"]["file"] for p in report["prototypes"]]
    assert len(set(files)) == len(files)
    assert report["unique"] == ["image"] * len(report["unique"])
    assert report["guard"]["before"]["balanced_accuracy"] is not None
    row = json.loads((tmp_path / "run2" / "metrics.jsonl").read_text())
    assert row["guard"]["action"] == "kept"
    assert main(["verify", str(tmp_path / "run2")]) == 0
    assert main([str(w) for w in (*words, "--out", tmp_path / "run3", "--use_local", "false")]) == 0
    assert main(["verify", str(tmp_path / "run3")]) == 0


def test_explain_writes_panel_and_data_that_add_up(home, tmp_path, capsys):
    images = [str(home / "images" / name) for name in ("cat/000.png", "dog/000.png")]  # two files of the same name
    capsys.readouterr()
    assert main(["explain", str(home / "run"), *images, "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["000-2.json", "000-2.png", "000.json", "000.png"]
    assert json.loads((tmp_path / "out" / "000.json").read_text()) == told[0]
    for values in told:
        assert Image.open(values["panel"]).size[0] > 800
        for evidence in values["classes"]:
            total = sum(match["contribution"] for match in evidence["matches"])
            assert total + evidence["bias"] == pytest.approx(evidence["logit"], abs=1e-4)
            assert all(match["anchor"]["file"] for match in evidence["matches"])


def test_verify_tells_what_no_longer_holds(home, run, tmp_path, capsys):
    assert main(["verify", str(run)]) == 0
    assert "All 6 anchors hold" in capsys.readouterr().out
    moved = shutil.copytree(home / "images", tmp_path / "moved")
    assert main(["verify", str(run), "--root", str(moved)]) == 0

    anchors = [entry["anchor"] for entry in json.loads((run / "prototypes.json").read_text())["prototypes"]]
    file = moved / anchors[0]["file"]
    file.write_bytes((moved / "dog" / "009.png").read_bytes())
    assert main(["verify", str(run), "--root", str(moved)]) == 1
    assert "file changed" in capsys.readouterr().out
    file.unlink()
    assert main(["verify", str(run), "--root", str(moved), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["holds"]
    assert {a["problem"] for a in told["anchors"] if a["file"] == anchors[0]["file"]} == {"file missing"}


def test_verify_notices_other_weights_and_edited_records(run, capsys):
    certificate = json.loads((run / "prototypes.json").read_text())
    certificate["prototypes"][3]["anchor"]["cell"] = 24 - certificate["prototypes"][3]["anchor"]["cell"]
    (run / "prototypes.json").write_text(json.dumps(certificate))
    assert main(["verify", str(run)]) == 1
    assert "1 of 6 anchors do not hold" in capsys.readouterr().out
    for outside in (-1, 25, 10**9):
        certificate["prototypes"][3]["anchor"]["cell"] = outside
        (run / "prototypes.json").write_text(json.dumps(certificate))
        assert main(["verify", str(run)]) == 1
    certificate["prototypes"][3]["anchor"]["file"] = "../../etc/passwd"
    (run / "prototypes.json").write_text(json.dumps(certificate))
    assert main(["verify", str(run)]) == 1
    assert "outside the data folder" in capsys.readouterr().out

    weights = load_file(run / "model.safetensors")
    weights["head.proj.0.weight"] += 0.01 * torch.randn_like(weights["head.proj.0.weight"])
    save_file(weights, run / "model.safetensors")
    assert main(["verify", str(run)]) == 1
    assert "weights changed" in capsys.readouterr().out


def test_damaged_run_folders(run, tmp_path, capsys):
    assert "no such run folder" in refused(capsys, "verify", tmp_path / "nothing")
    whole = (run / "model.safetensors").read_bytes()
    for damage in (whole[:-100], b"", whole[:1000] + b"\0\1\2\3" + whole[1004:]):
        (run / "model.safetensors").write_bytes(damage)
        message = refused(capsys, "evaluate", run)
        assert "damaged file" in message
        assert "model.safetensors" in message
    (run / "model.safetensors").unlink()
    assert "no such file" in refused(capsys, "evaluate", run)
    (run / "config.json").write_text("{")
    assert "damaged file" in refused(capsys, "evaluate", run)
    (run / "config.json").write_text("{}")
    assert "damaged file" in refused(capsys, "evaluate", run)
    (run / "config.json").unlink()
    assert "did not come to its end" in refused(capsys, "evaluate", run)


def broken_image(home: Path) -> None:
    make_images(home / "a", ["x", "y"], 5)
    cut = home / "a" / "x" / "001.png"
    cut.write_bytes(cut.read_bytes()[:300])
    (home / "a" / "y" / "002.png").write_text("no image")


def class_without_training_image(home: Path) -> None:
    rows = [f"a/x/{i:03d}.png,x,train" for i in range(4)] + ["a/y/000.png,y,test", "a/x/004.png,x,val"]
    make_images(home / "a", ["x", "y"], 5)
    (home / "m.csv").write_text("\n".join(["image,label,split", *rows]))


@pytest.mark.parametrize(("make", "path", "message"), [
    (lambda h: None, "gone.csv", r"no such file: .*gone.csv"),
    (lambda h: (h / "a").mkdir(), "a", r"no images under .*a; expected one folder of images per class"),
    (broken_image, "a", r"2 unreadable images: .*x/001.png \(.*\), .*y/002.png \(not an image\)"),
    (class_without_training_image, "m.csv", r"classes without a training image: y"),
    (lambda h: (h / "m.csv").write_text("image,lable\n1.png,a\n"), "m.csv", r"no column 'label'.*did you mean 'lable'"),
])  # fmt: skip
def test_bad_data_writes_nothing(tmp_path, capsys, make, path, message):
    make(tmp_path)
    line = refused(capsys, "train", "--data.path", tmp_path / path, "--out", tmp_path / "run", *SMALL)
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


def test_non_finite_features_name_the_samples_and_write_nothing(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    import timm

    weights = timm.create_model("test_resnet").state_dict()
    weights[next(iter(weights))][:] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    words = ["train", "--data.path", home / "images", "--out", tmp_path / "run", *SMALL]
    words[words.index("false")] = tmp_path / "nan.safetensors"
    for freeze in ("true", "false"):
        line = refused(capsys, *words, "--train.freeze_backbone", freeze)
        assert re.search(r"NaN or infinite features in (at least )?\d+ samples( of one batch)?: \w+/0", line)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("words", "message"), [
    ([], ""),
    (["trian"], "unknown command 'trian'; did you mean 'train'?"),
    (["train"], "the following arguments are required: out"),
    (["train", "--out", "x", "--train.epohcs", "3"], "unknown key 'train.epohcs'; did you mean 'train.epochs'?"),
    (["train", "--out", "x", "--config", "recipe.yaml"], "unknown key 'push.momentun'; did you mean 'push.momentum'?"),
    (["train", "--out", "x", "--config", "none.yaml"], "File does not exist: "),
    (["train", "--out", "x", "--train.epochs", "many"], "Expected a <class 'int'>. Got value: many"),
    (["train", "--out", "x", "--data.path", "i", "--train.epochs", "0"], "train.epochs is 0; expected at least 1"),
    (["train", "--out", "x", "--data.path", "i", "--push.momentum", "9"], "push.momentum is 9.0; expected 0"),
    (["train", "--out", "x"], "no data given"),
    (["train", "--out", "x", "--data.path", "i", "--data.source", "fodler"], "unknown data source 'fodler'"),
    (["evaluate", "gone"], "no such run folder: gone"),
    (["push", "gone", "--out", "x", "--momentum", "2"], "momentum is 2.0"),
    (["push", "gone", "--out", "x", "--unique", "lesion"], "unique is 'lesion'; expected one of: none, patch"),
    (["push", "gone", "--out", "x", "--guard", "on"], "guard is 'on'; expected one of: off, report"),
    (["train", "--out", "x", "--data.path", "i", "--push.guard_budget", "-1"], "guard_budget is -1.0"),
    (["train", "--out", "x", "--data.path", "i", "--push.start_epoch", "-1"], "push.start_epoch is -1"),
    (["train", "--out", "x", "--data.path", "i", "--push.grow_quantile", "2"], "push.grow_quantile is 2.0"),
    (["train", "--out", "x", "--data.path", "i", "--push.guard", "budget", "--push.anchoring", "live"], "have none"),
])  # fmt: skip
def test_wrong_words_get_one_clear_line(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "i", ["a", "b"], 3)
    (tmp_path / "recipe.yaml").write_text("push:\n  momentun: 0.5\n")
    if not words:
        assert main([]) == 2
        assert "usage: protopush COMMAND" in capsys.readouterr().out
        return
    assert message in refused(capsys, *words)
    assert not (tmp_path / "x").exists()


def test_unknown_backbone_and_device(home, tmp_path, capsys):
    words = ["train", "--data.path", home / "images", "--out", tmp_path / "x", *SMALL]
    assert "resnet18" in refused(capsys, *words, "--model.backbone", "resnet81")
    assert "try --trainer.device cpu" in refused(capsys, *words, "--trainer.device", "abacus")
    line = refused(capsys, "verify", home / "run", "--device", "abacus")
    assert "cannot run on device 'abacus'; expected one of those that are here: auto, " in line
    assert not (tmp_path / "x").exists()


def test_an_existing_folder_is_never_overwritten_by_chance(home, tmp_path, capsys):
    words = ["train", "--data.path", home / "images", *SMALL]
    assert "holds a run already" in refused(capsys, *words, "--out", home / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in ("false", "true"):
        line = refused(capsys, *words, "--out", tmp_path / "mine", "--overwrite", overwrite)
        assert "is not empty" in line
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_explain_refuses_bad_images_before_it_begins(home, tmp_path, capsys):
    (tmp_path / "bad.jpg").write_text("text")
    line = refused(
        capsys, "explain", home / "run", home / "images/cat/000.png", tmp_path / "bad.jpg", tmp_path / "no.png",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert "2 unreadable images" in line
    assert not (tmp_path / "out").exists()


def test_train_script_is_a_door_to_the_command(tmp_path):
    script = Path(__file__).parents[2] / "train.py"
    found = python(script, "--help")
    assert found.returncode == 0
    assert "--push.start_epoch" in found.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name):
    assert not [action.dest for action in parser_of(name)._actions if not action.help]
