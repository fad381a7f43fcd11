"""Made folders and tables of images, each from its seed, through ``data audit`` and a training of one epoch.

The maker knows the class of each image it writes, and what is odd. What is not odd must be accepted, with these classes
and with each image in the run's ``split.csv``; what is odd must be refused, in one line that names it.
"""

from __future__ import annotations

import csv
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from unicodedata import normalize

import numpy as np
import pytest
from PIL import Image

from helpers import SMALL, save_turned
from protopush.cli import main
from protopush.data.images import image_size
from protopush.runs.split_record import read_split

CLASSES = (
    "nv", "mel", "Basal cell", "grade [II]", "a [/b]", "x,y", 'the "one"', "it's", "naïve", "黑色素瘤", "=1+1", "@sum",
    "-dash", "$x^2$", "{name}", "%s", "<b>bold</b>", "&amp;", "a;b", "*", "[ab]", "null", "1", "007", "1e3", "true",
    "#", "a|b", "Ünï",
)  # fmt: skip
MODES = {
    ".png": ("1", "L", "LA", "RGB", "RGBA", "P", "I;16"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".JPEG": ("RGB",),
    ".bmp": ("1", "L", "RGB", "P"),
    ".tif": ("1", "L", "RGB", "RGBA", "CMYK", "P", "I;16", "F", "I"),
    ".webp": ("RGB", "RGBA"),
    ".gif": ("L", "P"),
    ".ppm": ("RGB",),
    ".tga": ("L", "RGB", "RGBA"),
}
SIDES = (1, 2, 3, 7, 16, 31, 32, 33, 64, 150)
DROPPINGS = ("._a.png", "Thumbs.db", ".DS_Store", "__MACOSX/b.png", ".ipynb_checkpoints/c.png", "@eaDir/d.jpg")
OTHERS = ("notes.txt", "scan.dcm", "README", "a.json")
SPLIT_WORDS = (("train", "val", "test"), ("Train", "Valid", "Test"), ("training", "validation", "testing"))


@dataclass
class Made:
    """What was written: where, the class of each image, words of which a refusal must name one, and may name one."""

    path: Path
    labels: dict[str, str] = field(default_factory=dict)
    odd: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    others: int = 0


def picture(random: Random, mode: str) -> Image.Image:
    """Noise that no other image of this test has."""
    size = random.choice(SIDES), random.choice(SIDES)
    if mode == "1" or size[0] * size[1] < 16:  # else two could be equal by chance
        size = max(size[0], 16), max(size[1], 16)
    noise = np.random.default_rng(random.getrandbits(32))
    if mode == "I;16":
        return Image.fromarray(noise.integers(0, 65536, size[::-1], dtype=np.uint16))
    if mode in ("F", "I"):
        return Image.fromarray(noise.uniform(0, 1000, size[::-1]).astype(np.float32 if mode == "F" else np.int32))
    rgba = Image.fromarray(noise.integers(0, 256, (*size[::-1], 4), dtype=np.uint8), "RGBA")
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode) if mode != "LA" else rgba.convert("LA")


