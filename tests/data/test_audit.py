"""The audit finds what was planted and nothing else; the search finds what comparing all pairs finds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from helpers import make_images
from protopush import InputError
from protopush.cli import main
from protopush.data.audit import Audit, audit
from protopush.data.images import read_image
from protopush.data.manifest import Catalog, Sample
from protopush.data.similar import (
    COARSE,
    ORIENTATIONS,
    SIDE,
    THRESHOLD,
    candidates,
    near_pairs,
    orientations,
    signatures,
    thumbnail,
    turned,
)
from protopush.data.sources import load_catalog

Change = Callable[[Image.Image], Image.Image]


def scene(seed: int, width: int = 240, height: int = 180) -> Image.Image:
    """A picture with detail at every scale, as photographs have; no two alike."""
    random = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for scale in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray(random.integers(0, 256, (scale, scale, 3)).astype(np.uint8))
        total += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / scale
    return Image.fromarray(np.interp(total, (total.min(), total.max()), (20, 220)).astype(np.uint8))


def cropped(image: Image.Image, share: float = 0.05, left: float = 0.5) -> Image.Image:
    width, height = image.size
    x, y = (round(side * share * left) for side in (width, height))
    return image.crop((x, y, x + round(width * (1 - share)), y + round(height * (1 - share))))


CHANGES: dict[str, Change] = {
    "as it is": lambda image: image,
    "resized to 60 %": lambda image: image.resize((image.width * 6 // 10, image.height * 6 // 10)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned three times": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    "5 % cropped": cropped,
    "5 % cropped at one corner": lambda image: cropped(image, left=0.0),
}


def catalog_of(folder: Path, *rows: tuple[str, int, str] | tuple[str, int, str, str]) -> Catalog:
    """Samples of (file, label, split[, group])."""
    samples = tuple(Sample(folder / row[0], row[0], row[1], row[2], *row[3:]) for row in rows)
    return Catalog(samples, ("cat", "dog"), folder)


@pytest.mark.parametrize("quality", [50, 95])
def test_a_changed_copy_is_found_and_nothing_else(tmp_path, quality):
    for number in range(30):
        scene(number).save(tmp_path / f"{number}.jpg", quality=95)
    rows = [(f"{number}.jpg", number % 2, "train") for number in range(30)]
    for number, change in enumerate(CHANGES.values()):
        change(read_image(tmp_path / f"{number}.jpg")).save(tmp_path / f"copy-{number}.jpg", quality=quality)
        rows.append((f"copy-{number}.jpg", number % 2, "test"))
    found = audit(catalog_of(tmp_path, *rows))
    assert sorted((pair.first, pair.second) for pair in found.duplicates) == sorted(
        (f"{number}.jpg", f"copy-{number}.jpg") for number in range(len(CHANGES))
    )
    assert all(pair.across and not pair.identical and not pair.contradicts for pair in found.duplicates)
    assert all(pair.splits == ("train", "test") for pair in found.duplicates)
    assert min(pair.similarity for pair in found.duplicates) > THRESHOLD + 0.02
    assert max((pair.similarity for pair in found.closest), default=0) < THRESHOLD - 0.02
    assert found.leaks


def test_search_finds_what_comparing_all_pairs_finds():
    """Against every pair in every orientation, one after the other; blocks of 128 don't show."""
    random = np.random.default_rng(1)
    pictures = random.integers(0, 256, (300, SIDE, SIDE)).astype(np.uint8)
    for copy, (original, orientation) in enumerate([(7, 5), (140, 2), (299, 6), (8, 0), (130, 3)], start=200):
        mixed = turned(pictures[original], orientation) * 0.85 + pictures[copy] * 0.15
        pictures[copy] = mixed.astype(np.uint8)
    signature = signatures(pictures, COARSE)
    shared = signature.sum(axis=0) / (len(signature) + 20)
    centred = (signature - shared).reshape(len(signature), -1)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    least = 0.45
    expected = {}
    for first in range(len(pictures)):
        for orientation in range(ORIENTATIONS):
            seen = signatures(turned(pictures[first], orientation)[None], COARSE)[0] - shared
            cosines = centred @ seen.ravel() / np.linalg.norm(seen)
            for second in np.flatnonzero(cosines >= least):
                if second > first and cosines[second] > expected.get((first, second), (0, 0))[0]:
                    expected[first, int(second)] = (cosines[second], orientation)
    found = {
        (int(i), int(j)): int(orientation)
        for block in candidates(signature, least)
        for i, j, orientation in zip(*block, strict=True)
    }
    assert found == {pair: orientation for pair, (_, orientation) in expected.items()}
    assert len(found) > 20  # by chance, beside the five
    planted = [(7, 200), (140, 201), (202, 299), (8, 203), (130, 204)]
    assert sorted((pair.first, pair.second) for pair in near_pairs(pictures, 0.8)) == sorted(planted)


