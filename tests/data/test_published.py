"""Published data in small, with their names, columns and folders: ISIC 2019 and 2020, HAM10000 as people sort it,
MedMNIST's sizes, and the folders of torchvision, Kaggle and Hugging Face."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from helpers import SMALL, counts, edit, save_noise, write_table
from protopush import InputError
from protopush.cli import main
from protopush.data.images import read_image
from protopush.data.manifest import Catalog
from protopush.data.sources import load_catalog, recognise

SKIN_2019 = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")


def splits_by_group(catalog: Catalog) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for sample in catalog.samples:
        if sample.group:
            found.setdefault(sample.group, set()).add(sample.split)
    return found


# ISIC 2019


def make_isic2019(root: Path, lesions: int = 10, test: bool = False, nested: bool = False) -> Path:
    """Two images of each lesion, the second one downsampled; the last lesion of each class has no number."""
    truth, metadata, number = [], [], 0
    folder = root / "ISIC_2019_Training_Input" / ("ISIC_2019_Training_Input" if nested else "")
    for label, name in enumerate(SKIN_2019):
        for lesion in range(lesions):
            for ending in ("", "_downsampled"):
                image, number = f"ISIC_{number:07d}{ending}", number + 1
                truth.append([image, *(float(other == name) for other in SKIN_2019), 0.0])
                known = f"BCN_{label}{lesion:06d}" if lesion < lesions - 1 else ""
                metadata.append([image, 55.0, "anterior torso", known, "female"])
                save_noise(folder / f"{image}.jpg", label, number)
    header = f"image,{','.join(SKIN_2019)},UNK"
    write_table(root / "ISIC_2019_Training_GroundTruth.csv", header, truth)
    write_table(
        root / "ISIC_2019_Training_Metadata.csv", "image,age_approx,anatom_site_general,lesion_id,sex", metadata
    )
    if test:
        rows = []
        for label, name in enumerate((*SKIN_2019, "UNK")):
            image = f"ISIC_9{label:06d}"
            rows.append([image, *(float(other == name) for other in (*SKIN_2019, "UNK")), 1.0, 0.0])
            save_noise(root / "ISIC_2019_Test_Input" / f"{image}.jpg", label, 5000 + label)
        write_table(root / "ISIC_2019_Test_GroundTruth.csv", f"{header},score_weight,validation_weight", rows)
        write_table(root / "ISIC_2019_Test_Metadata.csv", "image,age_approx,anatom_site_general,sex",
                    [[row[0], "", "", ""] for row in rows])  # fmt: skip
    return root


@pytest.mark.parametrize("nested", [False, True])
def test_isic2019_as_published(tmp_path, caplog, nested):
    root = make_isic2019(tmp_path, nested=nested)
    assert recognise(str(root)) == "isic2019"
    catalog = load_catalog(str(root))
    assert catalog.classes == SKIN_2019
    assert {split: sum(found.values()) for split, found in counts(catalog).items()}.keys() == {"train", "val", "test"}
    assert Counter(s.label for s in catalog.samples) == dict.fromkeys(range(8), 20)
    groups = splits_by_group(catalog)
    assert len(groups) == 8 * 9
    assert all(len(found) == 1 for found in groups.values())
    assert sum(sample.group is None for sample in catalog.samples) == 16
    assert "16 of 160 training images have no lesion_id: each counts as its own" in caplog.text
    assert any(sample.name.endswith("ISIC_0000001_downsampled.jpg") for sample in catalog.samples)


def test_isic2019_with_its_test_set_whose_unknown_class_no_training_image_has(tmp_path, caplog):
    catalog = load_catalog(str(make_isic2019(tmp_path, test=True)))
    assert catalog.classes == SKIN_2019
    assert counts(catalog)["test"] == dict.fromkeys(SKIN_2019, 1)
    assert {s.name.split("/")[0] for s in catalog.split("test")} == {"ISIC_2019_Test_Input"}
    assert "ISIC_2019_Test_GroundTruth.csv: 1 images of UNK are left out" in caplog.text
    table = tmp_path / "ISIC_2019_Training_GroundTruth.csv"  # somebody has moved images into it
    text = table.read_text()
    table.write_text(
        text.replace("ISIC_0000000,1.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0", "ISIC_0000000" + ",0.0" * 8 + ",1.0")
    )
    catalog = load_catalog(str(tmp_path))
    assert catalog.classes == (*SKIN_2019, "UNK")
    assert counts(catalog)["test"] == dict.fromkeys((*SKIN_2019, "UNK"), 1)


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda r: (r / "ISIC_2019_Training_Metadata.csv").unlink(), r"no such file: .*Metadata.csv; expected the pub"),
    (lambda r: shutil.rmtree(r / "ISIC_2019_Training_Input"), r"16 of 16 images .* are missing: ISIC_0000000,"),
    (lambda r: edit(r / "ISIC_2019_Training_GroundTruth.csv", ",SCC", ",XYZ"), r"has no column 'SCC'"),
    (lambda r: edit(r / "ISIC_2019_Training_Metadata.csv", "ISIC_0000000,", "ISIC_7,"), r"has no row for ISIC_0000000"),
    (lambda r: edit(r / "ISIC_2019_Training_Metadata.csv", "lesion_id", "lesion"), r"has no column 'lesion_id'"),
])  # fmt: skip
def test_isic2019_refuses_in_one_line(tmp_path, spoil, message):
    root = make_isic2019(tmp_path, lesions=1)
    spoil(root)
    with pytest.raises(InputError, match=message) as caught:
        load_catalog(str(root), "isic2019")
    assert "\n" not in str(caught.value)


# ISIC 2020

HEADER_2020 = "image_name,patient_id,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target"


def make_isic2020(root: Path, kind: str = "v2", folder: str = "train", patients: int = 20) -> Path:
    """Four images of each patient, the first of every fourth patient malignant, and one duplicate."""
    rows = []
    for patient in range(patients):
        for index in range(4):
            target = int(index == 0 and patient % 4 == 0)
            name, who = f"ISIC_{patient:05d}{index:02d}", f"IP_{patient:07d}"
            row = [name, who, "male", 45, "torso", "melanoma" if target else "unknown",
                   ("benign", "malignant")[target], target]  # fmt: skip
            rows.append([*row[:2], f"IL_{patient:05d}{index // 2}", *row[2:]] if kind == "v2" else row)
            save_noise(root / folder / f"{name}.jpg", target, len(rows))
    if kind == "v2":
        header = HEADER_2020.replace("patient_id,", "patient_id,lesion_id,")
        write_table(root / "ISIC_2020_Training_GroundTruth_v2.csv", header, rows)
        write_table(root / "ISIC_2020_Training_Duplicates.csv", "image_name_1,image_name_2",
                    [["ISIC_0000101", "ISIC_0000202"]])  # fmt: skip
    else:
        write_table(root / {"v1": "ISIC_2020_Training_GroundTruth.csv"}.get(kind, "train.csv"), HEADER_2020, rows)
    return root


@pytest.mark.parametrize(("kind", "folder"), [("v2", "train"), ("v1", "ISIC_2020_Training_JPEG/train"),
                                              ("kaggle", "jpeg/train")])  # fmt: skip
def test_isic2020_as_published(tmp_path, caplog, kind, folder):
    root = make_isic2020(tmp_path, kind, folder)
    save_noise(root / "a_resized_copy" / "ISIC_0000000.jpg", 0, 9999)
    for index in range(3):  # unlabelled, as published
        save_noise(root / folder.replace("train", "test") / f"ISIC_99{index}.jpg", 0, 8000 + index)
    (root / "sample_submission.csv").write_text("image_name,target\nISIC_990,0\n")
    assert recognise(str(root)) == "isic2020"
    catalog = load_catalog(str(root))
    assert catalog.classes == ("benign", "malignant")
    left = 1 if kind == "v2" else 0
    assert Counter(s.label for s in catalog.samples) == {0: 75 - left, 1: 5}
    groups = splits_by_group(catalog)
    assert set(groups) == {f"IP_{patient:07d}" for patient in range(20)}
    assert all(len(found) == 1 for found in groups.values())
    assert set(counts(catalog)) == {"train", "val", "test"}
    assert all(sample.name.startswith(f"{folder}/ISIC_000") for sample in catalog.samples)
    assert ("ISIC_0000202" in {sample.image.stem for sample in catalog.samples}) == (kind != "v2")
    said = "1 images that are listed as duplicates are left out" if left else "Duplicates.csv is not under"
    assert said in caplog.text


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda r: edit(r / "train.csv", ",1\n", ",2\n"), r"has the targets 2; expected 0 \(benign\) or 1 \(malignant\)"),
    (lambda r: edit(r / "train.csv", "IP_0000000", ""), r"no patient_id in lines 2"),
    (lambda r: [file.rename(file.with_suffix(".dcm")) for file in (r / "train").iterdir()],
     r"16 of 16 images .* missing: ISIC_0000000.*expected them under .*train as JPEG \(DICOM is not read\)"),
    (lambda r: edit(r / "train.csv", "patient_id", "patient"), r"has no column 'patient_id'; .*did you mean 'patient'"),
])  # fmt: skip
def test_isic2020_refuses_in_one_line(tmp_path, spoil, message):
    root = make_isic2020(tmp_path, "kaggle", patients=4)
    spoil(root)
    with pytest.raises(InputError, match=message):
        load_catalog(str(root), "isic2020")


def test_a_train_csv_of_somebody_else_is_not_isic2020(tmp_path):
    save_noise(tmp_path / "cat" / "a.png", 0, 0)
    (tmp_path / "train.csv").write_text("image_name,target\na,0\n")
    assert recognise(str(tmp_path)) == "folder"


# HAM10000, sorted into folders


def make_sorted_ham(
    root: Path, folder_of, table: str = "HAM10000_metadata.csv", split=lambda lesion, index: ""
) -> Path:
    """Ten lesions a class, two images each, the image ``ID.jpg`` in the folder ``folder_of(dx)``."""
    rows, number = [], 0
    for label, dx in enumerate(("bkl", "mel", "nv")):
        for lesion in range(10):
            for index in range(2):
                name, number = f"ISIC_{number:07d}", number + 1
                rows.append([f"HAM_{label}{lesion:06d}", name, dx, "histo", "45", "male", "back"])
                save_noise(root / split(lesion, index) / folder_of(dx) / f"{name}.jpg", label, number)
    rows.append(["HAM_9", "ISIC_9999999", "df", "histo", "45", "male", "back"])  # a class that nobody has kept
    write_table((root / table).resolve(), "lesion_id,image_id,dx,dx_type,age,sex,localization", rows,
                "\t" if table.endswith(".tab") else ",")  # fmt: skip
    return root


@pytest.mark.parametrize("table", ["HAM10000_metadata.csv", "HAM10000_metadata.tab", "../HAM10000_metadata.csv",
                                   "../HAM10000_metadata"])  # fmt: skip
@pytest.mark.parametrize(("folder_of", "classes"), [
    (str.lower, {"bkl": 20, "mel": 20, "nv": 20}),
    (str.upper, {"bkl": 20, "mel": 20, "nv": 20}),
    (lambda dx: "malignant" if dx == "mel" else "benign", {"benign": 40, "malignant": 20}),
])  # fmt: skip
def test_ham10000_in_class_folders_keeps_lesions_together(tmp_path, table, folder_of, classes):
    root = make_sorted_ham(tmp_path / "images", folder_of, table)
    assert recognise(str(root)) == "ham10000"
    catalog = load_catalog(str(root))
    assert Counter(catalog.classes[sample.label] for sample in catalog.samples) == classes
    groups = splits_by_group(catalog)
    assert len(groups) == 30
    assert all(len(found) == 1 for found in groups.values())
    assert set(counts(catalog)) == {"train", "val", "test"}


def test_ham10000_keeps_the_splits_of_folders_and_refuses_a_lesion_in_two(tmp_path):
    kept = make_sorted_ham(tmp_path / "kept", str, split=lambda lesion, index: "Train" if lesion < 8 else "valid")
    assert counts(load_catalog(str(kept))) == {"train": {"bkl": 16, "mel": 16, "nv": 16},
                                              "val": {"bkl": 4, "mel": 4, "nv": 4}}  # fmt: skip
    torn = make_sorted_ham(tmp_path / "torn", str, split=lambda lesion, index: ("train", "test")[index])
    with pytest.raises(InputError, match="30 groups lie in several splits: HAM_0000000"):
        load_catalog(str(torn))


def test_ham10000_in_class_folders_refuses_what_contradicts_the_table(tmp_path):
    root = make_sorted_ham(tmp_path / "ham", str)
    shutil.move(root / "mel" / "ISIC_0000020.jpg", root / "nv" / "ISIC_0000020.jpg")
    with pytest.raises(
        InputError, match=r"1 images lie in the folder of another class than .*csv says: nv/ISIC_0000020"
    ):
        load_catalog(str(root))
    shutil.move(root / "nv" / "ISIC_0000020.jpg", root / "mel" / "ISIC_0000020_flipped.jpg")
    with pytest.raises(
        InputError, match=r"1 images under .* are not in .*: ISIC_0000020_flipped.jpg; without its lesion"
    ):
        load_catalog(str(root))
    assert len(load_catalog(str(root), "folder").samples) == 60


def test_ham10000_leaves_other_folders_beside_its_table_alone(tmp_path):
    make_sorted_ham(tmp_path / "ham", str, "../HAM10000_metadata.csv")
    for name in ("cat", "dog"):
        save_noise(tmp_path / "pets" / name / "a.png", 0, 0)
    assert recognise(str(tmp_path / "pets")) == "folder"


# MedMNIST


@pytest.mark.parametrize(("name", "size", "colours", "classes"), [
    ("dermamnist", 28, 3, 7), ("dermamnist_64", 64, 3, 7), ("dermamnist_128", 128, 3, 7), ("dermamnist_224", 224, 3, 7),
    ("pneumoniamnist", 28, 1, 2), ("pneumoniamnist_128", 128, 1, 2),
])  # fmt: skip
def test_medmnist_in_all_sizes_and_colours(tmp_path, name, size, colours, classes):
    generator, arrays = np.random.default_rng(size), {}
    for split in ("train", "val", "test"):
        shape = (classes, size, size) if colours == 1 else (classes, size, size, 3)
        arrays[f"{split}_images"] = generator.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(classes, dtype=np.uint8)[::-1, None]
    np.savez_compressed(tmp_path / f"{name}.npz", **arrays)
    catalog = load_catalog(str(tmp_path / f"{name}.npz"))
    assert len(catalog.classes) == classes
    assert catalog.classes[4 % classes] == ("melanoma" if classes == 7 else "normal")
    assert {split: sum(found.values()) for split, found in counts(catalog).items()} == dict.fromkeys(
        ("train", "val", "test"), classes
    )
    for sample in catalog.samples:
        pixels = np.asarray(read_image(sample.image))
        wanted = arrays[f"{sample.split}_images"][int(sample.image.stem)]
        assert np.array_equal(pixels, wanted if colours == 3 else np.repeat(wanted[..., None], 3, axis=2))
        assert sample.label == classes - 1 - int(sample.image.stem)


# folders of torchvision, Kaggle and Hugging Face


def images(root: Path, *places: str) -> None:
    for number, place in enumerate(places):
        save_noise(root / place, number % 2, number)


def test_torchvision_folders(tmp_path, caplog):
    images(tmp_path, *(f"{kind}/{index}.png" for kind in ("cat", "dog") for index in range(10)), "cat/deep/er/x.jpeg")
    (tmp_path / "readme.txt").write_text("cats and dogs")
    images(tmp_path, "overview.png", "._overview.png")
    catalog = load_catalog(str(tmp_path))
    assert catalog.classes == ("cat", "dog")
    assert Counter(s.label for s in catalog.samples) == {0: 11, 1: 10}
    assert "1 images in no folder of a class are left out: overview.png" in caplog.text


def test_kaggle_folders_whose_test_images_have_no_label(tmp_path, caplog):
    for split, count in (("train", 5), ("valid", 2)):
        images(tmp_path, *(f"{split}/{kind}/{index}.jpg" for kind in ("cat", "dog") for index in range(count)))
    images(tmp_path, "test/1.jpg", "test/2.jpg", "test/3.jpg", "test/4.jpg")
    catalog = load_catalog(str(tmp_path))
    assert counts(catalog) == {"train": {"cat": 5, "dog": 5}, "val": {"cat": 2, "dog": 2}}
    assert "4 images in no folder of a class are left out: test/1.jpg, test/2.jpg, test/3.jpg" in caplog.text
    images(tmp_path, "test/cat/5.jpg", "test/dog/6.jpg")
    assert counts(load_catalog(str(tmp_path)))["test"] == {"cat": 1, "dog": 1}


@pytest.mark.parametrize("above", ["chest_xray/{split}/{kind}", "{kind}/{split}"])
def test_folders_of_splits_that_lie_deeper_are_no_classes(tmp_path, above):
    for split in ("train", "val", "test"):
        images(tmp_path, *(f"{above.format(split=split, kind=kind)}/{split}.jpg" for kind in ("cat", "dog")))
    with pytest.raises(InputError, match=r"folders of splits lie below .*(chest_xray|cat, .*dog); expected them above"):
        load_catalog(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_hugging_face_metadata(tmp_path, caplog, kind):
    rows = [{"file_name": f"{split}/{index}.png", "label": ("cat", "dog")[index % 2], "group": f"{index // 2}{split}"}
            for split, count in (("train", 8), ("validation", 4), ("test", 4)) for index in range(count)]  # fmt: skip
    images(tmp_path, *(row["file_name"] for row in rows), "train/forgotten.png")
    if kind == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert recognise(str(tmp_path)) == "imagefolder"
    catalog = load_catalog(str(tmp_path))
    assert counts(catalog) == {"train": {"cat": 4, "dog": 4}, "val": {"cat": 2, "dog": 2}, "test": {"cat": 2, "dog": 2}}
    assert len(splits_by_group(catalog)) == 8
    assert "1 images are not in the metadata and left out: train/forgotten.png" in caplog.text


def test_hugging_face_metadata_without_a_label_are_not_passed_over(tmp_path):
    images(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,owner\ncat/1.png,a\ndog/2.png,b\n")
    with pytest.raises(InputError, match=r"no column 'label'; it has: file_name, owner; --data.source folder takes"):
        load_catalog(str(tmp_path))
    assert load_catalog(str(tmp_path), "folder").classes == ("cat", "dog")


# all of it


def test_isic2019_and_sorted_ham10000_train(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    made = {"isic": make_isic2019(tmp_path / "isic", lesions=5), "ham": make_sorted_ham(tmp_path / "ham", str)}
    for name, data in made.items():
        run = tmp_path / f"run-{name}"
        words = ["--data.path", str(data), "--out", str(run), *SMALL, "--train.epochs", "1", "--push.unique", "group"]
        assert main(["train", *words]) == 0
        anchors = json.loads((run / "prototypes.json").read_text())
        assert ("BCN_" if name == "isic" else "HAM_") in json.dumps(anchors)
