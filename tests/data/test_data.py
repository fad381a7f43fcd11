"""Files as people have them, tables as people write them, and where pixels end up."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import cell_box, make_images
from protopush import InputError
from protopush.data.dataset import ImageDataset
from protopush.data.images import check_images, image_size, read_image
from protopush.data.manifest import Catalog, Sample, read_manifest, require_training_images, with_splits
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform, Preprocessing, TrainTransform, View


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 90)], axis=2).astype(np.uint8))


@pytest.mark.parametrize(("name", "save"), [
    ("cmyk.jpg", lambda p: gradient().convert("CMYK").save(p, quality=95)),
    ("rgba.png", lambda p: gradient().convert("RGBA").save(p)),
    ("palette.png", lambda p: gradient().quantize(64).save(p)),
    ("plain.webp", lambda p: gradient().save(p, lossless=True)),
])  # fmt: skip
def test_colour_modes_load_right(tmp_path, name, save):
    save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB"
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(gradient(), dtype=int))
    assert difference.mean() < 8


def test_sixteen_bit_and_grey_are_scaled_not_clipped(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    Image.fromarray((ramp // 257).astype(np.uint8)).save(tmp_path / "grey.png")
    deep, grey = (np.asarray(read_image(tmp_path / name), dtype=int) for name in ("deep.png", "grey.png"))
    assert deep.shape == grey.shape == (48, 64, 3)
    assert np.abs(deep - grey).max() <= 1


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    gradient().save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert image_size(tmp_path / "turned.jpg") == read_image(tmp_path / "turned.jpg").size == (48, 64)
    upright = np.asarray(read_image(tmp_path / "turned.jpg"), dtype=int)
    assert np.abs(upright - np.asarray(gradient().rotate(-90, expand=True), dtype=int)).mean() < 5


def test_all_unreadable_files_are_named_at_once(tmp_path):
    good, cut, text, empty, gone = (tmp_path / n for n in ("good.png", "cut.jpg", "text.jpg", "empty.png", "gone.png"))
    gradient().save(good)
    gradient(256, 256).save(cut)
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("no image")
    empty.touch()
    with pytest.raises(InputError) as caught:
        check_images([good, cut, text, empty, gone])
    message = str(caught.value)
    assert message.startswith("4 unreadable images: ")
    assert "good.png" not in message
    for part in ("cut.jpg (", "text.jpg (not an image)", "empty.png (empty file)", "gone.png (missing)"):
        assert part in message
    digests = check_images([good, good])
    assert len(digests) == 2
    assert len(digests[0]) == 64


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (224, 224), (640, 480), (31, 500)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("grid", [(7, 7), (14, 7)])
def test_boxes_come_back_at_the_marked_pixels(tmp_path, size, crop_pct, grid):
    """Mark a cell's box in the original, send it through the transform: exactly that cell lights up."""
    transform = EvalTransform(Preprocessing(interpolation="bilinear"), crop_pct)
    view = transform.view(size)
    for cell in (0, grid[1] + 2, grid[0] * grid[1] - 1):
        x0, y0, x1, y1 = cell_box(view, cell, grid)
        assert 0 <= x0 < x1 <= size[0]
        assert 0 <= y0 < y1 <= size[1]
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        seen = np.asarray(transform.visible(Image.fromarray(pixels)), dtype=float)[..., 0]
        assert seen.shape == (224, 224)
        share = seen.reshape(grid[0], 224 // grid[0], grid[1], 224 // grid[1]).mean(axis=(1, 3)).flatten()
        assert int(share.argmax()) == cell
        assert share[cell] > 0.7 * 255
        if min(size) >= 100:
            assert np.delete(share, cell).max() < 0.2 * 255


def test_the_300_by_100_case_by_hand():
    view = View.of((300, 100), (224, 224))
    # 100 -> 224 pixels high; the middle 224 of 672 pixels in width are original pixels 100 to 200
    assert cell_box(view, 0, (7, 7)) == (100, 0, 114, 14)
    assert cell_box(view, 24, (7, 7)) == (143, 43, 157, 57)
    assert cell_box(view, 48, (7, 7)) == (186, 86, 200, 100)
    assert cell_box(view, 0, (1, 1)) == (100, 0, 200, 100)


def test_transforms_normalise_and_only_training_varies(tmp_path):
    preprocessing = Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3, size=(32, 48))
    fixed, varied = EvalTransform(preprocessing), TrainTransform(preprocessing)
    assert fixed(gradient()).shape == varied(gradient()).shape == (3, 32, 48)
    assert torch.equal(fixed(gradient()), fixed(gradient()))
    assert not torch.equal(varied(gradient()), varied(gradient()))
    white = fixed(Image.new("RGB", (48, 32), "white"))
    assert torch.allclose(white, torch.full_like(white, 2.0))