@pytest.mark.parametrize("orientation", range(ORIENTATIONS))
def test_turned_pixels_have_turned_signatures(orientation):
    picture = thumbnail(scene(3))
    assert np.allclose(
        signatures(turned(picture, orientation)[None], 24)[0],
        orientations(signatures(picture[None], 24)[0])[orientation],
        atol=1e-4,
    )


def test_plain_pictures_are_alike_to_nothing():
    pictures = np.stack([np.full((SIDE, SIDE), value, dtype=np.uint8) for value in (0, 100, 100, 255)])
    assert near_pairs(pictures) == []
    assert near_pairs(pictures[:0]) == []


def test_what_all_pictures_share_is_no_likeness():
    """The same bars on every picture, something else between them: no duplicates, but a copy still is one."""
    bars = np.where(np.arange(SIDE) % 16 < 8, 20, 200)[:, None]
    pictures = np.stack([bars * 0.6 + thumbnail(scene(number, SIDE, SIDE)) * 0.4 for number in range(400)]).astype(
        np.uint8
    )
    plain = signatures(pictures, 24).reshape(400, -1)
    assert np.median(plain @ plain.T) > 0.99  # what would be seen without looking at what they share
    pictures[50] = pictures[4][:, ::-1]
    assert [(pair.first, pair.second) for pair in near_pairs(pictures)] == [(4, 50)]


def test_many_alike_stay_bounded():
    pictures = np.repeat(thumbnail(scene(1))[None], 60, axis=0)
    steps = []
    found = near_pairs(pictures, advance=steps.append)
    assert sum(steps) == 60
    assert 59 <= len(found) <= 60 * 16  # not all 1,770 pairs
    assert {number for pair in found for number in pair[:2]} == set(range(60))


