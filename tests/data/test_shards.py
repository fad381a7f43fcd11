"""Images in tar and Parquet shards: the same as in a folder, for each command; and what is wrong with a shard."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import distributed
from torch.utils.data import DataLoader

from forked import Forked
from helpers import CLASSES, SMALL, anchors, make_masked_images, noise, refused, start_ranks, write_tar
from protopush import open_run, push_prototypes
from protopush.backbones.create import Backbone
from protopush.cli import main
from protopush.data import feature_shards, features, shards
from protopush.data.dataset import ImageDataset, check_masks
from protopush.data.images import check_images, image_size, read_image, sha256_of
from protopush.data.manifest import Catalog
from protopush.data.shards import in_shard, index_shards, is_file, open_shard
from protopush.data.sources import load_catalog, recognise
from protopush.data.table import read_table
from protopush.data.tar_shards import Names, Tar
from protopush.errors import InputError
from protopush.predict.inputs import list_inputs

webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed: no shards are written")
pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: no Parquet files are written")
pq = pytest.importorskip("pyarrow.parquet")


def png(label: int, number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise(label, number)).save(stream, "PNG")
    return stream.getvalue()


def as_webdataset(manifest: Path, folder: Path) -> Path:
    """The images of a manifest in the shards of each split, by webdataset's own writer."""
    folder.mkdir()
    rows = read_table(manifest, ("image", "label"), "a manifest")
    for split in dict.fromkeys(row["split"] for row in rows):
        with webdataset.ShardWriter(f"{folder}/{split}-%04d.tar", maxcount=7, verbose=0) as writer:
            for row in (row for row in rows if row["split"] == split):
                key = f"{row['label']}/{Path(row['image']).stem}"
                sample = {"__key__": key, "png": (manifest.parent / row["image"]).read_bytes()}
                if mask := row["mask"] and (manifest.parent / row["mask"]).read_bytes():
                    sample["mask.png"] = mask
                if int(Path(row["image"]).stem) % 2:
                    sample["cls"] = str(CLASSES.index(row["label"])).encode()
                else:
                    sample["json"] = json.dumps({"label": row["label"], "group": None}).encode()
                writer.write(sample)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder


