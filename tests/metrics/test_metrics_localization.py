"""Localisation against slow loops, and on drawn images, where the best, the worst and the chance value are known."""

import numpy as np
import pytest
import torch

from protopush.data.regions import Regions
from protopush.errors import InputError
from protopush.metrics.localization import (
    activation_share,
    box_share,
    cell_shares,
    consistency,
    outside_inside_ratio,
    parts_in_boxes,
    peak_boxes,
    pointing_game,
    purity,
    stability,
)
from protopush.testing import PARTS, PARTS_EACH, ProceduralParts

# Against loops.


def slow_shares(mask, grid):
    """Each pixel is cut into as many pieces as make both grids whole."""
    height, width = mask.shape
    fine = np.kron(mask, np.ones((grid[0], grid[1])))  # (H * h, W * w)
    return fine.reshape(grid[0], height, grid[1], width).mean(axis=(1, 3))


def peaks(maps, masks):
    """The box of the largest cell of each map, in pixels of the masks."""
    boxes = torch.tensor(Regions.grid(tuple(maps.shape[1:]), tuple(masks.shape[1:])).boxes)
    return boxes[maps.flatten(1).argmax(dim=1)]


def random_case(seed):
    random = np.random.default_rng(seed)
    grid, size = random.integers(1, 6, 2), random.integers(1, 13, 2)
    maps = random.normal(size=(4, *grid)).round(1)  # ties
    return maps, (random.random((4, *size)) < random.random()).astype(float)


@pytest.mark.parametrize("seed", range(25))
def test_localisation_is_that_of_loops(seed):
    maps, masks = random_case(seed)
    found = {
        function.__name__: function(torch.tensor(maps), torch.tensor(masks)).numpy()
        for function in (activation_share, outside_inside_ratio)
    }
    hits = pointing_game(peaks(torch.tensor(maps), masks), torch.tensor(masks))
    every = cell_shares(torch.tensor(masks), maps.shape[1:])
    for i, (values, mask) in enumerate(zip(maps, masks, strict=True)):
        shares = slow_shares(mask, values.shape)
        np.testing.assert_allclose(every[i], shares, atol=1e-12)
        on = off = weight_on = weight_off = 0.0
        best, peak = -np.inf, (0, 0)
        for row in range(values.shape[0]):
            for column in range(values.shape[1]):
                value = max(values[row, column], 0)
                on += value * shares[row, column]
                off += value * (1 - shares[row, column])
                weight_on += shares[row, column]
                weight_off += 1 - shares[row, column]
                if values[row, column] > best:
                    best, peak = values[row, column], (row, column)
        y, x = (
            int((at + 0.5) * pixels / cells) for at, pixels, cells in zip(peak, mask.shape, values.shape, strict=True)
        )
        with np.errstate(all="ignore"):
            expected = np.float64(on) / (on + off)
            ratio = (np.float64(off) / weight_off) / (np.float64(on) / weight_on)
        assert hits[i] == mask[y, x]
        np.testing.assert_allclose(found["activation_share"][i], expected, atol=1e-9)
        if weight_on > 1e-9 and weight_off > 1e-9:
            np.testing.assert_allclose(found["outside_inside_ratio"][i], ratio, atol=1e-9)


def test_what_is_undefined_is_nan():
    zero, some = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    empty, half = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    half[:, :2] = 1
    assert activation_share(-some, half).isnan().all()
    assert outside_inside_ratio(some, empty).isnan().all()
    assert outside_inside_ratio(some, torch.ones(1, 4, 4)).isnan().all()
    assert outside_inside_ratio(zero, half).isnan().all()
    assert pointing_game(torch.full((1, 4), torch.nan), half).isnan().all()
    below = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert outside_inside_ratio(below, half).isinf().all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(InputError, match="2 maps and 1 masks; expected one mask for each"):
        activation_share(torch.ones(2, 2, 2), torch.ones(1, 4, 4))
    with pytest.raises(InputError, match="for 3 masks; expected a box for each"):
        pointing_game(torch.ones(1, 4), torch.ones(3, 4, 4))
    with pytest.raises(InputError, match=r"expected \(N, h, w\)"):
        outside_inside_ratio(torch.ones(2, 2), torch.ones(2, 4, 4))
    for box in ([0, 0, 0, 4], [0, 0, 5, 4], [-1, 0, 2, 2]):
        with pytest.raises(InputError, match="expected a box within the image"):
            box_share(torch.tensor([box]), [torch.ones(4, 4)])