def test_dataset_items_view_and_provenance(tmp_path):
    folder = make_images(tmp_path, ["a", "b"], 3)
    catalog = load_catalog(str(folder))
    plain = EvalTransform(Preprocessing(size=(16, 16)))
    dataset = ImageDataset(catalog.samples, plain, TrainTransform(Preprocessing(size=(16, 16))))
    assert dataset.labels == [0, 0, 0, 1, 1, 1]
    assert not torch.equal(dataset[4][0], dataset[4][0])
    view = dataset.eval_view()
    assert torch.equal(view[4][0], view[4][0])
    assert view[4][1:] == (1, 4)
    told = dataset.describe(4)
    assert (told.sample_id, told.file, told.view.original) == ("b/001.png", "b/001.png", (40, 32))
    assert len(told.sha256) == 64


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_manifest_columns_splits_groups_masks(tmp_path):
    rows = [
        {"image": "x/1.png", "label": "b", "split": "train", "group": "g1", "mask": "m/1.png", "age": "40"},
        {"image": "x/2.png", "label": "a", "split": "valid", "group": "g2", "mask": "", "age": ""},
        {"image": "x/3.png", "label": "a", "split": "test", "group": "", "mask": "", "age": ""},
    ]
    catalog = read_manifest(write_manifest(tmp_path / "m.csv", rows))
    assert catalog.classes == ("a", "b")
    assert catalog.samples[0] == Sample(
        tmp_path / "x/1.png", "x/1.png", 1, "train", "g1", tmp_path / "m/1.png"
    )  # fmt: skip
    assert [(s.label, s.split, s.group) for s in catalog.samples[1:]] == [(0, "val", "g2"), (0, "test", None)]
    assert [s.name for s in catalog.split("all")] == ["x/1.png", "x/2.png", "x/3.png"]
    with pytest.raises(InputError, match=r"unknown labels in .*: b; the model knows: a, c"):
        read_manifest(tmp_path / "m.csv", classes=["a", "c"])


def test_manifest_beside_its_images(tmp_path):
    (tmp_path / "tables").mkdir()
    rows = [{"image": f"../pictures/{n}.png", "label": n} for n in "ab"]
    catalog = read_manifest(write_manifest(tmp_path / "tables" / "m.csv", rows))
    assert catalog.root == tmp_path
    assert [s.name for s in catalog.samples] == ["pictures/a.png", "pictures/b.png"]