def save(random: Random, made: Made, file: Path) -> Path:
    """An image, now and then a broken one; the file has the ending of its format."""
    ending = random.choice((*MODES, ".png", ".jpg"))
    mode = random.choice(MODES[ending])
    if mode in ("F", "I") and random.random() < 0.8:
        mode = "L"
    file = file.with_name(file.name + ending)
    file.parent.mkdir(parents=True, exist_ok=True)
    image = picture(random, mode)
    if ending in (".jpg", ".png") and random.random() < 0.1:
        save_turned(image, file, random.randint(1, 8))
    else:
        image.save(file)
    if mode in ("F", "I"):
        made.odd.add(f"{re.escape(file.name)} .*(floating point|32 bits)")
    if random.random() < 0.01:
        file.write_bytes(random.choice((b"", b"no image", file.read_bytes()[: file.stat().st_size // 2])))
        made.odd.add(re.escape(file.name))
    return file


def mask_of(random: Random, image: Path, file: Path) -> Path:
    try:
        size = image_size(image)
    except Exception:  # it is one of the broken ones
        size = (16, 16)
    on = Image.fromarray(np.random.default_rng(random.getrandbits(32)).choice([0, 255], size[::-1]).astype(np.uint8))
    file.parent.mkdir(parents=True, exist_ok=True)
    on.convert(random.choice(("1", "L", "RGB", "RGBA"))).save(file)
    return file


def names_of(random: Random, count: int) -> list[str]:
    ugly = ("{}", "%d", "a b", "=x", "[1]", "$y$", "ä", "e\u0301", "x.y", "#", "'", "&", "+", "-1", "~")
    return [f"{random.choice(ugly)}{number}" if random.random() < 0.3 else f"{number:04d}" for number in range(count)]


def class_names(random: Random) -> list[str]:
    names = random.sample(CLASSES, random.choice((1, 2, 2, 3, 3, 3, 4, 4)) if random.random() < 0.2 else 3)
    return [normalize(random.choice(("NFC", "NFD")), name) for name in names]


def folders(random: Random, root: Path) -> Made:
    """Class folders, with or without folders of splits, masks beside images, droppings, and files of other kinds."""
    made, classes = Made(root), class_names(random)
    for split in random.choice(([""], [""], *SPLIT_WORDS, SPLIT_WORDS[0][::2])):
        for name in classes:
            place = root / split / name.replace("/", "")
            if random.random() < 0.1:
                place /= "deeper"
            for stem in names_of(random, random.randint(4, 8)):
                image = save(random, made, place / stem)
                made.labels[image.relative_to(root).as_posix()] = name.replace("/", "")
                if random.random() < 0.1:
                    mask_of(random, image, place / f"{stem}_mask.png")
            if random.random() < 0.2:
                dropping = place / random.choice(DROPPINGS)
                dropping.parent.mkdir(exist_ok=True)
                dropping.write_bytes(b"x")
            if random.random() < 0.2:
                (place / random.choice(OTHERS)).write_text("x")
                made.others += 1
    spoil(random, made, root)
    return made


def spoil(random: Random, made: Made, root: Path) -> None:
    """Now and then what no training may take: one class, a file twice, a name that is no text."""
    if len({normalize("NFC", name) for name in made.labels.values()}) == 1:
        made.odd.add("only one class")
    one, *others = list(made.labels)
    other = next((name for name in others if made.labels[name] != made.labels[one]), None)
    if other is not None and random.random() < 0.05:
        (root / other).write_bytes((root / one).read_bytes())
        made.odd |= {"same as one in another split or with another label", re.escape(Path(other).name)}
    if made.path.is_dir() and random.random() < 0.03:
        picture(random, "RGB").save(os.fsencode((root / one).parent) + b"/caf\xe9.png")
        made.odd.add("no UTF-8")


def table(random: Random, root: Path) -> Made:
    """A manifest of some separator, encoding, header and columns, with files anywhere below."""
    made, classes = Made(root / "manifest.csv"), class_names(random)
    has_split, has_group, has_mask = (random.random() < 0.4 for _ in range(3))
    one_hot, bare = random.random() < 0.15 and len(classes) > 1, random.random() < 0.1
    header = ["image", "label", *(["split"] * has_split), *(["group"] * has_group), *(["mask"] * has_mask), "note"]
    rows = []
    for number, name in enumerate(classes):
        for stem in names_of(random, random.randint(4, 8)):
            image = save(random, made, root / random.choice(("", "images", "a b/c")) / f"{number}-{stem}")
            place = image.relative_to(root).as_posix()
            made.labels[place] = name
            split = random.choice(("train", "Train", "training")) if has_split else ""
            place = place.removesuffix(image.suffix) if bare else place
            row = [place.replace("/", "\\") if random.random() < 0.1 else place, name]
            row += [split] * has_split + [random.choice((f"{name}{stem}", ""))] * has_group
            if has_mask and random.random() < 0.7:
                row.append(mask_of(random, image, root / "masks" / f"{number}-{stem}.png").relative_to(root).as_posix())
            elif has_mask:
                row.append("")
            rows.append([*row, random.choice(("", "seen twice", "x; y, z"))])
    random.shuffle(rows)
    spoil(random, made, root)
    if one_hot:
        header = ["image", *classes, *header[2:-1]]
        rows = [[row[0], *(f"{float(row[1] == name)}" for name in classes), *row[2:-1]] for row in rows]
    elif random.random() < 0.05:
        rows[0][1] = ""
        made.odd.add("label")
    if random.random() < 0.05:
        rows.append(["missing.png", *rows[-1][1:]])
        made.odd.add("missing.png")
    encodings = ["utf-8", "utf-8-sig", "utf-16"]
    text = "".join(",".join(row) for row in rows)
    if text.isascii() or random.random() < 0.5:
        encodings.append("cp1252")
    encoding = random.choice(encodings)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        encoding = "utf-8"
    if encoding == "cp1252" and not text.isascii():
        made.doubtful.add("is not UTF-8")
    shown = str if one_hot else random.choice((str, str.capitalize, str.upper))
    with made.path.open("w", newline="", encoding=encoding) as file:
        separator = random.choice(",;\t")
        if random.random() < 0.1:
            file.write(f"sep={separator}\n")
        quoting = random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        ends = random.choice(("\n", "\r\n"))
        writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=ends)
        writer.writerows([[shown(word) for word in header], *rows])
        file.write(random.choice(("", ends)))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(300))
def test_what_was_made_is_what_is_trained_on(tmp_path, capsys, monkeypatch, one_thread, seed):
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    random = Random(seed)
    made = random.choice((folders, table))(random, tmp_path / "data")
    words = ["--data.path", str(made.path)]
    code = main(["train", *words, "--out", str(tmp_path / "run"), *SMALL, "--train.epochs", "1"])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if code:
        line = err.splitlines()[-1]
        assert code == 2, err
        assert line.startswith("protopush: error: "), err
        assert any(re.search(odd, normalize("NFC", line)) for odd in made.odd | made.doubtful), line
        assert not (tmp_path / "run").exists()
    else:
        assert made.odd == set(), err
        assert sorted(read_split(tmp_path / "run")) == sorted(made.labels)
        known = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["classes"]
        assert sorted(known) == sorted({normalize("NFC", name) for name in made.labels.values()})
        if made.others:
            assert re.search(r"left out: .*\d", err), err
    assert main(["data", "audit", *words, "--json"]) in (0, 1, 2)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    if not code:
        counts = json.loads(out)["counts"]
        assert sum(sum(row.values()) for row in counts.values()) == len(made.labels)