@pytest.mark.parametrize("seed", range(10))
def test_parts_are_those_of_loops(seed):
    random = np.random.default_rng(seed)
    n, p, k, classes = random.integers(1, 8), random.integers(1, 5), random.integers(1, 4), 3
    maps = torch.tensor(random.normal(size=(n, p, 3, 4)).round(1))
    boxes = peak_boxes(maps, (30, 40), 14)
    points, visible = torch.tensor(random.uniform(0, 40, (n, k, 2))), torch.tensor(random.random((n, k)) < 0.7)
    inside = parts_in_boxes(boxes, points, visible)
    labels, owners = torch.tensor(random.integers(0, classes, n)), torch.tensor(random.integers(0, classes, p))
    other = parts_in_boxes(boxes + 3, points, visible)
    similarities = torch.tensor(random.normal(size=(n, p)).round(1))
    found = consistency(inside, visible, owners, labels, 0.5)
    steady, pure = stability(inside, other, owners, labels), purity(inside, similarities, top=3)
    for j in range(p):
        best, same, own = -1.0, [], [i for i in range(n) if labels[i] == owners[j]]
        for i in range(n):
            row, column = divmod(int(maps[i, j].argmax()), 4)
            x, y = column * 10 + 5, row * 10 + 5
            assert boxes[i, j].tolist() == [max(x - 7, 0), max(y - 7, 0), min(x + 7, 40), min(y + 7, 30)]
            for part in range(k):
                px, py = points[i, part].tolist()
                x0, y0, x1, y1 = boxes[i, j].tolist()
                assert bool(inside[i, j, part]) == (x0 <= px < x1 and y0 <= py < y1 and bool(visible[i, part]))
        for part in range(k):
            shown = [i for i in own if visible[i, part]]
            if shown:
                best = max(best, sum(bool(inside[i, j, part]) for i in shown) / len(shown))
        assert found[j].isnan() if best < 0 else found[j] == (best >= 0.5)
        same = [all(inside[i, j, part] == other[i, j, part] for part in range(k)) for i in own]
        assert steady[j].isnan() if not own else float(steady[j]) == pytest.approx(sum(same) / len(same))
        top = sorted(range(n), key=lambda i, j=j: (-float(similarities[i, j]), i))[:3]
        assert float(pure[j]) == pytest.approx(
            max(sum(bool(inside[i, j, q]) for i in top) / len(top) for q in range(k))
        )


# On drawn images.

GRID = (8, 8)


@pytest.fixture(scope="module")
def drawn():
    data = ProceduralParts(60, num_classes=3, size=(64, 64), seed=1)
    masks = torch.stack([data.mask(i) for i in range(len(data))])
    points, visible = (torch.stack(some) for some in zip(*(data.keypoints(i) for i in range(len(data))), strict=True))
    return data, masks, points, visible


def test_maps_at_their_best_worst_and_by_chance(drawn):
    _, masks, _, _ = drawn
    shares = cell_shares(masks, GRID)
    whole = (shares == 1).double()  # only cells that lie wholly on the spot
    beside = (shares == 0).double()
    area = masks.double().mean(dim=(1, 2))
    assert (activation_share(whole, masks) == 1).all()
    assert (activation_share(beside, masks) == 0).all()
    torch.testing.assert_close(activation_share(torch.ones(60, *GRID), masks), area)
    assert (pointing_game(peaks(whole, masks), masks) == 1).all()
    assert (pointing_game(peaks(beside, masks), masks) == 0).all()
    assert (outside_inside_ratio(whole, masks) == 0).all()
    assert outside_inside_ratio(beside, masks).isinf().all()
    torch.testing.assert_close(outside_inside_ratio(torch.ones(60, *GRID), masks), torch.ones(60).double())
    generator = torch.Generator().manual_seed(0)
    drawn_maps = [torch.rand(60, *GRID, generator=generator) for _ in range(200)]
    at_random = torch.stack([pointing_game(peaks(maps, masks), masks) for maps in drawn_maps])
    # a random peak is one of the 64 cells' middles
    assert float(at_random.mean()) == pytest.approx(float(area.mean()), abs=0.02)