def test_everything_an_audit_tells(tmp_path):
    for number in range(4):
        scene(number).save(tmp_path / f"{number}.png")
    (tmp_path / "same.png").write_bytes((tmp_path / "0.png").read_bytes())
    scene(1).resize((120, 90)).save(tmp_path / "near.png")
    scene(9).resize((20, 40)).save(tmp_path / "tiny.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "3.png").read_bytes()[:2000])
    catalog = catalog_of(
        tmp_path,
        ("0.png", 0, "train", "a"),
        ("1.png", 0, "train", "b"),
        ("2.png", 1, "val", "a"),
        ("3.png", 1, "test", "c"),
        ("same.png", 1, "train", "d"),
        ("near.png", 0, "train", "b"),
        ("tiny.png", 1, "other", "e"),
        ("text.png", 1, "test", "f"),
        ("cut.png", 1, "test", "g"),
        ("gone.png", 1, "test", "h"),
    )
    steps: list[int] = []
    found = audit(catalog, advance=steps.append)
    assert sum(steps) == 2 * 10
    assert found.images == 10
    assert list(found.counts) == ["train", "val", "test", "other"]
    assert found.counts["train"] == {"cat": 3, "dog": 1}
    assert found.shared_groups == {"a": {"train": 1, "val": 1}}
    (same, near) = found.duplicates
    assert (same.first, same.second, same.identical, same.similarity) == ("0.png", "same.png", True, 1.0)
    assert (near.first, near.second, near.identical, near.same_group) == ("1.png", "near.png", False, True)
    assert found.across == ()
    assert found.contradictions == (same,)
    assert found.small == {"tiny.png": (20, 40)}
    assert list(found.unreadable) == ["text.png", "cut.png", "gone.png"]
    assert (found.unreadable["text.png"], found.unreadable["gone.png"]) == ("not an image", "missing")
    assert found.leaks  # the group
    assert json.loads(json.dumps(found.to_dict()))["duplicates"][0]["splits"] == ["train", "train"]


def test_copies_in_three_splits_are_told_and_compared_once(tmp_path):
    scene(0).save(tmp_path / "a.png")
    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    found = audit(catalog_of(tmp_path, ("a.png", 0, "train"), ("b.png", 0, "val"), ("c.png", 0, "test")))
    assert [(pair.first, pair.second, pair.identical) for pair in found.across] == [
        ("a.png", "b.png", True),
        ("a.png", "c.png", True),
    ]


def test_a_flood_of_near_duplicates_is_doubted():
    def of(pairs: int) -> Audit:
        from protopush.data.audit import Pair

        one = Pair("a", "b", ("train", "test"), ("x", "x"), same_group=False, identical=False, similarity=0.95)
        return Audit(counts={"train": {"x": 1000}}, duplicates=(one,) * pairs)

    assert not of(20).alike_by_nature
    assert of(21).alike_by_nature


def audited(capsys, *words: object) -> tuple[int, dict]:
    capsys.readouterr()
    code = main(["data", "audit", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_command_tells_groups_that_training_refuses(tmp_path, capsys):
    folder = make_images(tmp_path / "images", ["cat", "dog"], 3)
    rows = ["image,label,split,group"]
    rows += [f"images/{k}/{i:03d}.png,{k},{s},{k}{i % 2}" for k in ("cat", "dog") for i, s in enumerate(
        ("train", "train", "test"))]  # fmt: skip
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(InputError, match="2 groups lie in several splits"):
        load_catalog(str(tmp_path / "m.csv"))
    code, found = audited(capsys, tmp_path / "m.csv")
    assert code == 1
    assert found["shared_groups"] == {"cat0": {"train": 1, "test": 1}, "dog0": {"train": 1, "test": 1}}
    assert main(["data", "audit", str(tmp_path / "m.csv")]) == 1
    text = capsys.readouterr().out
    assert "cat0 (train, test), dog0 (train, test)" in text
    assert text.rstrip().endswith("Leaks: what is in one split is in another.")
    assert audited(capsys, folder)[0] == 0  # a folder of class folders; its noise is alike to nothing


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "no such file: nowhere"),
    (["nowhere", "--threshold", "95"], "the threshold is 95.0; expected a similarity between 0.5 and 1"),
    (["--data.source", "elvp"], "unknown data source 'elvp'; expected one of: auto, folder"),
    ([], "no data given"),
    (["nowhere", "--treshold", "1"], "unknown key 'treshold'; did you mean 'threshold'?"),
])  # fmt: skip
def test_command_refuses_in_one_line(capsys, words, message):
    assert main(["data", "audit", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert main(["data"]) == 2


def test_real_dermoscopy_images_have_no_alarm_but_for_what_is_planted(ham, tmp_path, capsys):
    with (ham / "manifest.csv").open(newline="") as file:
        every = [row | {"image": str(ham / row["image"])} for row in csv.DictReader(file)]
    # The two nearest pairs of the whole set (hairs tell that the second shows one lesion twice), and 300 others.
    nearest = ("ISIC_0027198", "ISIC_0032082", "ISIC_0027636", "ISIC_0027994")
    rows = [row for index, row in enumerate(every) if index % 20 == 0 or Path(row["image"]).stem in nearest]
    train = [row for row in rows if row["split"] == "train"]

    def write(*more: dict[str, str]) -> Path:
        with (tmp_path / "m.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ("image", "label", "split", "group"), extrasaction="ignore")
            writer.writeheader()
            writer.writerows([*rows, *more])
        return tmp_path / "m.csv"

    code, found = audited(capsys, write())
    assert (code, found["images"], found["duplicates"]) == (0, len(rows), [])
    assert len(found["closest"]) >= 1
    (tmp_path / "copy.jpg").write_bytes(Path(train[10]["image"]).read_bytes())
    turned_over = read_image(train[20]["image"]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned_over.save(tmp_path / "flipped.jpg", quality=50)
    planted = [
        {"image": name, "label": row["label"], "split": "test", "group": name}
        for name, row in (("copy.jpg", train[10]), ("flipped.jpg", train[20]))
    ]
    code, found = audited(capsys, write(*planted))
    assert code == 1
    told = [({Path(pair["first"]).name, Path(pair["second"]).name}, pair["identical"]) for pair in found["duplicates"]]
    assert told == [
        ({"copy.jpg", Path(train[10]["image"]).name}, True),
        ({"flipped.jpg", Path(train[20]["image"]).name}, False),
    ]
    assert all(sorted(pair["splits"]) == ["test", "train"] for pair in found["duplicates"])
