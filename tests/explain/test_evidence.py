"""Maps lie where the pixels were, regions hold what they promise, neighbours are the nearest."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import nn
from torch.nn import functional as F

from helpers import cell_box, save_turned
from protopush.backbones.create import Features
from protopush.backbones.windows import Windows
from protopush.data.dataset import ImageDataset
from protopush.data.features import cache_features
from protopush.data.images import sha256_of
from protopush.data.manifest import Sample
from protopush.data.regions import Regions
from protopush.data.transforms import EvalTransform, Preprocessing, View
from protopush.errors import InputError
from protopush.explain import explain_batch, explain_image
from protopush.explain.checked_region import checked_regions
from protopush.explain.figure_style import upsampled
from protopush.explain.neighbours import find_neighbours
from protopush.models.model import ProtoModel
from protopush.nn.head import HeadOptimal
from protopush.nn.prototypes import Anchor
from test_explain import GRID, MARKED, NAMES, TRANSFORM, bright_match, brightness_model, marked_picture

# Maps.


def by_hand(similarities, view, size):
    """Bilinear, pixel by pixel."""
    rows, columns = len(similarities), len(similarities[0])
    width, height = size
    found = np.full((height, width), np.nan)
    for y in range(height):
        for x in range(width):
            seen_x = (x + 0.5) * view.resized[0] / width - view.offset[0]
            seen_y = (y + 0.5) * view.resized[1] / height - view.offset[1]
            if not (0 <= seen_x <= view.crop[0] and 0 <= seen_y <= view.crop[1]):
                continue
            u = min(max(seen_x * columns / view.crop[0] - 0.5, 0), columns - 1)
            v = min(max(seen_y * rows / view.crop[1] - 0.5, 0), rows - 1)
            i, j = min(int(v), max(rows - 2, 0)), min(int(u), max(columns - 2, 0))
            a, b = v - i, u - j
            below, right = min(i + 1, rows - 1), min(j + 1, columns - 1)
            found[y, x] = (1 - a) * ((1 - b) * similarities[i][j] + b * similarities[i][right]) + a * (
                (1 - b) * similarities[below][j] + b * similarities[below][right]
            )
    return found


@pytest.mark.parametrize("seed", range(12))
def test_maps_are_those_made_pixel_by_pixel(seed):
    generator = np.random.default_rng(seed)
    grid = generator.integers(1, 6, 2)
    original = tuple(int(side) for side in generator.integers(3, 60, 2))
    view = View.of(original, (20, 30), crop_pct=float(generator.choice([1.0, 0.875])))
    similarities = generator.normal(size=grid).tolist()
    size = original if seed % 2 else (max(1, original[0] // 2), max(1, original[1] // 2))
    found = upsampled(similarities, view, size)
    assert found.shape == (size[1], size[0])
    np.testing.assert_allclose(found, by_hand(similarities, view, size), atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_windows_have_the_largest_value_over_each_pixel_and_the_peak_fills_its_box(seed):
    generator = np.random.default_rng(seed)
    original = tuple(int(side) for side in generator.integers(60, 200, 2))
    height, width = (int(side) for side in generator.integers(30, 60, 2))
    view = View.of(original, (height, width), crop_pct=float(generator.choice([1.0, 0.875])))
    sides = generator.integers(8, 30, 2).tolist()
    regions = Windows.of({"size": sides, "stride": [max(1, side // 2) for side in sides]}).regions((height, width))
    values = torch.from_numpy(generator.normal(size=len(regions)))
    found = upsampled(regions.map(values).tolist(), view, even=True)
    x, y = (
        (np.arange(side) + 0.5) * view.resized[axis] / side - view.offset[axis] for axis, side in enumerate(original)
    )
    expected = np.full(original[::-1], -np.inf)
    for (x0, y0, x1, y1), value in zip(regions.boxes, values.tolist(), strict=True):
        inside = np.outer((y >= y0) & (y < y1), (x >= x0) & (x < x1))
        expected[inside] = np.maximum(expected[inside], value)
    seen = np.isfinite(found)
    np.testing.assert_allclose(found[seen], expected[seen], atol=1e-6)
    x0, y0, x1, y1 = view.original_box(regions.boxes[int(values.argmax())])
    peak = found == np.float32(values.max())
    assert peak[y0:y1, x0:x1].all()  # boxes and maps lie over each other
    peak[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False  # an edge in the middle of a pixel
    assert not peak.any()


def test_the_peak_of_a_map_lies_in_the_box_of_a_wide_picture(tmp_path):
    marked_picture().save(tmp_path / "marked.png")
    explanation = explain_image(brightness_model(), tmp_path / "marked.png", TRANSFORM, NAMES)
    match = bright_match(explanation)
    assert explanation.seen == (100, 0, 200, 100)
    assert max(value for row in match.map for value in row) == match.similarity
    assert match.map[2][1] == match.similarity
    over = upsampled(match.map, explanation.view)
    assert over.shape == (100, 300)
    assert np.isnan(over[:, :100]).all()
    assert np.isnan(over[:, 200:]).all()
    assert np.isfinite(over[:, 100:200]).all()
    y, x = np.unravel_index(np.nanargmax(over), over.shape)
    assert MARKED[0] <= x < MARKED[2]
    assert MARKED[1] <= y < MARKED[3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_has_the_map_of_the_upright_one(tmp_path, orientation):
    marked_picture().save(tmp_path / "upright.png")
    save_turned(marked_picture(), tmp_path / "turned.png", orientation)
    found, expected = (
        explain_image(brightness_model(), tmp_path / name, TRANSFORM, NAMES) for name in ("turned.png", "upright.png")
    )
    assert found.classes == expected.classes
    assert found.view == expected.view


# Explanations in batches, and of classes that were asked for.


def test_a_batch_is_explained_as_its_pictures_one_by_one(tmp_path):
    model, paths = brightness_model(), []
    for i, size in enumerate([(300, 100), (100, 300), (64, 64)]):
        picture = Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    pictures = [Image.open(path) for path in paths]
    together = explain_batch(
        model,
        torch.stack([TRANSFORM(picture) for picture in pictures]),
        [TRANSFORM.view(picture.size) for picture in pictures],
        [str(path) for path in paths],
        NAMES,
    )
    alone = [explain_image(model, path, TRANSFORM, NAMES) for path in paths]
    for one, other in zip(together, alone, strict=True):
        assert (one.file, one.view, one.predicted) == (other.file, other.view, other.predicted)
        for some, same in zip(one.classes, other.classes, strict=True):
            assert some.logit == pytest.approx(same.logit, abs=1e-5)
            assert [m.prototype for m in some.matches] == [m.prototype for m in same.matches]
            np.testing.assert_allclose([m.map for m in some.matches], [m.map for m in same.matches], atol=1e-5)


def test_why_not_adds_up(tmp_path):
    marked_picture().save(tmp_path / "marked.png")
    explanation = explain_image(
        brightness_model(), tmp_path / "marked.png", TRANSFORM, NAMES, top_classes=1, also=["dark", "bright"]
    )
    assert len(explanation.classes) == 2
    (other,) = {"dark", "bright"} - {explanation.predicted_name}
    why = explanation.why_not(other)
    said, against = why.said, why.other
    assert said.class_name == explanation.predicted_name
    assert against.class_name == other
    terms = [m.contribution for m in said.matches] + [-m.contribution for m in against.matches] + [why.bias]
    assert why.difference == pytest.approx(math.fsum(terms), abs=1e-5)
    assert why.to_dict()["times_as_probable"] == pytest.approx(said.probability / against.probability, rel=1e-5)
    assert json.loads(json.dumps(why.to_dict())) == why.to_dict()
    with pytest.raises(InputError, match=rf"why not '{explanation.predicted_name}'\? It is the predicted class"):
        explanation.why_not(explanation.predicted_name)
    with pytest.raises(InputError, match="unknown class 'blue'; expected one of: dark, bright"):
        explain_image(brightness_model(), tmp_path / "marked.png", TRANSFORM, NAMES, also=["blue"])
    few = explain_image(brightness_model(), tmp_path / "marked.png", TRANSFORM, NAMES, top_classes=1)
    with pytest.raises(InputError, match=r"no evidence for class .*expected one of"):
        few.why_not(other)


# Regions.

SQUARE = EvalTransform(Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), size=(64, 64), interpolation="bilinear"))


class Elsewhere(nn.Module):
    """Each of 2x2 cells tells (how red the picture's upper left sixteenth is, 1): evidence far from most cells."""

    channels = 2

    def forward(self, images):
        red = images[:, 0, :16, :16].mean(dim=(1, 2)).view(-1, 1, 1).expand(-1, 4, 1)
        order = torch.tensor([0.0, 0.0, 0.0, 1e-3]).view(1, 4, 1)  # the peak is in the lower right
        patches = torch.cat([red + order, torch.full_like(red, 0.2)], dim=-1)
        return Features(patches.mean(1, keepdim=True), patches, Regions.grid((2, 2), tuple(images.shape[2:])))


def elsewhere_model():
    head = HeadOptimal(2, 2, 1, embed_dim=2)
    head.proj = nn.Identity()
    with torch.no_grad():
        head.proto_manager.prototypes.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    return ProtoModel(Elsewhere(), head).eval()


def test_the_region_is_where_the_evidence_is_not_where_the_box_is(tmp_path):
    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 0, 0), (0, 0, 16, 16))
    picture.save(tmp_path / "red.png")
    model = elsewhere_model()
    explanation = explain_image(model, tmp_path / "red.png", SQUARE, ["red", "other"])
    match = explanation.of("red").matches[0]
    assert match.box == (32, 32, 64, 64)
    (region,) = checked_regions(model, picture, SQUARE, [match], blocks=4, drop=0.5)
    assert region.reached
    assert region.boxes == [(0, 0, 16, 16)]
    assert region.share == 1 / 16
    assert region.in_box == 0.0
    assert region.similarity == pytest.approx(match.similarity, abs=1e-6)
    target = region.similarity - 0.5 * (region.similarity - region.blurred)
    assert region.hidden <= target
    assert json.loads(json.dumps(region.to_dict())) == region.to_dict()


