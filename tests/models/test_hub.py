"""Models in folders and repositories of the hub: reopened bit for bit, told honestly, and nothing of this computer."""

from __future__ import annotations

import json
import re
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import protopush
from helpers import python
from protopush import HeadOptimal, InputError, ProtoModel, create_backbone
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image
from protopush.data.sources import load_catalog
from protopush.models.model_card import escaped
from protopush.runs.run import open_run

WRITTEN = {
    "README.md",
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "prototypes",
    "prototypes.json",
    "prototypes.png",
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def model(home) -> ProtoModel:
    return protopush.load(home / "run")


@pytest.fixture
def shared(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "shared")
    return tmp_path / "shared"


def small(**head) -> ProtoModel:
    """A model that was made here and stands for nothing yet."""
    backbone = create_backbone("test_resnet", pretrained=False, size=(64, 64))
    return ProtoModel(backbone, HeadOptimal(backbone.channels, 2, num_prototypes=2, embed_dim=8, **head)).eval()


def assert_equal(one: ProtoModel, two: ProtoModel) -> None:
    images = torch.randn(2, 3, *one.backbone.preprocessing.size)
    with torch.no_grad():
        assert torch.equal(one(images).logits, two(images).logits)
    assert one.head.proto_manager.anchors == two.head.proto_manager.anchors


def nearest(picture: Path, root: Path) -> str:
    """Which file a JPEG was made of."""
    pixels = np.asarray(read_image(picture), dtype=float)
    files = sorted(root.rglob("*.png"))
    apart = [np.abs(np.asarray(read_image(file), dtype=float) - pixels).mean() for file in files]
    return files[int(np.argmin(apart))].relative_to(root).as_posix()


# -- folders


def test_a_saved_model_reopens_both_ways(home, model, shared):
    assert {path.name for path in shared.iterdir()} == WRITTEN
    for again in (protopush.load(shared), ProtoModel.from_pretrained(shared), ProtoModel.from_pretrained(str(shared))):
        assert_equal(model, again)
        assert again.class_names == ["bird", "cat", "dog"]
        assert not again.training
    pictures = {path.name: path.read_bytes() for path in (home / "run" / "prototypes").iterdir()}
    assert len(pictures) == 6
    assert {path.name: path.read_bytes() for path in (shared / "prototypes").iterdir()} == pictures


def test_nothing_tells_of_this_computer_and_verify_asks_for_the_images(home, shared, capsys):
    for file in shared.rglob("*"):
        if file.is_file():
            assert str(home).encode() not in file.read_bytes(), file
    assert main(["verify", str(shared)]) == 2
    assert "expected the training images; say where they are with --root" in capsys.readouterr().err
    assert main(["evaluate", str(shared)]) == 2
    assert "(not shared)" in capsys.readouterr().err
    assert main(["verify", str(shared), "--root", str(home / "images")]) == 0
    assert main(["evaluate", str(shared), "--data.path", str(home / "images")]) == 0


def test_report_of_a_shared_folder_finds_the_images_that_it_is_given(home, shared):
    words = ["--faithfulness", "2", "--resamples", "0", "--audit", "false", "--data.num_workers", "0"]
    assert main(["report", str(shared), "--data.path", str(home / "images"), *words]) == 0
    said = (shared / "report.html").read_text(encoding="utf-8")
    assert "All 6 anchors hold" in said
    assert "Measured in 8 places" in said  # those of the anchors and two images
    assert "picture not found" not in said


def test_a_copy_of_a_copy_needs_no_images(home, shared, tmp_path):
    moved = Path(shutil.copytree(shared, tmp_path / "elsewhere"))
    shutil.rmtree(shared)
    again = ProtoModel.from_pretrained(moved)
    again.save_pretrained(tmp_path / "third")
    for name in WRITTEN - {"prototypes"}:
        assert (tmp_path / "third" / name).read_bytes() == (moved / name).read_bytes(), name
    assert len(list((tmp_path / "third" / "prototypes").iterdir())) == 6


def test_groups_stay_here(model, tmp_path):
    manager = model.head.proto_manager
    manager.anchors = [replace(anchor, group=f"patient {row}") for row, anchor in enumerate(manager.anchors)]
    model.save_pretrained(tmp_path / "shared")
    assert not [file for file in (tmp_path / "shared").rglob("*") if file.is_file() and b"patient" in file.read_bytes()]
    again = protopush.load(tmp_path / "shared").head.proto_manager.anchors
    assert again == [replace(anchor, group=None) for anchor in manager.anchors]


def test_after_another_push_pictures_and_numbers_are_not_those_of_before(home, model, shared):
    assert "balanced accuracy" in (shared / "README.md").read_text()
    run = open_run(home / "run")
    catalog = load_catalog(home / "images")
    forbidden = {anchor.sample_id for anchor in model.head.proto_manager.anchors}
    dataset = ImageDataset(catalog.split("train"), run.transform)
    names = [dataset.describe(i).sample_id for i in range(len(dataset))]
    allowed = torch.tensor([name not in forbidden for name in names])
    model.push_prototypes(
        torch.utils.data.DataLoader(dataset, batch_size=8), "cpu", momentum=0.0,
        allow=lambda ids, regions: allowed[torch.as_tensor(ids)].unsqueeze(1).expand(-1, len(regions)),
    )  # fmt: skip
    before = {path.name: path.read_bytes() for path in (shared / "prototypes").iterdir()}
    model.save_pretrained(shared)
    after = {path.name: path.read_bytes() for path in (shared / "prototypes").iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in before)  # read from the images again
    slots = model.head.proto_manager.max_prototypes
    for row, anchor in enumerate(model.head.proto_manager.anchors):
        picture = shared / "prototypes" / f"class{row // slots:02d}-prototype{row % slots:02d}.jpg"
        assert nearest(picture, home / "images") == anchor.file
    assert not (shared / "metrics.jsonl").exists()
    assert "balanced accuracy" not in (shared / "README.md").read_text()
    assert_equal(model, protopush.load(shared))


def test_a_picture_that_nobody_has_any_more_goes(model, shared):
    model.origin = None  # as if the images and the first run were lost
    model.save_pretrained(shared)
    assert not list((shared / "prototypes").iterdir())
    assert open_run(shared).picture(0, 0) is None


def test_a_model_made_here(tmp_path):
    made = small(anchoring="live", max_prototypes=3)
    made.save_pretrained(tmp_path / "made")
    again = protopush.load(tmp_path / "made")
    assert_equal(made, again)
    assert again.class_names == ["class 0", "class 1"]
    text = (tmp_path / "made" / "README.md").read_text()
    assert text.count("never pushed") == 4
    assert "## Numbers" not in text
    own = ProtoModel(create_backbone(nn.Conv2d(3, 8, 16, 16), size=(32, 32)), HeadOptimal(8, 2))
    own.save_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match="module of your own"):
        ProtoModel.from_pretrained(tmp_path / "own")
    assert_equal(own.eval(), ProtoModel.from_pretrained(tmp_path / "own", backbone=nn.Conv2d(3, 8, 16, 16)))


