"""``protopush forbid``: what people forbid never is an anchor again, and the run stays whole whatever happens."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from helpers import SMALL, SPLITS, anchors, contents, refused
from protopush import InputError
from protopush.cli import main
from protopush.data import files as change
from protopush.data.images import read_image
from protopush.models.model_folder import save_run
from protopush.runs.decisions import load_decisions
from protopush.runs.run import open_run


@pytest.fixture(scope="session")
def home(masked_home) -> Path:
    return masked_home


def forbid(capsys, run: Path, *words: object) -> dict:
    """A decision, as --json prints it."""
    capsys.readouterr()
    given = ["forbid", run, *words, "--json", "--device", "cpu", "--data.num_workers", "0"]
    assert main([str(w) for w in [*given, *([] if "--reason" in words else ["--reason", "a ruler"])]]) == 0
    return json.loads(capsys.readouterr().out)


def place(anchor: dict) -> tuple[str, int]:
    return anchor["file"], anchor["cell"]


def next_best(run: Path, name: str, prototype: int, barred: set[tuple[str, int]]) -> tuple[str, int]:
    """One by one and independently: the nearest patch of the class's training images that isn't barred."""
    opened = open_run(run)
    vector = opened.head.proto_manager.unit()[opened.class_names.index(name), prototype]
    best = (-2.0, "", -1)
    for i, split in enumerate(SPLITS):
        file = f"images/{name}/{i:03d}.png"
        if split == "train":
            with torch.no_grad():
                _, patches = opened.model.extract_features(opened.transform(read_image(opened.root / file))[None])
                similarity = F.normalize(opened.model.head.proj(patches)[0], dim=-1) @ vector
            for cell, value in enumerate(similarity.tolist()):
                if (file, cell) not in barred and value > best[0] + 1e-7:
                    best = (value, file, cell)
    return best[1:]


def test_a_forbidden_prototype_gets_the_next_best_patch(run, capsys):
    old, before, weights = anchors(run), contents(run), open_run(run).model.state_dict()
    expected = next_best(run, "cat", 1, {place(old["cat", 0]), place(old["cat", 1])})
    made = forbid(capsys, run, "--prototype", "cat:1", "--reason", "a ruler", "--who", "dr. who")
    new = anchors(run)
    assert place(new["cat", 1]) == expected
    assert new["cat", 1]["similarity_after"] == pytest.approx(1.0, abs=1e-6)
    assert {key: new[key] for key in new if key != ("cat", 1)} == {k: old[k] for k in old if k != ("cat", 1)}
    assert main(["verify", str(run)]) == 0

    now = open_run(run).model.state_dict()
    moved = {key for key in now if not torch.equal(now[key], weights[key])}
    assert moved == {"head.proto_manager.prototypes"}
    rows = (now["head.proto_manager.prototypes"] != weights["head.proto_manager.prototypes"]).any(dim=1)
    assert rows.nonzero().flatten().tolist() == [3]
    after = contents(run)
    assert after.keys() == before.keys() | {Path("decisions.jsonl")}
    changed = {path.as_posix() for path in before if after[path] != before[path]}
    assert changed <= {
        "model.safetensors", "config.json", "prototypes.json", "prototypes.png", "prototypes/class01-prototype01.jpg"
    }  # fmt: skip

    assert [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()] == [made]
    assert {k: made[k] for k in ("id", "who", "kind", "class", "prototype", "reason")} == {
        "id": 1, "who": "dr. who", "kind": "prototype", "class": "cat", "prototype": 1, "reason": "a ruler"
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", made["time"])
    assert {k: made[k] for k in ("file", "cell", "region", "box")} == {
        k: old["cat", 1][k] for k in ("file", "cell", "region", "box")
    }
    (one,) = made["replaced"]
    assert (one["class"], one["prototype"], one["old"], one["new"]) == ("cat", 1, old["cat", 1], new["cat", 1])
    assert made["val_before"]["n"] == made["val_after"]["n"] == 6
    assert made["val_before"].keys() == {"n", "balanced_accuracy", "auroc"}


def test_the_log_holds_where_a_prototype_was(run, capsys):
    import base64

    before = open_run(run).head.proto_manager.prototypes[0].detach()
    made = forbid(capsys, run, "--prototype", "0:0")
    vector = np.frombuffer(base64.b64decode(made["replaced"][0]["old_vector"]), dtype="<f4")
    assert np.array_equal(vector, before.numpy())


def test_what_was_forbidden_once_never_comes_back(run, capsys):
    seen = [place(anchors(run)["bird", 0])]
    for number in range(1, 4):
        assert forbid(capsys, run, "--prototype", "bird:0")["id"] == number
        seen.append(place(anchors(run)["bird", 0]))
    assert len(set(seen)) == 4
    assert place(anchors(run)["bird", 1]) not in seen
    decisions = load_decisions(run)
    assert [made.id for made in decisions] == [1, 2, 3]
    assert [(made.file, made.cell) for made in decisions] == seen[:3]


@pytest.mark.parametrize("unique", ["none", "image"])
def test_what_another_prototype_of_the_class_stands_for_is_not_taken(run, home, capsys, unique):
    forbid(capsys, run, "--prototype", "cat:0")
    first, other = open_run(run), open_run(home / "run")
    manager = other.head.proto_manager
    manager.prototypes.data[3] = first.head.proto_manager.prototypes.data[2]  # cat:1 stands where cat:0 would go
    manager.anchors[3] = first.head.proto_manager.anchors[2]
    shutil.rmtree(run)
    shutil.copytree(home / "run", run)
    save_run(replace(other, folder=run))
    config = (run / "config.yaml").read_text().replace("unique: none", f"unique: {unique}")
    (run / "config.yaml").write_text(config)

    old = anchors(run)
    file, cell = place(old["cat", 1])
    barred = {(file, c) for c in (range(25) if unique == "image" else [cell])} | {place(old["cat", 0])}
    expected = next_best(run, "cat", 0, barred)
    forbid(capsys, run, "--prototype", "cat:0")
    assert place(anchors(run)["cat", 0]) == expected
    assert anchors(run)["cat", 1] == old["cat", 1]


def test_a_forbidden_image_loses_every_anchor_and_a_push_keeps_to_it(run, home, tmp_path, capsys):
    file = anchors(run)["dog", 0]["file"]
    concerned = {key for key, anchor in anchors(run).items() if anchor["file"] == file}
    made = forbid(capsys, run, "--image", file)
    assert {(one["class"], one["prototype"]) for one in made["replaced"]} == concerned
    assert file not in {anchor["file"] for anchor in anchors(run).values()}
    assert main(["verify", str(run)]) == 0

    # Prototypes that still are where they were would choose it again, here under another name: without "images/".
    kept = shutil.copytree(home / "run", tmp_path / "kept")
    shutil.copyfile(run / "decisions.jsonl", kept / "decisions.jsonl")
    for source, out in ((kept, "pushed"), (home / "run", "free")):
        words = ["push", source, "--momentum", "0", "--data.path", home / "data" / "images", "--data.split", "all"]
        assert main([str(w) for w in (*words, "--out", tmp_path / out, "--data.num_workers", "0")]) == 0
    short = file.removeprefix("images/")
    assert short not in {anchor["file"] for anchor in anchors(tmp_path / "pushed").values()}
    assert short in {anchor["file"] for anchor in anchors(tmp_path / "free").values()}
    assert load_decisions(tmp_path / "pushed") == load_decisions(run) != []
    assert not (tmp_path / "free" / "decisions.jsonl").exists()
    assert main(["verify", str(tmp_path / "pushed")]) == 0


def test_an_image_without_anchors_is_forbidden_all_the_same_but_once(run, home, capsys, monkeypatch):
    used = {anchor["file"] for anchor in anchors(run).values()}
    file = next(f for f in (f"images/bird/{i:03d}.png" for i in range(6)) if f not in used)
    before = contents(run)
    monkeypatch.chdir(home / "data" / "images" / "bird")
    made = forbid(capsys, run, "--image", Path(file).name)  # a path from the working folder
    assert made["file"] == file
    assert made["class"] == "bird"
    assert made["replaced"] == []
    assert made["val_before"] == made["val_after"] is not None
    assert {path: data for path, data in contents(run).items() if path.name != "decisions.jsonl"} == before
    line = refused(capsys, "forbid", run, "--image", home / "data" / file, "--reason", "again")
    assert "already forbidden" in line
    assert len(load_decisions(run)) == 1


def inside_share(anchor: dict) -> float:
    x0, _, x1, _ = anchor["box"]
    return (min(x1, 20) - min(x0, 20)) / (x1 - x0)


def test_masks(run, home, tmp_path, capsys):
    old = anchors(run)
    outside = {
        key for key, a in old.items() if inside_share(a) < 0.5 and not a["file"].endswith("000.png")
    }  # the first image of each class has no mask
    assert outside
    made = forbid(capsys, run, "--mask-column", "--reason", "off the lesion")
    assert (made["kind"], made["min_share"], made["unmasked"]) == ("mask", 0.5, 3)
    assert {(one["class"], one["prototype"]) for one in made["replaced"]} == outside
    assert main(["verify", str(run)]) == 0
    assert "already forbidden" in refused(capsys, "forbid", run, "--mask-column", "--min_share", "0.4", "--reason", "r")
    stricter = forbid(capsys, run, "--mask-column", "--min_share", "1.0")
    assert stricter["id"] == 2
    words = ["push", run, "--momentum", "0", "--data.num_workers", "0", "--out", tmp_path / "pushed"]
    assert main([str(w) for w in words]) == 0
    for folder in (run, tmp_path / "pushed"):
        for anchor in anchors(folder).values():
            assert anchor["file"].endswith("000.png") or inside_share(anchor) == 1.0
    words[-1] = tmp_path / "unmasked"
    line = refused(capsys, *words, "--data.path", home / "data" / "images")
    assert "none of the 21 images has a mask" in line or "has a mask; expected a manifest" in line
    assert not (tmp_path / "unmasked").exists()


def test_where_training_kept_anchors_on_masks_those_that_follow_are_too(run, capsys):
    """All that comes after an anchor off its mask, one after the other; without that setting some lie off it too."""
    after = []
    for share in ("0.0", "1.0"):
        copy = Path(shutil.copytree(run, run.parent / share))
        config = (copy / "config.yaml").read_text()
        (copy / "config.yaml").write_text(config.replace("min_mask_share: 0.0", f"min_mask_share: {share}"))
        after.append([forbid(capsys, copy, "--prototype", "cat:1")["replaced"][0]["new"] for _ in range(6)])
    plain, masked = ([a for a in some if not a["file"].endswith("000.png")] for some in after)
    assert min(map(inside_share, plain)) < 1.0
    assert masked
    assert all(inside_share(anchor) == 1.0 for anchor in masked)


def test_bad_masks_are_named_together(run, home, tmp_path, capsys):
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    words = ["forbid", run, "--mask-column", "--reason", "r", "--data.path", data / "manifest.csv"]
    Image.new("L", (32, 40)).save(data / "masks" / "cat-1.png")
    Image.new("L", (8, 8)).save(data / "masks" / "dog-2.png")
    line = refused(capsys, *words)
    assert re.search(r"2 masks do not fit: .*cat-1.png \(32x40, its image 40x32\), .*dog-2.png \(8x8", line)
    (data / "masks" / "cat-1.png").write_text("no image")
    (data / "masks" / "dog-2.png").unlink()
    assert re.search(r"2 unreadable images: .*cat-1.png .*dog-2.png \(missing\)", refused(capsys, *words))
    assert contents(run) == contents(home / "run")


def test_a_class_without_an_allowed_patch_leaves_the_run_as_it_was(run, home, tmp_path, capsys):
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    for path in (data / "masks").glob("cat-*.png"):
        Image.new("L", (40, 32)).save(path)
    text = (
        (data / "manifest.csv")
        .read_text()
        .replace("images/cat/000.png,cat,train,", "images/cat/000.png,cat,train,masks/cat-0.png")
    )
    (data / "manifest.csv").write_text(text)
    words = ["--mask-column", "--reason", "r", "--data.path", data / "manifest.csv", "--data.num_workers", "0"]
    line = refused(capsys, "forbid", run, *words, logged=True)
    assert "no allowed patch is left for cat:0, cat:1" in line
    assert contents(run) == contents(home / "run")
    assert main(["verify", str(run)]) == 0


def test_moved_images_are_found_and_other_images_refused(run, home, tmp_path, capsys):
    moved = Path(shutil.copytree(home / "data", tmp_path / "moved"))
    words = ["forbid", run, "--prototype", "cat:0", "--reason", "r", "--data.path"]
    line = refused(capsys, *words, moved / "images")  # names without "images/": nobody would find the anchors
    assert re.search(r"\d anchors' files are missing or changed below", line)
    assert contents(run) == contents(home / "run")
    forbid(capsys, *words[1:], moved / "manifest.csv")
    assert open_run(run).root == moved.resolve()
    assert main(["verify", str(run)]) == 0


@pytest.mark.parametrize(("words", "message"), [
    (["--prototype", "cta:0"], "unknown class 'cta'; did you mean 'cat'?"),
    (["--prototype", "7:0"], "unknown class '7'; expected one of: bird, cat, dog"),
    (["--prototype", "cat:2"], "no prototype cat:2; expected one of: cat:0, cat:1"),
    (["--prototype", "cat"], "prototype 'cat'; expected CLASS:NUMBER, such as bird:0"),
    (["--prototype", "cat:-1"], "expected CLASS:NUMBER"),
    (["--image", "images/cat/00.png"], "is none of the 18 training images; did you mean 'images/cat/00"),
    (["--image", "images/cat/009.png"], "is none of the 18 training images"),  # a test image
    (["--image", "../../etc/passwd"], "lies outside the data folder"),
    (["--image", "/etc/passwd"], "lies outside the data folder"),
    (["--mask-column", "--min_share", "0"], "min_share is 0"),
    (["--mask-column", "--data.path", "images"], "expected a manifest with a column 'mask'"),
    (["--prototype", "cat:0", "--image", "images/cat/000.png"], "exactly one of --prototype"),
    (["--image", "images/cat/000.png", "--mask-column"], "several things to forbid"),
    ([], "nothing to forbid"),
    (["--prototype", "cat:0", "--reason", " "], "no reason given"),
    (["--imgae", "x"], "unknown key 'imgae'; did you mean 'image'?"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_writes_nothing(home, capsys, monkeypatch, words, message):
    monkeypatch.chdir(home / "data")
    before = contents(home / "run")
    given = words if "--reason" in words else [*words, "--reason", "r"]
    assert message in refused(capsys, "forbid", home / "run", *given)
    assert contents(home / "run") == before


def test_a_reason_is_required_and_a_prototype_must_have_been_pushed(run, home, capsys):
    assert "required: reason" in refused(capsys, "forbid", run, "--prototype", "cat:0")
    values = json.loads((run / "prototypes.json").read_text())
    values["prototypes"][2]["anchor"] = None
    (run / "prototypes.json").write_text(json.dumps(values))
    assert "cat:0 was never pushed" in refused(capsys, "forbid", run, "--prototype", "cat:0", "--reason", "r")


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "region", "replaced": []}', '{"kind": "image"}'])
def test_a_damaged_log_is_refused(run, tmp_path, capsys, line):
    (run / "decisions.jsonl").write_text(line + "\n")
    for words in (["forbid", run, "--prototype", "cat:0", "--reason", "r"], ["push", run, "--out", tmp_path / "out"]):
        assert re.search(r"damaged file: .*decisions.jsonl, line 1", refused(capsys, *words))
    assert not (tmp_path / "out").exists()


def test_people_read_a_table(run, capsys):
    old = anchors(run)["dog", 1]
    capsys.readouterr()
    words = ["forbid", run, "--prototype", "dog:1", "--reason", "Lineal \u2028 im Bild", "--data.num_workers", "0"]
    assert main([str(w) for w in words]) == 0
    text = capsys.readouterr().out
    new = anchors(run)["dog", 1]
    row = next(line for line in text.splitlines() if line.strip().startswith("dog:1"))
    assert f"{old['file']} cell {old['cell']}" in row
    assert f"{new['file']} cell {new['cell']}" in row
    assert f"{new['similarity']:.3f}" in row
    assert re.search(r"validation before: balanced accuracy \d\.\d{3}.*; after: balanced accuracy \d", text)
    assert text.endswith(f"Next: protopush verify {run}\n")
    assert load_decisions(run)[0].reason == "Lineal \u2028 im Bild"


def test_live_anchors(home, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(home / "cache"))
    live = ["--train.epochs", "1", "--push.anchoring", "live", "--push.start_epoch", "0", "--push.unique", "image"]
    words = ["train", "--data.path", home / "data" / "manifest.csv", "--out", tmp_path / "run", *SMALL, *live]
    assert main([str(w) for w in words]) == 0
    run = tmp_path / "run"
    old = anchors(run)
    barred = {(old["cat", 1]["file"], cell) for cell in range(25)} | {place(old["cat", 0])}
    expected = next_best(run, "cat", 0, barred)  # the run was trained with another image for each prototype
    made = forbid(capsys, run, "--prototype", "cat:0")
    new = anchors(run)
    assert place(new["cat", 0]) == place(made["replaced"][0]["new"]) == expected
    assert new["cat", 0]["file"] != new["cat", 1]["file"]
    assert main(["verify", str(run)]) == 0
    opened = open_run(run)
    assert opened.head.anchoring == "live"
    stored = opened.head.proto_manager.unit()
    assert torch.allclose(opened.head.prototypes(), stored, atol=1e-6)
    assert expected[0] == f"images/cat/{int(opened.head.proto_manager.anchor_ids[2]) - 6:03d}.png"


def test_a_failure_before_the_end_changes_nothing(run, home, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("_to_disk", "tempfile.mkdtemp"):
        with monkeypatch.context() as patch:
            patch.setattr(f"protopush.data.files.{name}", full)
            words = ["--prototype", "cat:0", "--reason", "r", "--data.num_workers", "0"]
            line = refused(capsys, "forbid", run, *words, logged=True)
            assert "No space left on device" in line
        assert contents(run) == contents(home / "run")
        assert not list(run.glob(".change*"))


def test_what_was_cut_off_while_files_took_their_places_is_finished_by_whoever_opens_the_run(run, capsys, monkeypatch):
    def cut(self, target):
        if Path(target).name == "model.safetensors" and change.READY in self.parts:
            raise KeyboardInterrupt
        return real(self, target)

    real, old = Path.replace, place(anchors(run)["cat", 0])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut)
        assert main(["forbid", str(run), "--prototype", "cat:0", "--reason", "r", "--data.num_workers", "0"]) == 130
    assert (run / change.READY).is_dir()
    assert main(["verify", str(run)]) == 0
    assert not (run / change.READY).exists()
    assert len(load_decisions(run)) == 1
    assert place(anchors(run)["cat", 0]) != old


def test_a_run_that_another_process_changes_meanwhile_is_left_to_it(run, home, capsys, monkeypatch):
    from protopush.runs import decisions as writing
    from protopush.runs import review as module

    real = module.replace_anchors

    def slow(*arguments):
        shutil.copyfile(home / "run" / "config.yaml", run / "decisions.jsonl")
        return real(*arguments)

    monkeypatch.setattr(module, "replace_anchors", slow)
    monkeypatch.setattr(writing, "add_decision", lambda *_: None)
    words = ["--prototype", "cat:0", "--reason", "r", "--data.num_workers", "0"]
    line = refused(capsys, "forbid", run, *words, logged=True)
    assert "was changed by another process meanwhile" in line
    assert (run / "model.safetensors").read_bytes() == (home / "run" / "model.safetensors").read_bytes()


def test_changes_come_all_or_none(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(InputError, match="cannot write"), change.changing(tmp_path) as stage:
        (stage / "nothing" / "a").write_text("new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old"}
    with change.changing(tmp_path) as stage:
        (stage / "a").write_text("new")
        (stage / "b").mkdir()
        (stage / "b" / "c").write_text("more")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {"a", "b", "b/c"}
    assert (tmp_path / "a").read_text() == "new"


def test_a_change_moves_nothing_through_a_link(run, tmp_path, capsys):
    """A run from somebody else may hold links: opening it neither empties a folder of this computer nor fills one."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("mine")
    (run / change.READY).symlink_to(elsewhere)
    assert "is a link" in refused(capsys, "verify", run)
    (run / change.READY).unlink()
    (run / "deeper").symlink_to(elsewhere)
    (run / change.READY / "deeper" / "new").mkdir(parents=True)
    for name in ("mine.txt", "new/other.txt"):
        (run / change.READY / "deeper" / name).write_text("theirs")
        assert "leads out of" in refused(capsys, "verify", run)
    assert [file.read_text() for file in elsewhere.iterdir()] == ["mine"]