@pytest.mark.parametrize("seed", range(4))
def test_no_block_of_a_region_can_be_spared(seed):
    """Every claim of a region is checked with a forward pass made by hand."""
    torch.manual_seed(seed)
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 9, stride=4, padding=4), nn.ReLU(), nn.Conv2d(6, 6, 5, stride=4, padding=2)
    )

    class Net(nn.Module):
        channels = 6

        def forward(self, images):
            maps = backbone(images)
            patches = maps.flatten(2).transpose(1, 2)
            return Features(
                patches.mean(1, keepdim=True), patches, Regions.grid(tuple(maps.shape[2:]), tuple(images.shape[2:]))
            )

    model = ProtoModel(Net(), HeadOptimal(6, 2, 2, embed_dim=4)).eval()
    pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    (explanation,) = explain_batch(model, SQUARE(picture)[None], [SQUARE.view((64, 64))], ["x"], ["a", "b"])
    matches = explanation.classes[0].matches
    regions = checked_regions(model, picture, SQUARE, matches, blocks=4, drop=0.6, batch_size=5)

    def similarity(boxes, match):
        shown = SQUARE(picture)
        soft = SQUARE(picture.filter(ImageFilter.GaussianBlur(6.4)))
        for x0, y0, x1, y1 in boxes:
            shown[:, y0:y1, x0:x1] = soft[:, y0:y1, x0:x1]
        with torch.no_grad():
            return float(model(shown[None]).similarities[0, match.class_index, match.prototype])

    for region, match in zip(regions, matches, strict=True):
        assert region.blurred == pytest.approx(similarity([(0, 0, 64, 64)], match), abs=1e-5)
        if region.blurred >= region.similarity:
            assert not region.reached
            assert region.boxes == []
            continue
        target = region.similarity - 0.6 * (region.similarity - region.blurred)
        assert region.reached
        assert similarity(region.boxes, match) == pytest.approx(region.hidden, abs=1e-5)
        assert region.hidden <= target + 1e-6
        for box in region.boxes:
            fewer = [other for other in region.boxes if other != box]
            assert similarity(fewer, match) > target - 1e-6


