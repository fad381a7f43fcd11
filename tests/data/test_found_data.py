"""Data as people have it: folders with droppings, masks and splits of other names; pixels of every mode."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import CLASSES, counts, make_images, refused, save_turned
from protopush import InputError
from protopush.cli import main
from protopush.cli.tables import metrics_table
from protopush.data.dataset import read_mask
from protopush.data.images import check_images, read_image
from protopush.data.manifest import Sample
from protopush.data.sources import load_catalog
from protopush.data.walk import LeftOut, extensions, walk_images


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Train", "Test"), {"train", "val", "test"}),
        (("Training", "Testing"), {"train", "val", "test"}),
        (("train", "Test"), {"train", "val", "test"}),
        (("TRAIN", "Valid", "TEST"), {"train", "val", "test"}),
        (("train", "dev", "eval"), {"train", "val", "test"}),
    ],
)
def test_split_words_in_any_case_are_splits_and_no_classes(tmp_path, names, splits):
    for name in names:
        make_images(tmp_path / name, CLASSES, 10)
    found = counts(load_catalog(str(tmp_path)))
    assert set(found) == splits
    assert all(set(per_class) == set(CLASSES) for per_class in found.values())
    assert sum(sum(per_class.values()) for per_class in found.values()) == 10 * 3 * len(names)
    assert found["test"] == dict.fromkeys(CLASSES, 10)


def test_folders_beside_splits_are_named(tmp_path, caplog):
    for name in ("train", "test", "extra", "Archive"):
        make_images(tmp_path / name, CLASSES, 3)
    with caplog.at_level(logging.WARNING):
        load_catalog(str(tmp_path))
    assert "left out beside them: Archive, extra" in caplog.text


def test_droppings_of_systems_are_neither_classes_nor_images(tmp_path, caplog):
    make_images(tmp_path, CLASSES, 3)
    for dropping in ("__MACOSX", ".ipynb_checkpoints", "@eaDir", "$RECYCLE.BIN"):
        make_images(tmp_path / dropping, ["bird"], 2)
        make_images(tmp_path / "bird" / dropping, ["bird"], 2)
    (tmp_path / "cat" / "._000.png").write_bytes(b"\0")
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"\0")
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(str(tmp_path))
    assert (catalog.classes, len(catalog.samples)) == (tuple(CLASSES), 9)
    assert not caplog.text


def test_files_of_other_kinds_are_counted_and_links_named(tmp_path, caplog):
    make_images(tmp_path / "data", CLASSES, 3)
    make_images(tmp_path / "elsewhere", ["more"], 2)
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "cat" / "loop").symlink_to(tmp_path / "data")
    for name in ("a.dcm", "b.dcm", "notes.TXT", "README"):
        (tmp_path / "data" / "dog" / name).write_text("x")
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(str(tmp_path / "data"))
    assert len(catalog.samples) == 9
    assert "left out: 2 .dcm, 1 .txt, 1 without an ending" in caplog.text
    assert "links to folders are not followed" in caplog.text
    assert str(tmp_path / "data" / "cat" / "loop") in caplog.text


def test_whatever_pillow_reads_is_an_image(tmp_path):
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for ending in (".jp2", ".tga", ".pcx", ".jfif", ".TIFF", ".dib", ".png"):
        picture.save(tmp_path / f"a{ending.lower()}{ending}", format=None if ending != ".jfif" else "JPEG")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    left_out = LeftOut()
    found = list(walk_images(tmp_path, left_out))
    assert len(found) == 7
    assert check_images([Path(name) for name in found])
    assert left_out.kinds == {".pdf": 1}
    assert ".eps" not in extensions()  # Pillow hands it to another program


def test_masks_beside_images_are_masks_and_no_images(tmp_path, caplog):
    make_images(tmp_path, ["benign", "malignant"], 5)
    mask = Image.fromarray(np.full((32, 40), 255, dtype=np.uint8))
    mask.save(tmp_path / "benign" / "000_mask.png")
    for name in ("001_mask.png", "001_mask_1.png"):  # BUSI: two lesions
        mask.save(tmp_path / "benign" / name)
    mask.save(tmp_path / "malignant" / "002-Segmentation.png")
    mask.save(tmp_path / "malignant" / "nobodys_mask.png")  # of no image here: an image
    with caplog.at_level(logging.WARNING):
        catalog = load_catalog(str(tmp_path))
    assert len(catalog.samples) == 11
    masks = {sample.name: sample.mask and sample.mask.name for sample in catalog.samples if sample.mask}
    assert masks == {"benign/000.png": "000_mask.png", "malignant/002.png": "002-Segmentation.png"}
    assert "4 masks beside their images; 1 images have several and get none" in caplog.text


def hidden_red(mode: str) -> Image.Image:
    """Red, half of it transparent; what is below is red too."""
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[..., 0], pixels[:, :2, 3] = 200, 255
    picture = Image.fromarray(pixels)
    if mode == "P":
        palette = Image.new("P", (4, 4), 0)
        palette.putpalette([200, 0, 0, 200, 0, 0])
        palette.paste(1, (2, 0, 4, 4))
        palette.info["transparency"] = 1
        return palette
    return picture if mode == "RGBA" else picture.convert("LA")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_is_hidden_below(tmp_path, mode):
    hidden_red(mode).save(tmp_path / "a.png")
    values = np.asarray(read_image(tmp_path / "a.png"))
    assert (values[:, 2:] == 255).all()
    assert (values[:, :2] == values[0, 0]).all()
    assert values[0, 0].tolist() == ([200, 0, 0] if mode != "LA" else [60, 60, 60])


@pytest.mark.parametrize("top", [1, 250, 260, 30_000, 65_535])
@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_by_their_mode_and_not_by_their_content(tmp_path, top, ending):
    values = np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    found = np.asarray(read_image(tmp_path / f"a.{ending}"))[..., 0]
    assert np.abs(found - values / 257.0).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("dtype", "words"), [(np.float32, "floating point"), (np.int32, "32 bits")])
def test_what_has_no_scale_is_refused_by_name(tmp_path, dtype, words):
    Image.fromarray(np.linspace(0, 1000, 64).astype(dtype).reshape(8, 8)).save(tmp_path / "a.tif")
    for check in (lambda: read_image(tmp_path / "a.tif"), lambda: check_images([tmp_path / "a.tif"])):
        with pytest.raises(InputError, match=rf"a\.tif \({words}|a\.tif \(.*{words}"):
            check()


LEFT = np.zeros((32, 40), dtype=np.uint8)
LEFT[:, :20] = 255


def masks_of_the_left(root: Path) -> dict[str, Path]:
    picture = Image.fromarray(LEFT)
    picture.save(root / "grey.png")
    Image.fromarray(LEFT // 255).save(root / "ones.png")
    picture.convert("1").save(root / "one bit.png")
    picture.convert("RGB").save(root / "lossy.jpg", quality=20)
    black = Image.new("RGBA", picture.size)
    black.putalpha(picture)
    black.save(root / "alpha alone.png")
    opaque = picture.convert("RGBA")
    opaque.save(root / "opaque.png")
    save_turned(picture, root / "turned.jpg", 6)
    return {file.stem: file for file in root.iterdir() if file.name != "image.png"}


def test_masks_of_every_kind_are_read_alike(tmp_path):
    Image.fromarray(LEFT).convert("RGB").save(tmp_path / "image.png")
    found = masks_of_the_left(tmp_path)
    assert len(found) == 7
    for name, file in found.items():
        mask = read_mask(Sample(tmp_path / "image.png", "image.png", 0, mask=file))
        wrong = (mask != (LEFT > 0)).mean()
        assert wrong == 0 or (file.suffix == ".jpg" and wrong < 0.03), name


def test_a_manifests_masks_may_have_backslashes(tmp_path):
    make_images(tmp_path / "images", ["a", "b"], 2)
    (tmp_path / "masks").mkdir()
    Image.fromarray(LEFT).save(tmp_path / "masks" / "m.png")
    (tmp_path / "m.csv").write_text("image,label,mask\nimages\\a\\000.png,a,masks\\m.png\nimages\\b\\000.png,b,\n")
    masks = [sample.mask for sample in load_catalog(str(tmp_path / "m.csv")).samples]
    assert masks == [tmp_path / "masks" / "m.png", None]


def test_names_are_never_markup_nor_cut_off():
    numbers = {"n": 1, "sensitivity": 1.0, "precision": 1.0, "f1": 1.0, "auroc": None}
    names = ["grade [II]", "a [/b]", "[bold]grade[/bold]", "z :smile: ", "x" * 300 + "1", "x" * 300 + "2"]
    metrics = {"n": 6, "accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0, "auroc": None}
    text = metrics_table(metrics | {"per_class": dict.fromkeys(names, numbers)})
    for name in names:
        assert name.strip() in text


@pytest.mark.parametrize(("kind", "same"), [("split", "test/cat/000.png"), ("label", "train/dog/000.png")])
def test_the_same_file_in_two_splits_or_with_two_labels_is_refused(tmp_path, capsys, kind, same):
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(3):
                pixels = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{index:03d}.png")
    original = tmp_path / "data" / "train" / "cat" / "001.png"
    (tmp_path / "data" / same).write_bytes(original.read_bytes())
    words = ["train", "--data.path", tmp_path / "data", "--model.backbone", "test_resnet",
             "--model.pretrained", "false", "--model.windows", "null", "--train.epochs", "1",
             "--out", tmp_path / "run"]  # fmt: skip
    text = refused(capsys, *words)
    assert "1 files are the same as one in another split or with another label" in text
    assert same in text
    assert "train/cat/001.png" in text
    assert main([*map(str, words), "--data.allow_duplicates", "true"]) == 0