def test_anchors_at_their_best_worst_and_by_chance(drawn):
    _, masks, points, visible = drawn
    first = visible.double().argmax(dim=1)
    middle = points[torch.arange(60), first].round().long()
    on = torch.cat([middle - 2, middle + 2], dim=1)
    assert (box_share(on, list(masks)) == 1).all()
    corner = torch.tensor([[60, 60, 64, 64]]).expand(60, 4)
    assert (box_share(corner, list(masks)) == 0).all()
    whole = torch.tensor([[0, 0, 64, 64]]).expand(60, 4)
    torch.testing.assert_close(box_share(whole, list(masks)), masks.double().mean(dim=(1, 2)))


def test_parts_at_their_best_worst_and_by_chance(drawn):
    data, _, points, visible = drawn
    labels = torch.tensor(data.labels)
    owners = torch.arange(3).repeat_interleave(PARTS_EACH)  # a prototype for each part of each class
    part = torch.tensor([(c + place) % len(PARTS) for c in range(3) for place in range(PARTS_EACH)])
    middle = points[:, part]
    found = parts_in_boxes(torch.cat([middle - 3, middle + 3], dim=-1), points, visible)
    assert (consistency(found, visible, owners, labels) == 1).all()
    assert (stability(found, found, owners, labels) == 1).all()
    shows = visible[:, part].double()
    assert (purity(found, shows, top=10) == 1).all()
    corner = torch.tensor([60.0, 60.0, 64.0, 64.0]).expand(60, 9, 4)
    nothing = parts_in_boxes(corner, points, visible)
    assert (consistency(nothing, visible, owners, labels) == 0).all()
    assert (stability(found, nothing, owners, labels) == 0).all()
    assert (purity(nothing, shows, top=10) == 0).all()
    # boxes anywhere: a part is in one as often as the box is large
    generator = torch.Generator().manual_seed(0)
    start = torch.rand(60, 2000, 2, generator=generator) * (64 + 16) - 16
    anywhere = parts_in_boxes(torch.cat([start, start + 16], dim=-1), points, visible)
    chance = float(anywhere.sum() / visible.sum() / 2000)
    assert chance == pytest.approx(16 * 16 / 80 / 80, abs=0.003)


def test_drawn_images_are_what_they_say():
    data = ProceduralParts(24, num_classes=6, size=(96, 128), seed=3)
    longer = ProceduralParts(40, num_classes=6, size=(96, 128), seed=3)
    for i in range(24):
        image, label, index = data[i]
        assert (image.shape, label, index) == ((3, 96, 128), i % 6, i)
        assert torch.equal(image, longer[i][0])
        points, visible = data.keypoints(i)
        assert visible.nonzero().flatten().tolist() == sorted((label + place) % 6 for place in range(3))
        mask = data.mask(i)
        for number in visible.nonzero().flatten().tolist():
            x, y = (int(value) for value in points[number])
            assert mask[y, x]
            colour = torch.tensor(list(PARTS.values())[number][1]) / 255
            around = image[:, max(y - 7, 0) : y + 8, max(x - 7, 0) : x + 8].flatten(1)
            assert float((around - colour.unsqueeze(1)).abs().sum(dim=0).min()) < 0.02, "the part isn't there"
    assert not torch.equal(data[0][0], ProceduralParts(24, 6, (96, 128), seed=4)[0][0])
    assert data.describe(5).view.original == (128, 96)
    with pytest.raises(IndexError):
        data[24]
    for wrong in ({"num_samples": 0}, {"num_samples": 3, "num_classes": 7}, {"num_samples": 3, "size": (31, 64)}):
        with pytest.raises(InputError, match="expected at least one sample"):
            ProceduralParts(**wrong)