def as_parquet(manifest: Path, folder: Path) -> Path:
    """The same as Hugging Face's library writes them."""
    folder.mkdir()
    rows = read_table(manifest, ("image", "label"), "a manifest")
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    for split in dict.fromkeys(row["split"] for row in rows):
        some = [row for row in rows if row["split"] == split]
        images = [{"bytes": (manifest.parent / row["image"]).read_bytes(), "path": None} for row in some]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        table = pa.table(
            {"image": pa.array(images, kind), "label": pa.array([CLASSES.index(row["label"]) for row in some])}
        ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        word = {"val": "validation"}.get(split, split)
        pq.write_table(table, folder / f"{word}-00000-of-00001.parquet", row_group_size=4)
    return folder


def by_content(catalog: Catalog) -> list[tuple[str, str, str, str | None]]:
    """In each split, in order: hash, class, hash of the mask."""
    rows = [
        (s.split, sha256_of(s.image), catalog.classes[s.label], sha256_of(s.mask) if s.mask else None)
        for s in catalog.samples
    ]
    return sorted(rows, key=lambda row: row[0])


WRITERS = {"webdataset": as_webdataset, "parquet": as_parquet}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """One data set as a manifest and as shards of both kinds; of each a training, a push, and predictions."""
    root = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROTOPUSH_CACHE", str(root / "cache"))
        manifest = make_masked_images(root / "folder")
        for kind, place in {"folder": manifest, **{kind: root / kind for kind in WRITERS}}.items():
            if kind != "folder":
                WRITERS[kind](manifest, place)
            trained, pushed = root / "runs" / f"{kind}-trained", root / "runs" / kind
            assert main(["train", "--data.path", str(place), "--out", str(trained), *SMALL]) == 0
            report = open_run(trained).push(pushed, momentum=0.0, unique="image")
            (root / f"{kind}.json").write_text(json.dumps(report.to_dict()))
            images = root / "folder" / "images" if kind == "folder" else place
            assert main(["predict", str(pushed), str(images), "--out", str(root / f"{kind}.csv")]) == 0
    return root


def hashes(place: Path) -> dict[str, str]:
    """SHA-256 by the path that a table of predictions has."""
    return {name: sha256_of(name) for name in list_inputs([str(place)]).names}


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_give_what_the_same_images_in_a_folder_give(home, kind):
    folder, other = (home / "runs" / name for name in ("folder", kind))
    expected, found = (load_catalog(str(home / name)) for name in ("folder/manifest.csv", kind))
    assert found.classes == expected.classes == ("bird", "cat", "dog")
    assert [row[:3] for row in by_content(found)] == [row[:3] for row in by_content(expected)]
    if kind == "webdataset":
        assert by_content(found) == by_content(expected)
        assert check_masks(found.split("train")) == check_masks(expected.split("train"))
    splits = [read_table(run / "split.csv", ("name", "sha256", "split"), "splits") for run in (folder, other)]
    first, second = ({(row["sha256"], row["split"], row["label"]) for row in rows} for rows in splits)
    assert first == second
    assert len(first) == 30

    assert (other / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert len(anchors(folder)) == 6
    for slot, anchor in anchors(folder).items():
        moved = anchors(other)[slot]
        assert plain(moved) == plain(anchor)
        assert sha256_of(home / kind / moved["file"]) == anchor["sha256"]
        assert in_shard(home / kind / moved["file"])
    reports = [json.loads((home / f"{name}.json").read_text()) for name in ("folder", kind)]
    assert len(reports[0]["prototypes"]) == 6
    assert plain(reports[0]) == plain(reports[1])

    tables = [read_table(home / f"{name}.csv", ("file", "predicted"), "predictions") for name in ("folder", kind)]
    known = [hashes(home / name) for name in ("folder/images", kind)]
    by_hash = [
        {names[row["file"]]: {key: value for key, value in row.items() if not key.endswith("file")} for row in rows}
        for rows, names in zip(tables, known, strict=True)
    ]
    assert by_hash[0] == by_hash[1]
    assert len(by_hash[0]) == 30


def plain(values: object) -> object:
    """Plain values without names of files and times."""
    if isinstance(values, dict):
        return {key: plain(value) for key, value in values.items() if key not in ("file", "sample_id", "seconds")}
    return [plain(value) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("kind", WRITERS)
def test_each_command_takes_a_path_below_a_shard(home, tmp_path, capsys, kind):
    run, place = home / "runs" / kind, home / kind
    assert main(["verify", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(home / "runs" / "folder"), "--json"]) == 0
    assert scores == json.loads(capsys.readouterr().out)
    image = next(sample.image for sample in load_catalog(str(place)).split("test"))
    assert main(["explain", str(run), str(image), "--out", str(tmp_path / "panels")]) == 0
    assert list((tmp_path / "panels").glob("*.png"))
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "one.csv")]) == 0
    assert (
        main(["predict", str(run), str(image.parents[kind == "webdataset"]), "--out", str(tmp_path / "tar.csv")]) == 0
    )
    assert len(read_table(tmp_path / "one.csv", ("file",), "predictions")) == 1
    assert len(read_table(tmp_path / "tar.csv", ("file",), "predictions")) == 6
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    before = anchors(copy)["cat", 0]
    assert main(["forbid", str(copy), "--image", before["file"], "--reason", "a ruler"]) == 0
    after = anchors(copy)["cat", 0]
    assert after["sha256"] != before["sha256"]
    assert sha256_of(place / after["file"]) == after["sha256"]
    assert main(["forbid", str(copy), "--undo", "1", "--reason", "no ruler"]) == 0
    assert anchors(copy)["cat", 0] == before


def test_a_changed_or_missing_image_in_a_shard_is_found(home, tmp_path, capsys):
    place, run = (Path(shutil.copytree(home / name, tmp_path / name)) for name in ("webdataset", "runs/webdataset"))
    file = anchors(run)["cat", 0]["file"]
    shard, name = in_shard(place / file)
    members = {n: open_shard(shard).read(n) for n in open_shard(shard).names}
    for data, problem in ((png(0, 99), "file changed"), (None, "file missing"), (b"", "file changed")):
        changed = {n: b for n, b in (members | {name: data}).items() if b is not None}
        os.utime(write_tar(Path(shard), changed), ns=(0, len(changed[name]) if data is not None else 1))
        capsys.readouterr()
        assert main(["verify", str(run), "--root", str(place)]) == 1
        assert problem in capsys.readouterr().out


