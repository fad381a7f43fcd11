"""Published data sets in small: read as they unpack, split by lesion, refused in one line, and trained on."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import SMALL, edit, make_images, make_isic, noise, save_noise, write_table
from protopush import InputError
from protopush.cli import main
from protopush.data.images import read_image
from protopush.data.manifest import Catalog
from protopush.data.sources import SOURCES, load_catalog, recognise
from protopush.data.sources.dermoscopy import CLASSES as ISIC_CLASSES

HAM_CLASSES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def splits_of(catalog: Catalog) -> Counter[str]:
    return Counter(sample.split for sample in catalog.samples)


def assert_groups_stay_together(catalog: Catalog) -> None:
    places = defaultdict(set)
    for sample in catalog.samples:
        if sample.group:
            places[sample.group].add(sample.split)
    assert places
    assert all(len(found) == 1 for found in places.values())


def trains(tmp_path: Path, data: Path, monkeypatch, *words: str) -> dict:
    """Train one epoch on the data as the command line does; what the run says of its anchors."""
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    assert main(["train", "--data.path", str(data), "--out", str(run), *SMALL, "--train.epochs", "1", *words]) == 0
    assert main(["verify", str(run)]) == 0
    return json.loads((run / "prototypes.json").read_text())


# ISIC 2018


def test_isic2018_as_published(tmp_path):
    root = make_isic(tmp_path)
    assert recognise(str(root)) == "isic2018"
    catalog = load_catalog(str(root))
    assert catalog.classes == ISIC_CLASSES
    assert splits_of(catalog) == {"train": 56, "val": 14, "test": 14}
    first = catalog.samples[0]
    assert (first.name, first.label) == ("ISIC2018_Task3_Training_Input/ISIC_0000000.jpg", 0)
    assert first.group == "HAM_0000000"
    assert all(sample.group is None for sample in catalog.samples if sample.split != "train")
    reordered = load_catalog(str(root), classes=[*reversed(ISIC_CLASSES)])
    assert reordered.samples[0].label == 6


@pytest.mark.parametrize(("parts", "expected"), [
    (("Training",), {"train", "val", "test"}),
    (("Training", "Test"), {"train", "val", "test"}),
    (("Training", "Validation"), {"train", "val"}),
])  # fmt: skip
def test_isic2018_holds_out_lesions_where_parts_are_absent(tmp_path, parts, expected):
    catalog = load_catalog(str(make_isic(tmp_path, parts, lesions=10)))
    assert set(splits_of(catalog)) == expected
    assert_groups_stay_together(catalog)
    assert all(count % 2 == 0 for count in splits_of(catalog).values())  # lesions have two images


def test_isic2018_unpacked_into_folders_of_their_own(tmp_path):
    make_isic(tmp_path / "made")
    for folder in list((tmp_path / "made").glob("ISIC2018*Input")):
        shutil.move(folder, tmp_path / "made" / "zip" / folder.name)
        (tmp_path / "made" / "zip").rename(tmp_path / "made" / folder.name)
    assert len(load_catalog(str(tmp_path / "made")).samples) == 84


def test_isic2018_leaves_out_a_part_without_ground_truth(tmp_path, caplog):
    root = make_isic(tmp_path)
    shutil.rmtree(root / "ISIC2018_Task3_Test_GroundTruth")
    with caplog.at_level("WARNING", logger="protopush"):
        assert set(splits_of(load_catalog(str(root)))) == {"train", "val"}
    assert "ISIC2018_Task3_Test_GroundTruth.csv is not under" in caplog.text


TRUTH = "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv"


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda r: (r / "ISIC2018_Task3_Training_LesionGroupings.csv").unlink(), r"no such file: .*LesionGroupings.csv"),
    (lambda r: (r / TRUTH).unlink(), r"no such file: .*ISIC2018_Task3_Training_GroundTruth.csv; expected ISIC 2018"),
    (lambda r: [(r / f"ISIC2018_Task3_Training_Input/ISIC_{i:07d}.jpg").unlink() for i in (3, 5)],
     r"2 of 14 images listed in .* are missing: ISIC_0000003, ISIC_0000005; expected them under"),
    (lambda r: edit(r / TRUTH, "VASC", "SCC"), r"has no column 'VASC'"),
    (lambda r: edit(r / TRUTH, "VASC\n", "VASC,UNK\n"), r"unknown class columns in .*: UNK"),
    (lambda r: edit(r / TRUTH, "ISIC_0000000,1.0,0.0", "ISIC_0000000,1.0,1.0"),
     r"not exactly one class in the rows of ISIC_0000000"),
    (lambda r: edit(r / TRUTH, "ISIC_0000000,1.0", "ISIC_0000000,0.0"), r"not exactly one class .* ISIC_0000000"),
    (lambda r: edit(r / TRUTH, "ISIC_0000000,1.0", "ISIC_0000000,yes"), r"has the value 'yes'; expected 0.0 or 1.0"),
    (lambda r: edit(r / TRUTH, "ISIC_0000001,", "ISIC_0000000,"), r"lists 1 images more than once: ISIC_0000000"),
    (lambda r: edit(r / "ISIC2018_Task3_Training_LesionGroupings.csv", "ISIC_0000004,", "ISIC_9,"),
     r"has no lesion for ISIC_0000004"),
])  # fmt: skip
def test_isic2018_refuses_in_one_line(tmp_path, spoil, message):
    root = make_isic(tmp_path, ("Training",), lesions=1)
    spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        load_catalog(str(root), "isic2018")
    assert "\n" not in str(caught.value)


def test_isic2018_trains(tmp_path, monkeypatch):
    anchors = trains(tmp_path, make_isic(tmp_path / "isic"), monkeypatch)
    assert "ISIC2018_Task3_Training_Input/ISIC_" in json.dumps(anchors)


# HAM10000


def make_ham(root: Path, lesions: int = 10, ending: str = ".csv", separator: str = ",", test: bool = False) -> Path:
    """Seven classes; two images of each lesion, one in each part, with masks for the first part."""
    header = "lesion_id,image_id,dx,dx_type,age,sex,localization,dataset"
    rows, number = [], 0
    for label, dx in enumerate(HAM_CLASSES):
        for lesion in range(lesions):
            for part in (1, 2):
                name, number = f"ISIC_{number:07d}", number + 1
                rows.append([f"HAM_{label}{lesion:06d}", name, dx, "histo", "", "male", "back", "vidir_modern"])
                save_noise(root / f"HAM10000_images_part_{part}" / f"{name}.jpg", label, number)
                if part == 1:
                    mask = root / "HAM10000_segmentations_lesion_tschandl" / f"{name}_segmentation.png"
                    mask.parent.mkdir(exist_ok=True)
                    Image.new("1", (32, 32), 1).save(mask)
    write_table(root / f"HAM10000_metadata{ending}", header, rows, separator)
    if test:
        rows = [[f"HAMTEST_{i}", f"ISIC_9{i:06d}", dx, "histo", "", "", "", ""] for i, dx in enumerate(HAM_CLASSES)]
        write_table(root / f"ISIC2018_Task3_Test_GroundTruth{ending}", header, rows, separator)
        for label, row in enumerate(rows):
            save_noise(root / "ISIC2018_Task3_Test_Images" / f"{row[1]}.jpg", label, 10_000 + label)
    return root


def assert_drawn(counts: Counter[str], **shares: float) -> None:
    """70 lesions of two photographs, ten of each class: at least one lesion of a class, at most twice its share."""
    assert counts.total() == 140
    assert all(min(14, share * 140) <= counts[split] <= 2 * share * 140 for split, share in shares.items())


@pytest.mark.parametrize(("ending", "separator"), [(".csv", ","), (".tab", "\t"), ("", ",")])
def test_ham10000_as_published(tmp_path, ending, separator):
    root = make_ham(tmp_path, ending=ending, separator=separator)
    assert recognise(str(root)) == "ham10000"
    catalog = load_catalog(str(root))
    assert catalog.classes == HAM_CLASSES
    assert_drawn(splits_of(catalog), val=0.1, test=0.2)
    assert_groups_stay_together(catalog)
    first, second = catalog.samples[:2]
    assert (first.group, first.name) == ("HAM_0000000", "HAM10000_images_part_1/ISIC_0000000.jpg")
    assert (second.group, second.name) == ("HAM_0000000", "HAM10000_images_part_2/ISIC_0000001.jpg")
    assert first.mask == root / "HAM10000_segmentations_lesion_tschandl/ISIC_0000000_segmentation.png"
    assert second.mask is None


def test_ham10000_with_its_test_set(tmp_path):
    catalog = load_catalog(str(make_ham(tmp_path, test=True)))
    assert_drawn(splits_of(catalog) - Counter(test=7), val=0.1, test=0)
    assert splits_of(catalog)["test"] == 7
    assert {sample.name.split("/")[0] for sample in catalog.split("test")} == {"ISIC2018_Task3_Test_Images"}
    assert_groups_stay_together(catalog)
    shutil.rmtree(tmp_path / "ISIC2018_Task3_Test_Images")  # the table alone says nothing
    assert_drawn(splits_of(load_catalog(str(tmp_path))), val=0.1, test=0.2)


def test_ham10000_takes_the_published_images_not_resized_copies(tmp_path):
    root = make_ham(tmp_path / "data", lesions=2)
    nested = root / "dataverse_files" / "HAM10000_images_part_1"
    nested.parent.mkdir()
    (root / "HAM10000_images_part_1").rename(nested)
    save_noise(root / "a_small_copy" / "ISIC_0000000.jpg", 5, 5)
    assert load_catalog(str(root)).samples[0].image == nested / "ISIC_0000000.jpg"


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda r: (r / "HAM10000_metadata.csv").unlink(), r"no such file: .*HAM10000_metadata.csv"),
    (lambda r: shutil.rmtree(r / "HAM10000_images_part_2"), r"7 of 14 images listed in .* are missing: ISIC_0000001,"),
    (lambda r: edit(r / "HAM10000_metadata.csv", "lesion_id", "lesion"), r"no column 'lesion_id'.* did you mean 'les"),
    (lambda r: edit(r / "HAM10000_metadata.csv", "HAM_0000000", ""), r"no lesion_id in lines 2"),
])  # fmt: skip
def test_ham10000_refuses_in_one_line(tmp_path, spoil, message):
    root = make_ham(tmp_path, lesions=1)
    spoil(root)
    with pytest.raises(InputError, match=message):
        load_catalog(str(root), "ham10000")


def test_ham10000_refuses_a_lesion_of_both_sets(tmp_path):
    root = make_ham(tmp_path, test=True)
    edit(root / "ISIC2018_Task3_Test_GroundTruth.csv", "HAMTEST_0", "HAM_0000000")
    with pytest.raises(InputError, match="1 groups lie in several splits: HAM_0000000"):
        load_catalog(str(root))
    assert len(load_catalog(str(root), refuse_leaks=False).samples) == 147


def test_ham10000_trains(tmp_path, monkeypatch):
    anchors = trains(tmp_path, make_ham(tmp_path / "ham", lesions=5), monkeypatch, "--push.unique", "group")
    assert "HAM_" in json.dumps(anchors)


# MedMNIST


def make_npz(path: Path, classes: int = 3, size: int = 28, grey: bool = False, **replaced: np.ndarray) -> Path:
    arrays = {}
    for split, count in (("train", 8), ("val", 2), ("test", 4)):
        labels = np.tile(np.arange(classes), count)
        images = np.stack([noise(label, i, size) for i, label in enumerate(labels)])
        arrays[f"{split}_images"] = images.mean(axis=3).astype(np.uint8) if grey else images
        arrays[f"{split}_labels"] = labels[:, None].astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **(arrays | replaced))
    return path


@pytest.mark.parametrize(("grey", "size"), [(False, 28), (True, 64)])
def test_medmnist_pixels_come_out_as_they_went_in(tmp_path, grey, size):
    file = make_npz(tmp_path / f"mine_{size}.npz", size=size, grey=grey)
    catalog = load_catalog(str(file))
    assert recognise(str(file)) == "medmnist"
    assert catalog.classes == ("0", "1", "2")
    assert splits_of(catalog) == {"train": 24, "val": 6, "test": 12}
    with np.load(file) as arrays:
        for sample in catalog.samples:
            index = int(sample.image.stem)
            assert sample.name == f"{sample.split}/{index:06d}.png"
            assert sample.label == arrays[f"{sample.split}_labels"][index, 0]
            pixels = arrays[f"{sample.split}_images"][index]
            expected = np.repeat(pixels[..., None], 3, axis=2) if grey else pixels
            assert np.array_equal(np.asarray(read_image(sample.image)), expected)


def test_medmnist_has_published_names_and_follows_a_model(tmp_path):
    catalog = load_catalog(str(make_npz(tmp_path / "pneumoniamnist_64.npz", classes=2)))
    assert catalog.classes == ("normal", "pneumonia")
    turned = load_catalog(str(tmp_path / "pneumoniamnist_64.npz"), classes=["pneumonia", "normal"])
    assert [s.label for s in turned.samples] == [1 - s.label for s in catalog.samples]
    with pytest.raises(InputError, match=r"unknown labels in .*: normal; the model knows: cat, pneumonia"):
        load_catalog(str(tmp_path / "pneumoniamnist_64.npz"), classes=["cat", "pneumonia"])


def test_medmnist_is_extracted_once_and_again_where_the_file_changes(tmp_path):
    file = make_npz(tmp_path / "mine.npz")
    first = load_catalog(str(file))
    marker = first.root / "train" / "000000.png"
    before = marker.stat().st_mtime_ns
    assert load_catalog(str(file)).root == first.root
    assert marker.stat().st_mtime_ns == before
    make_npz(file, size=32)
    second = load_catalog(str(file))
    assert second.root != first.root
    assert read_image(second.samples[0].image).size == (32, 32)
    shutil.rmtree(second.root)
    assert load_catalog(str(file)).samples[0].image.is_file()  # a run whose images vanished finds them again


def test_medmnist_never_uses_a_half_written_extraction(tmp_path, monkeypatch):
    file = make_npz(tmp_path / "mine.npz")
    save_image, count = Image.Image.save, 0

    def full_disk(self, *args, **kwargs):
        nonlocal count
        count += 1
        if count > 5:
            raise OSError(28, "No space left on device")
        save_image(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(InputError, match=r"cannot take the images of .* No space left on device"):
        load_catalog(str(file))
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.npz"]
    monkeypatch.setattr(Image.Image, "save", save_image)
    assert all(sample.image.is_file() for sample in load_catalog(str(file)).samples)


def test_medmnist_goes_to_the_cache_where_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    file = make_npz(tmp_path / "shared" / "mine.npz")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != file.parent)
    catalog = load_catalog(str(file))
    assert catalog.root.parent == tmp_path / "cache" / "medmnist"
    assert [entry.name for entry in file.parent.iterdir()] == ["mine.npz"]
    assert catalog.samples[0].image.is_file()


@pytest.mark.parametrize(("replaced", "message"), [
    ({"train_images": np.zeros((24, 28, 28, 28), np.uint8)}, r"train_images has shape .*, 3D pictures; expected"),
    ({"train_images": np.zeros((24, 28, 28), np.float32)}, r"train_images has type float32; expected uint8"),
    ({"train_labels": np.zeros((24, 14), np.uint8)}, r"train_labels has shape \(24, 14\), several labels an image"),
    ({"train_labels": np.zeros((23, 1), np.uint8)}, r"24 train_images but 23 train_labels"),
    ({"train_labels": np.array([[{}]] * 24, dtype=object)}, r"not a whole .npz file: .*allow_pickle"),
])  # fmt: skip
def test_medmnist_refuses_in_one_line(tmp_path, replaced, message):
    file = make_npz(tmp_path / "mine.npz", **replaced)
    with pytest.raises(InputError, match=message):
        load_catalog(str(file))
    assert len(list(tmp_path.iterdir())) == 1


def test_medmnist_refuses_other_files(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"not a whole .npz file"):
        load_catalog(str(tmp_path / "text.npz"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"has no train_images and train_labels; it has: x.npy"):
        load_catalog(str(tmp_path / "other.npz"))
    with pytest.raises(InputError, match="no such file"):
        load_catalog(str(tmp_path / "none.npz"), "medmnist")


def test_medmnist_trains(tmp_path, monkeypatch):
    data = make_npz(tmp_path / "breastmnist.npz", classes=2)
    anchors = trains(tmp_path, data, monkeypatch, "--data.allow_duplicates", "true")
    assert "train/000" in json.dumps(anchors)


# Hugging Face's imagefolder


def make_metadata(root: Path, kind: str, where: str = "", split_column: bool = False) -> Path:
    """Images of two classes in split folders, with metadata of each split or one at the top."""
    tables = defaultdict(list)
    for split, count in (("train", 5), ("validation", 2), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for index in range(count):
                file = root / ("images" if split_column else split) / f"{split}-{name}-{index}.png"
                save_noise(file, label, index)
                place = root / (where.format(split=split))
                row = {"file_name": file.relative_to(place).as_posix(), "label": name}
                tables[place].append(row | ({"split": split} if split_column else {}))
    for place, rows in tables.items():
        if kind == "csv":
            with (place / "metadata.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        else:
            (place / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return root


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(("where", "split_column"), [("{split}", False), ("", False), ("", True)])
def test_imagefolder_metadata(tmp_path, kind, where, split_column):
    root = make_metadata(tmp_path, kind, where, split_column)
    assert recognise(str(root)) == "imagefolder"
    catalog = load_catalog(str(root))
    assert catalog.classes == ("cat", "dog")
    assert splits_of(catalog) == {"train": 10, "val": 4, "test": 4}
    for sample in catalog.samples:
        assert sample.image == root / sample.name
        assert catalog.classes[sample.label] in sample.name
        assert sample.image.name.startswith({"val": "validation"}.get(sample.split, sample.split))


def test_imagefolder_without_metadata_knows_all_words_for_splits(tmp_path):
    for word in ("training", "dev", "evaluation"):
        make_images(tmp_path / "data" / word, ["cat", "dog"], 2)
    catalog = load_catalog(str(tmp_path), "imagefolder")
    assert splits_of(catalog) == {"train": 4, "val": 4, "test": 4}
    assert catalog.samples[0].name.startswith("data/dev/cat/")
    assert recognise(str(tmp_path)) == "folder"


@pytest.mark.parametrize(("text", "message"), [
    ("file_name,text\na.png,hello\n", "has no column 'label'; it has: file_name, text"),
    ("file_name,label\nb.png,cat\nc.png,dog\n", r"2 of 2 images listed in .*metadata.csv are missing: .*b.png, .*c.p"),
    ("file_name,label\na.png,\n", "no label in lines 2"),
])  # fmt: skip
def test_imagefolder_refuses_in_one_line(tmp_path, text, message):
    save_noise(tmp_path / "a.png", 0, 0)
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        load_catalog(str(tmp_path), "imagefolder")


def test_imagefolder_refuses_damaged_or_mixed_metadata(tmp_path):
    save_noise(tmp_path / "a.png", 0, 0)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "label": 0}\n{"file_name"')
    with pytest.raises(InputError, match="not JSON lines"):
        load_catalog(str(tmp_path))
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    with pytest.raises(InputError, match=r"metadata.csv, metadata.jsonl under .*; expected .* of one kind"):
        load_catalog(str(tmp_path))


def test_imagefolder_trains(tmp_path, monkeypatch):
    data = make_metadata(tmp_path / "hf", "jsonl", "{split}")
    anchors = trains(tmp_path, data, monkeypatch, "--data.allow_duplicates", "true")
    assert "train/train-" in json.dumps(anchors)


# which source


def test_auto_takes_only_what_is_without_doubt(tmp_path):
    make_images(tmp_path / "plain", ["cat", "dog"], 1)
    (tmp_path / "plain" / "metadata.csv").write_text("image_id,age\n1,40\n")  # somebody's notes, not the layout
    assert recognise(str(tmp_path / "plain")) == "folder"
    assert recognise(str(tmp_path / "any.csv")) == "manifest"
    both = make_isic(make_ham(tmp_path / "both", lesions=1), ("Training",), lesions=1)
    with pytest.raises(InputError, match=r"could be isic2018 or ham10000; say which with --data.source"):
        load_catalog(str(both))
    assert load_catalog(str(both), "ham10000").classes == HAM_CLASSES
    with pytest.raises(InputError, match=f"expected one of: auto, {', '.join(SOURCES)}"):
        load_catalog(str(both), "isic")


@pytest.mark.parametrize("source", ["isic2018", "ham10000", "imagefolder", "folder"])
def test_a_folder_that_is_not_there(tmp_path, source):
    with pytest.raises(InputError, match=r"no such folder: .*none; expected"):
        load_catalog(str(tmp_path / "none"), source)