@pytest.mark.parametrize(("text", "message"), [
    ("image,lable\n1.png,a\n", r"no column 'label'; it has: image, lable; did you mean 'lable'"),
    ("file,label\n1.png,a\n", r"no column 'image'"),
    ("image,label\n", r"has no rows"),
    ("", r"no column 'image'; it has: nothing"),
    ("image,label\n1.png,\n2.png,a\n", r"no label in lines 2"),
    ("image,label,split\n1.png,a,train\n2.png,a,\n", r"1 images have no split \(2.png\)"),
    ("image,label,split,group\n1.png,a,train,g\n2.png,b,test,g\n", r"1 groups lie in several splits: g"),
])  # fmt: skip
def test_bad_manifests(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_catalog(str(tmp_path / "m.csv"))


def test_made_splits_are_seeded_stratified_and_keep_groups_together():
    samples = tuple(
        Sample(Path(f"{i}"), f"{i}", i % 2 if i < 400 else 2, group=f"g{i // 4 if i < 400 else i}") for i in range(500)
    )
    catalog = Catalog(samples, ("a", "b", "c"), Path())
    made = with_splits(catalog, seed=3)
    assert made == with_splits(catalog, seed=3) != with_splits(catalog, seed=4)
    assert [s.name for s in made.samples] == [s.name for s in samples]
    groups: dict[str, set[str]] = {}
    for s in made.samples:
        groups.setdefault(s.group or s.name, set()).add(s.split)
    assert all(len(found) == 1 for found in groups.values())
    shares = Counter((s.label == 2, s.split) for s in made.samples)
    bounds = {(True, "val"): (10, 9), (True, "test"): (20, 12), (False, "val"): (40, 36), (False, "test"): (80, 48)}
    assert all(abs(shares[key] - mean) <= three for key, (mean, three) in bounds.items())  # three deviations


@pytest.mark.parametrize("seed", range(20))
def test_made_splits_stay_when_images_are_added_or_taken_away(seed):
    names = [f"{i}.png" for i in range(600)]
    some = Random(seed).sample(names, 400)
    of_all, of_some = (
        {s.name: s.split for s in with_splits(_one_by_one(chosen, labels=2), seed).samples} for chosen in (names, some)
    )
    assert {name: of_all[name] for name in some} == of_some
    train, held = (
        with_splits(
            Catalog(tuple(replace(s, split="train") for s in _one_by_one(chosen, 2).samples), ("a", "b"), Path())
        )
        for chosen in (names, some)
    )
    assert {s for s in held.samples if s.split == "val"} <= {s for s in train.samples if s.split == "val"}


@pytest.mark.parametrize("images", range(1, 31))
def test_small_classes_have_images_in_each_split_and_most_of_them_train(images):
    for seed in range(20):
        made = with_splits(_one_by_one([f"{i}" for i in range(images)], labels=1), seed)
        counts = Counter(s.split for s in made.samples)
        for split, share in (("test", 0.2), ("val", 0.1)):
            assert min(1, round(share * images)) <= counts[split] <= int(2 * share * images)
        assert counts["train"] >= 0.4 * images


def _one_by_one(names: list[str], labels: int) -> Catalog:
    samples = tuple(Sample(Path(name), name, int(name.split(".")[0]) % labels) for name in names)
    return Catalog(samples, tuple("ab"[:labels]), Path())


def test_val_is_taken_from_train_and_test_is_left_alone():
    samples = tuple(Sample(Path(f"{i}"), f"{i}", i % 2, "test" if i >= 80 else "train") for i in range(100))
    made = with_splits(Catalog(samples, ("a", "b"), Path()))
    counts = Counter(s.split for s in made.samples)
    assert counts == {"train": 80 - counts["val"], "val": counts["val"], "test": 20}
    assert 2 <= counts["val"] <= 16
    assert all(s.split == "test" for s in made.samples[80:])


def test_folder_with_and_without_splits(tmp_path):
    make_images(tmp_path / "flat", ["cat", "dog"], 10)
    flat = load_catalog(str(tmp_path / "flat"))
    assert flat.classes == ("cat", "dog")
    counts = Counter(s.split for s in flat.samples)
    assert counts.total() == 20
    assert all(low <= counts[split] <= high for split, low, high in (("val", 2, 4), ("test", 2, 8)))
    for split in ("train", "valid", "test"):
        make_images(tmp_path / "split" / split, ["cat", "dog"], 2)
    split = load_catalog(str(tmp_path / "split"))
    assert Counter(s.split for s in split.samples) == {"train": 4, "val": 4, "test": 4}
    assert split.split("train")[0].name == "train/cat/000.png"


def test_classes_without_training_images_are_named(tmp_path):
    make_images(tmp_path, ["cat", "dog"], 4)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="classes without a training image: bare, empty"):
        require_training_images(load_catalog(str(tmp_path)))
    make_images(tmp_path / "one", ["only"], 4)
    with pytest.raises(InputError, match="only one class"):
        require_training_images(load_catalog(str(tmp_path / "one")))


def test_elpv_is_split_by_contiguous_blocks():
    pytest.importorskip("elpv_dataset")
    catalog = load_catalog(source="elpv")
    assert catalog.classes == ("functional", "defective")
    assert Counter(s.label for s in catalog.samples) == {0: 1508, 1: 715}
    splits: dict[int, set[str]] = {}
    for s in catalog.samples:
        number = int(s.image.stem.removeprefix("cell")) - 1
        splits.setdefault(number // 60, set()).add(s.split)
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) > 10
    assert Counter(splits_of.pop() for splits_of in splits.values()) == {"train": 26, "val": 9, "test": 9}
    by_split = Counter((s.split, s.label) for s in catalog.samples)
    assert all(by_split[split, label] >= 100 for split in ("train", "val", "test") for label in (0, 1))


def test_ham10000_manifest_reads(ham):
    catalog = load_catalog(str(ham / "manifest.csv"))
    assert catalog.classes == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert Counter(s.split for s in catalog.samples) == {"train": 4189, "val": 597, "test": 1198}
    assert catalog.samples[0].mask.is_file()