MEMBERS = {
    "./train/a.png": png(0, 0), "train/b c.png": png(1, 1), "é.png": png(2, 2), "a.b/x.cls": b"1", "empty.png": b"",
    "._a.png": b"x", "__MACOSX/a.png": b"x", "x" * 150 + ".png": png(0, 3),
}  # fmt: skip


class TestNames:
    def test_members_are_found_by_offset(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", MEMBERS)
        long = "x" * 150 + ".png"
        assert list(Tar(str(tar)).images()) == ["train/a.png", "train/b c.png", "é.png", "empty.png", long]
        for name, data in MEMBERS.items():
            if name[0] != "_" and not name.startswith("._"):
                assert open_shard(tar).read(name.removeprefix("./")) == data
        assert open_shard(tar).read("missing.png") is open_shard(tar).read("") is None
        assert is_file(tar / "train" / "a.png")
        assert not is_file(tar / "train")
        assert not is_file(tmp_path / "none.tar" / "a.png")
        assert read_image(tar / "é.png").tobytes() == noise(2, 2).tobytes()
        assert image_size(str(tar / "é.png")) == (32, 32)

    def test_a_folder_that_is_called_as_a_shard_is_a_folder(self, tmp_path):
        write_tar(tmp_path / "folder.tar" / "inner.TAR", {"a.png": png(0, 0)})
        (tmp_path / "folder.tar" / "b.png").write_bytes(png(0, 1))
        assert is_file(tmp_path / "folder.tar" / "b.png")
        assert read_image(tmp_path / "folder.tar" / "b.png").tobytes() == noise(0, 1).tobytes()
        assert read_image(tmp_path / "folder.tar" / "inner.TAR" / "a.png").tobytes() == noise(0, 0).tobytes()

    def test_what_cannot_be_read_is_named_with_its_path(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", {"empty.png": b"", "text.png": b"no image", "cut.png": png(0, 0)[:900]})
        paths = [tar / name for name in ("empty.png", "text.png", "cut.png", "none.png")]
        with pytest.raises(InputError) as caught:
            check_images(paths)
        assert "empty.png (empty file)" in str(caught.value)
        assert "text.png (not an image)" in str(caught.value)
        assert "none.png (missing)" in str(caught.value)
        with pytest.raises(InputError, match=r"x\.tar/text\.png.*cannot identify image file '/.*text\.png'"):
            read_image(tar / "text.png")

    def test_a_manifest_may_name_what_lies_in_shards(self, tmp_path):
        write_tar(tmp_path / "x.tar", {"a/1.png": png(0, 0), "2.png": png(1, 0)})
        (tmp_path / "m.csv").write_text("image,label\nx.tar/a/1.png,bird\nx.tar/2.png,cat\n")
        found = load_catalog(str(tmp_path / "m.csv"))
        assert [sample.name for sample in found.samples] == ["x.tar/a/1.png", "x.tar/2.png"]
        assert len(set(check_images([sample.image for sample in found.samples]))) == 2

    def test_a_million_members_take_little_memory(self):
        names = Names((f"{i:09d}.jpg" for i in range(20_000)), "x.tar")
        assert names.sorted.nbytes + names.order.nbytes <= 20_000 * 21
        assert [names.place(f"{i:09d}.jpg") for i in (0, 777, 19_999, 20_000)] == [0, 777, 19_999, None]
        assert names.place("0" * 500) is None

    def test_what_is_where_is_found_once_before_processes_are_forked(self, tmp_path, monkeypatch):
        tars = [write_tar(tmp_path / f"{i}.tar", {"a.png": png(0, i), "b.png": png(1, i)}) for i in range(2)]
        index_shards([tars[0] / "a.png", tars[1] / "b.png", tars[0] / "b.png", tmp_path / "c.png"])
        monkeypatch.setattr(shards, "Tar", None)
        loader = DataLoader([tars[0] / "b.png", tars[1] / "a.png"], num_workers=2, collate_fn=lambda b: sha256_of(b[0]))
        assert list(loader) == [sha256(png(1, 0)).hexdigest(), sha256(png(0, 1)).hexdigest()]

    def test_a_shard_that_was_written_again_is_read_again(self, tmp_path):
        tar = write_tar(tmp_path / "x.tar", {"a.png": png(0, 0)})
        first = sha256_of(tar / "a.png")
        write_tar(tar, {"b.png": png(1, 1), "a.png": png(0, 5)})
        assert sha256_of(tar / "a.png") != first
        assert is_file(tar / "b.png")


class TestSource:
    def test_kinds_of_labels_groups_and_splits(self, tmp_path):
        def sample(key: str, **parts: object) -> dict[str, bytes]:
            data = {k: json.dumps(v).encode() if k == "json" else str(v).encode() for k, v in parts.items()}
            return {f"{key}.png": png(0, len(key))} | {f"{key}.{ending}": text for ending, text in data.items()}

        folder = tmp_path / "data"
        write_tar(folder / "train-0000.tar", sample("a", cls="2\n") | sample("s/b", json={"label": 10, "group": 7}))
        write_tar(
            folder / "Validation" / "0.tar", sample("c", json={"cls": "2", "split": "test"}) | sample("d", cls=10)
        )
        write_tar(folder / "train" / "set_dev_1.tar", sample("e", json={"label": 2, "x": [1]}))
        found = load_catalog(str(folder))
        assert recognise(str(folder)) == "shards"
        assert found.classes == ("2", "10")
        rows = {s.name: (s.split, found.classes[s.label], s.group) for s in found.samples}
        assert rows == {
            "train-0000.tar/a.png": ("train", "2", None),
            "train-0000.tar/s/b.png": ("train", "10", "7"),
            "Validation/0.tar/c.png": ("test", "2", None),
            "Validation/0.tar/d.png": ("val", "10", None),
            "train/set_dev_1.tar/e.png": ("val", "2", None),
        }
        (folder / "classes.json").write_text(json.dumps({"ten": 10, **{str(i): i for i in range(10)}}))
        assert load_catalog(str(folder)).classes == ("2", "ten")
        assert load_catalog(str(folder), classes=["x", "ten", "2"]).samples[0].label == 2

    def test_splits_are_drawn_by_group_as_of_any_source(self, tmp_path):
        members = {}
        for i in range(60):
            group = {"label": CLASSES[i % 3], "group": f"lesion {i // 2}"}
            members |= {f"{i}.png": png(i % 3, i), f"{i}.json": json.dumps(group).encode()}
        tar = write_tar(tmp_path / "x.tar", members)
        rows = [f"x.tar/{i}.png,{CLASSES[i % 3]},lesion {i // 2}" for i in range(60)]
        (tmp_path / "m.csv").write_text("\n".join(["image,label,group", *rows]) + "\n")
        assert recognise(str(tar)) == "shards"
        assert load_catalog(str(tar)).samples == load_catalog(str(tmp_path / "m.csv")).samples

    def test_columns_of_parquet(self, tmp_path):
        images = [png(i % 2, i) for i in range(7)]
        columns = {"image": images, "label": ["x", "y"] * 3 + ["x"], "split": ["train"] * 5 + ["validation", "test"]}
        columns |= {"group": list(range(7)), "path": [f"p/{i}.png" for i in range(7)]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=3)
        pq.write_table(pa.table(columns | {"path": ["same"] * 7}), tmp_path / "b.parquet")
        found = load_catalog(str(tmp_path), refuse_leaks=False)
        assert [s.name for s in found.samples[:2]] == ["a.parquet/p/0.png", "a.parquet/p/1.png"]
        assert [s.name for s in found.samples[7:9]] == ["b.parquet/000000", "b.parquet/000001"]
        assert [s.split for s in found.samples[:7]] == ["train"] * 5 + ["val", "test"]
        assert found.samples[6].group == "6"
        for order in (range(7), (6, 0, 3, 5, 2)):
            for i in order:
                assert sha256_of(found.samples[i].image) == sha256_of(found.samples[7 + i].image)
                assert read_image(found.samples[i].image).tobytes() == noise(i % 2, i).tobytes()

    def test_shards_beside_images_are_left_alone(self, image_folder):
        write_tar(image_folder / "all.tar", {"a.png": png(0, 0), "a.cls": b"x"})
        assert recognise(str(image_folder)) == "folder"
        assert len(list_inputs([str(image_folder)]).names) == 30
        assert [sample.name for sample in load_catalog(str(image_folder), "shards").samples] == ["all.tar/a.png"]


LABELLED = {"a.png": png(0, 0), "a.cls": b"x", "b.png": png(1, 1), "b.cls": b"y"}


def cut(size: int) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_tar(folder / "x.tar", LABELLED)
        path.write_bytes(path.read_bytes()[:size])
        return path

    return write


def damaged_in_the_middle(folder: Path) -> Path:
    path = write_tar(folder / "x.tar", LABELLED)
    place = Tar(str(path)).starts[2] - 512
    data = bytearray(path.read_bytes())
    data[place : place + 100] = b"?" * 100
    path.write_bytes(data)
    return path


def joined(folder: Path) -> Path:
    path, other = write_tar(folder / "x.tar", LABELLED), write_tar(folder / "y" / "y.tar", LABELLED)
    path.write_bytes(path.read_bytes() + other.read_bytes())
    return path


def twice(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name in ("a.png", "b.png", "./a.png"):
            entry = tarfile.TarInfo(name)
            tar.addfile(entry, io.BytesIO())
    return folder / "x.tar"


def packed(folder: Path, ending: str = ".tar.gz") -> Path:
    with tarfile.open(folder / f"x{ending}", "w:gz") as tar:
        tar.add(__file__, "a.py")
    return folder / f"x{ending}"


def table(**columns: object) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "x.parquet")
        return folder / "x.parquet"

    return write


def broken_parquet(folder: Path) -> Path:
    path = table(image=[png(0, 0)], label=["x"])(folder)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def members(**parts: bytes) -> Callable[[Path], Path]:
    return lambda folder: write_tar(folder / "x.tar", {name.replace("_", "."): data for name, data in parts.items()})


WRONG = {
    "cut in a member": (cut(2000), "damaged shard: .*unexpected end of data"),
    "cut between members": (cut(512 * 5), "damaged shard: "),
    "empty": (cut(0), "damaged shard: .*empty file"),
    "damaged in the middle": (damaged_in_the_middle, "damaged shard: .*no end of a tar file at byte"),
    "joined": (joined, "damaged shard: .*no end of a tar file at byte"),
    "twice": (twice, "holds a.png twice"),
    "packed": (packed, "is compressed .*expected a plain .tar; unpack it"),
    "packed under a plain name": (lambda folder: packed(folder, ".tar"), r"is compressed \(gzip\)"),
    "leads out": (lambda f: write_tar(f / "x.tar", {"../a.png": b"x"}), "'../a.png', which leads out of it"),
    "absolute": (lambda f: write_tar(f / "x.tar", {"/etc/a.png": b"x"}), "'/etc/a.png', which leads out of it"),
    "no images": (members(a_txt=b"x"), "no images in "),
    "no label": (members(a_png=b"x", b_png=b"x", b_cls=b"1"), "1 of 2 images have no label: x.tar/a.png"),
    "two images": (members(a_png=b"x", a_jpg=b"x"), "several images in one sample: a.png, a.jpg"),
    "no JSON": (members(a_png=b"x", a_json=b"{"), "x.tar/a.json is no label"),
    "a list": (members(a_png=b"x", a_json=b'{"label": [1]}'), "x.tar/a.json is no label"),
    "no object": (members(a_png=b"x", a_json=b"[]"), "x.tar/a.json is no label"),
    "no text": (members(a_png=b"x", a_cls=b"\xff"), "x.tar/a.cls is no label"),
    "broken Parquet": (broken_parquet, "damaged shard: "),
    "other columns": (table(imge=[b"x"], label=["x"]), "no column 'image'.*imge, label; did you mean 'imge'"),
    "no bytes": (table(image=["x"], label=["x"]), "images of type string"),
    "no label in Parquet": (table(image=[b"x", b"y"], label=["x", None]), "1 of 2 images .*: x.parquet/000001"),
    "no label column": (table(image=[b"x"]), "1 of 1 images have no label"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_with_a_shard_is_one_line(tmp_path, capsys, what):
    write, words = WRONG[what]
    line = refused(capsys, "train", "--data.path", write(tmp_path), "--out", tmp_path / "run", logged=True)
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def test_classes_and_rows_that_are_wrong(tmp_path, capsys):
    write_tar(tmp_path / "x.tar", LABELLED | {"b.cls": b"1"})
    for text, words in (("x\nx\n", "a class twice"), ("y\n", "the label 'x'; expected one of the 1 classes: y")):
        (tmp_path / "classes.txt").write_text(text)
        assert words in refused(capsys, "train", "--data.path", tmp_path, "--out", tmp_path / "run")
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "classes.json").write_text('{"a": 1, "b": 2}')
    assert "no list of classes" in refused(capsys, "train", "--data.path", tmp_path, "--out", tmp_path / "run")
    no_bytes = table(image=[{"bytes": b"x", "path": "a"}, {"bytes": None, "path": "b"}], label=["x", "y"])(tmp_path)
    with pytest.raises(InputError, match=r"b \(.*no bytes in row 1"):
        read_image(no_bytes / "b")


def test_parquet_without_pyarrow_is_one_line_and_tar_needs_nothing(tmp_path, monkeypatch, capsys):
    path = table(image=[png(0, 0)], label=["x"])(tmp_path)
    tar = write_tar(tmp_path / "tar" / "x.tar", LABELLED)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    line = refused(capsys, "train", "--data.path", path, "--out", tmp_path / "run")
    assert "needs pyarrow to be read; pip install 'protopush[shards]'" in line
    assert len(load_catalog(str(tar)).samples) == 2


def train_slowly(folder: str, seconds: float) -> None:
    """Train on shards, with features in shards of four images."""
    feature_shards.SHARD = features.SHARD = 4
    backbone, forward = Backbone, Backbone.forward
    backbone.forward = lambda self, images: (time.sleep(seconds), forward(self, images))[1]
    place, cache, out = (f"{folder}/{name}" for name in ("webdataset", "cache", "run"))
    words = ["train", "--data.path", place, "--out", out, *SMALL, "--trainer.cache_dir", cache]
    assert main(words) == 0


def test_a_training_killed_while_it_stores_features_of_shards_ends_as_if_it_had_not_been(home, tmp_path):
    shutil.copytree(home / "webdataset", tmp_path / "webdataset")
    code = (
        f"import sys; sys.path[:] = {sys.path}; from {__name__} import train_slowly; train_slowly({str(tmp_path)!r}, "
    )
    process = Forked(program=code + "0.3)")
    while len(list(tmp_path.glob("cache/*/*.npy"))) < 2:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stored = {file: file.stat().st_ino for file in tmp_path.glob("cache/*/*.npy")}
    assert 2 <= len(stored) < 5
    assert not (tmp_path / "run").exists()
    again = Forked(program=code + "0)")
    assert again.wait() == 0, again.stderr
    assert {file: file.stat().st_ino for file in stored} == stored
    assert len(list(tmp_path.glob("cache/*/*.npy"))) == 5 + 2  # 18 images to train on, 6 for validation
    assert not list(tmp_path.glob("cache/*/.*"))
    trained = home / "runs" / "webdataset-trained"
    for name in ("model.safetensors", "prototypes.json", "split.csv"):
        assert (tmp_path / "run" / name).read_bytes() == (trained / name).read_bytes(), name
    assert main(["verify", str(tmp_path / "run")]) == 0


def rank_main(rank: int, world: int, folder: str) -> None:
    """Push over shards, each rank its part, and write down the report and the prototypes."""
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    run = open_run(Path(folder) / "run")
    samples = load_catalog(str(Path(folder) / "webdataset")).split("train")
    loader = DataLoader(ImageDataset(samples, run.transform), batch_size=4, num_workers=1)
    report = push_prototypes(run.model, loader, "cpu", momentum=0.0, unique="image")
    torch.save((run.head.proto_manager.prototypes.data, plain(report.to_dict())), f"{folder}/{world}-{rank}.pt")
    if world > 1:
        distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_push_over_shards_as_one_process_does(home, tmp_path):
    for name in ("webdataset", "runs/webdataset-trained"):
        shutil.copytree(home / name, tmp_path / {"webdataset": name}.get(name, "run"))
    rank_main(0, 1, str(tmp_path))
    start_ranks(rank_main, 2, tmp_path)
    ends = [torch.load(tmp_path / name, weights_only=False) for name in ("1-0.pt", "2-0.pt", "2-1.pt")]
    for prototypes, report in ends[1:]:
        assert torch.equal(prototypes, ends[0][0])
        assert report["prototypes"] == ends[0][1]["prototypes"]