def test_what_else_is_in_the_folder_stays_and_so_does_a_card_of_ones_own(model, shared):
    (shared / "thesis.txt").write_text("years of work")
    (shared / "README.md").write_text("# My own words\n")
    model.save_pretrained(shared)
    assert (shared / "README.md").read_text() == "# My own words\n"
    assert (shared / "thesis.txt").read_text() == "years of work"


def test_refusals_change_nothing(home, model, tmp_path):
    before = {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="is a run that training wrote"):
        model.save_pretrained(home / "run")
    assert {path: path.read_bytes() for path in (home / "run").rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match="choose another"):
            model.save_pretrained(target)
    foreign = ProtoModel(nn.Identity(), model.head)
    with pytest.raises(InputError, match=r"wrap it with protopush\.create_backbone"):
        foreign.save_pretrained(tmp_path / "new")
    model.class_names = ["bird", "cat"]
    with pytest.raises(InputError, match="2 class names for a model of 3"):
        model.save_pretrained(tmp_path / "new")
    with pytest.raises(InputError, match="HeadOptimal"):
        ProtoModel(model.backbone, nn.Identity()).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full_leaves_the_last_model(model, shared, monkeypatch):
    from protopush.models import model_folder

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()}
    monkeypatch.setattr(model_folder, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        model.save_pretrained(shared)
    assert {path: path.read_bytes() for path in shared.rglob("*") if path.is_file()} == before


def test_models_are_copied_and_trained_as_before(model):
    again = deepcopy(model)
    assert_equal(model, again)
    assert again.train().training
    assert set(again.state_dict()) == set(model.state_dict())


def test_importing_protopush_stays_light():
    code = (
        "import sys, protopush\n"
        "heavy = {'torch', 'timm', 'torchvision', 'huggingface_hub', 'transformers', 'onnx', 'onnxruntime'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "protopush.ProtoModel\n"
        "left = {'timm', 'torchvision', 'lightning_fabric', 'transformers', 'onnx', 'onnxruntime', 'matplotlib'}\n"
        "assert not left & set(sys.modules), left & set(sys.modules)\n"
    )
    found = python("-c", code)
    assert found.returncode == 0, found.stderr


# -- the card


def test_the_card(home, shared):
    text = (shared / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "protopush"
    assert front["pipeline_tag"] == "image-classification"
    assert "license" not in front  # that is for whoever shares it
    assert "not a medical device" in text
    last = json.loads((home / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| balanced accuracy | {last['val_refitted']['balanced_accuracy']:.3f} |" in text
    for entry in json.loads((shared / "prototypes.json").read_text())["prototypes"]:
        anchor = entry["anchor"]
        box = ", ".join(map(str, anchor["box"]))
        assert f"| {entry['class']} | {entry['prototype']} | {escaped(anchor['file'])} | {box} |" in text
    assert str(protopush.load(shared).generate_model_card().data.library_name) == "protopush"


def test_how_to_use_it_runs(home, shared, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", (shared / "README.md").read_text(), flags=re.S)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(shared))
    exec(block.replace("photo.jpg", str(home / "images" / "cat" / "000.png")), {})
    told = capsys.readouterr().out
    assert told.split()[0] in ("bird", "cat", "dog")
    assert "Anchor(" in told


def test_names_cannot_write_the_card(tmp_path):
    made = small()
    made.class_names = ["a | b\n\n# Title", "<script>alert(1)</script> [x](javascript:y) ---"]
    made.save_pretrained(tmp_path / "made")
    text = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        "# test\\_resnet with prototypes of 2 classes"
    ]
    assert "<script" not in text.replace("\\<script", "")
    assert "](javascript" not in text
    rows = [line for line in text.splitlines() if "never pushed" in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}  # five columns, whatever the names
    assert protopush.load(tmp_path / "made").class_names == made.class_names


# -- the hub, which is a folder here


class FakeApi:
    """What huggingface_hub would send, kept."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.created, self.uploaded = folder, [], []

    def __call__(self, token: str | None = None) -> FakeApi:
        return self

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
        self.created.append((repo_id, private))
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: Path, **options: object) -> str:
        self.uploaded.append(options)
        shutil.copytree(folder_path, self.folder)
        return f"https://hub/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeApi:
    api = FakeApi(tmp_path / "remote")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", api)
    return api


def test_push_to_hub(model, hub, monkeypatch, home):
    assert model.push_to_hub("me/birds", commit_message="First") == "https://hub/me/birds/commit/1"
    assert hub.created == [("me/birds", True)]  # pictures of training images are not published by chance
    assert hub.uploaded[0]["commit_message"] == "First"
    assert "prototypes/*" in hub.uploaded[0]["delete_patterns"]
    assert {path.name for path in hub.folder.iterdir()} == WRITTEN
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(hub.folder)

    monkeypatch.setattr("protopush.models.pretrained.snapshot_download", download)
    assert_equal(model, ProtoModel.from_pretrained("me/birds", revision="v1"))
    assert (asked["name"], asked["revision"]) == ("me/birds", "v1")
    assert not [pattern for pattern in asked["allow_patterns"] if re.search(r"\.(bin|pt|pth|pkl)|^\*", pattern)]


def test_save_and_push_at_once(model, hub, tmp_path):
    assert model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/birds", private=False)
    assert hub.created == [("me/birds", False)]
    assert_equal(protopush.load(tmp_path / "here"), protopush.load(hub.folder))


def test_a_model_that_cannot_be_saved_makes_no_repository(model, hub):
    with pytest.raises(InputError, match="create_backbone"):
        ProtoModel(nn.Identity(), model.head).push_to_hub("me/birds")
    assert hub.created == []


@pytest.mark.parametrize("name", ["me/no-such-model", "no such name at all!", "gone/too/far"])
def test_no_repository_or_no_network_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match=f"cannot get {name} from the Hugging Face hub") as error:
        ProtoModel.from_pretrained(name, cache_dir=tmp_path / "cache", local_files_only=True)
    assert len(str(error.value).splitlines()) == 1


def test_no_network_while_uploading_is_one_line(model, hub, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand a long story")

    monkeypatch.setattr(FakeApi, "create_repo", fail)
    with pytest.raises(InputError, match="cannot upload to me/birds") as error:
        model.push_to_hub("me/birds")
    assert len(str(error.value).splitlines()) == 1
    assert "Name or service not known" in str(error.value)
    with pytest.raises(InputError, match="cannot upload to a b c"):
        model.push_to_hub("a b c")


@pytest.mark.parametrize("name", ["test_resnet", "fusion:test_resnet+test_resnet"])
def test_a_folder_of_anybody_reads_no_other_file(tmp_path, name):
    backbone = create_backbone(name, pretrained=False, size=(64, 64))
    made = ProtoModel(backbone, HeadOptimal(backbone.channels, 2, embed_dim=8)).eval()
    made.save_pretrained(tmp_path / "made")
    torch.save({"conv1.weight": nn.Module}, tmp_path / "evil.pth")  # what unpickling would be needed for
    file = tmp_path / "made" / "config.json"
    config = json.loads(file.read_text())
    recipe = config["backbone"]["recipe"]
    for part in (recipe.get("parts") or [recipe])[:1]:
        part["checkpoint_path"] = str(tmp_path / "evil.pth")
    file.write_text(json.dumps(config))
    assert_equal(made, ProtoModel.from_pretrained(tmp_path / "made"))


def test_damaged_downloads_are_refused(shared):
    (shared / "config.json").write_text('{"format": 1')
    with pytest.raises(InputError, match="damaged file"):
        ProtoModel.from_pretrained(shared)
    (shared / "config.json").unlink()
    with pytest.raises(InputError, match="did not come to its end"):
        ProtoModel.from_pretrained(shared)