def test_a_blank_picture_has_no_region(tmp_path):
    picture = Image.new("RGB", (64, 64), (9, 9, 9))
    picture.save(tmp_path / "blank.png")
    model = elsewhere_model()
    match = explain_image(model, tmp_path / "blank.png", SQUARE, ["red", "other"]).of("red").matches[0]
    (region,) = checked_regions(model, picture, SQUARE, [match], blocks=2)
    assert (region.reached, region.boxes, region.share, region.in_box) == (False, [], 0.0, None)
    for wrong in ({"blocks": 0}, {"drop": 0.0}, {"drop": 1.5}):
        with pytest.raises(InputError, match="expected at least 1 block, and a drop in"):
            checked_regions(model, picture, SQUARE, [match], **wrong)


# Neighbours.


def some_images(folder, count):
    samples = []
    for i in range(count):
        pixels = np.random.default_rng(i // 2).integers(0, 255, (30, 40, 3), dtype=np.uint8)  # pairs are equal: ties
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        samples.append(Sample(folder / f"{i:02d}.png", f"{i:02d}.png", i % 2, "train"))
    return samples


@pytest.mark.parametrize(("count", "top_patches"), [(1, 1), (2, 1), (25, 1), (25, 3)])
def test_neighbours_are_those_of_a_full_search(tmp_path, count, top_patches):
    model = brightness_model(top_patches=top_patches).eval()
    dataset = ImageDataset(some_images(tmp_path, count), TRANSFORM)
    manager = model.head.proto_manager
    with torch.no_grad():
        model.push_prototypes([(dataset[i][0][None], torch.tensor([dataset[i][1]])) for i in range(count)], "cpu")
    manager.anchors[0] = Anchor("00.png", 3, GRID, 0.5, 1.0, file="00.png")
    found = find_neighbours(model, dataset, own=3, others=2)
    with torch.no_grad():
        outputs = [model(dataset[i][0][None]) for i in range(count)]
    for c in range(2):
        for k in range(3):
            if not manager.mask()[c, k]:
                assert found[c][k] is None
                continue
            rows = [(-float(out.maps[0, c, k].max()), i, int(out.cells[0, c, k])) for i, out in enumerate(outputs)]
            own = sorted(row for row in rows if row[1] % 2 == c and not (c == k == 0 and row[1] == 0))[:3]
            others = sorted(row for row in rows if row[1] % 2 != c)[:2]
            for names, expected in ((found[c][k].own, own), (found[c][k].others, others)):
                assert [(n.sample, n.cell) for n in names] == [(i, cell) for _, i, cell in expected]
                for neighbour, (similarity, i, cell) in zip(names, expected, strict=True):
                    assert neighbour.similarity == pytest.approx(-similarity, abs=1e-5)
                    assert (neighbour.name, neighbour.class_index) == (f"{i:02d}.png", i % 2)
                    assert neighbour.box == cell_box(TRANSFORM.view((40, 30)), cell, GRID)


def similarities_of(found):
    return [n.similarity for row in found for some in row if some for n in some.own + some.others]


def test_neighbours_come_from_the_features_that_training_left(tmp_path, monkeypatch):
    """The same images without a forward pass; changed files have no stored features."""
    monkeypatch.setenv("PROTOPUSH_CACHE", str(tmp_path / "cache"))
    model = brightness_model().eval()
    dataset = ImageDataset(some_images(tmp_path, 12), TRANSFORM)
    with torch.no_grad():
        model.push_prototypes([(dataset[i][0][None], torch.tensor([dataset[i][1]])) for i in range(12)], "cpu")
    computed = find_neighbours(model, dataset)
    cache_features(model.backbone, dataset, [sha256_of(sample.image) for sample in dataset.samples])
    calls: list[object] = []
    model.backbone.register_forward_hook(lambda *given: calls.append(given))
    stored = find_neighbours(model, dataset)
    assert not calls
    assert [[some is None for some in row] for row in stored] == [[some is None for some in row] for row in computed]
    assert similarities_of(stored) == pytest.approx(similarities_of(computed), abs=2e-3)
    Image.new("RGB", (40, 30)).save(dataset.samples[3].image)
    find_neighbours(model, dataset)
    assert calls


def test_maps_of_the_head_are_what_its_similarities_are_made_of():
    model = brightness_model().eval()
    with torch.no_grad():
        out = model(torch.rand(5, 3, 200, 200))
    every = torch.einsum("bld,ckd->bckl", out.embeddings, F.normalize(out.prototypes, dim=-1))
    torch.testing.assert_close(out.maps, every)
    torch.testing.assert_close(out.maps.max(dim=-1).values, out.similarities)
