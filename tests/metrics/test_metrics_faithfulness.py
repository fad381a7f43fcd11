"""Faithfulness of maps of models whose inside is known: what they look at, and what they don't."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms.functional import gaussian_blur

from protopush.errors import InputError
from protopush.metrics.faithfulness import (
    area_under,
    blur,
    deletion_curve,
    insertion_curve,
    location_misalignment,
    relevance_ordering,
)
from protopush.testing import ProceduralParts


def weighted(weights):
    """A score that is the weighted sum of an image's pixels."""
    return lambda images, places: (images.mean(1) * weights[places]).sum(dim=(1, 2))


def slow_curves(score, images, relevance, steps, hidden):
    """Cell by cell and pixel by pixel."""
    n, rows, columns = relevance.shape
    height, width = images.shape[2:]
    shown, deleted = np.zeros((n, steps + 1)), np.zeros((n, steps + 1))
    for i in range(n):
        order = sorted(range(rows * columns), key=lambda cell: (-float(relevance[i].flatten()[cell]), cell))
        for step in range(steps + 1):
            chosen = set(order[: round(step * rows * columns / steps)])
            inserted, removed = hidden[i].clone(), images[i].clone()
            for y in range(height):
                for x in range(width):
                    cell = int((y + 0.5) * rows / height) * columns + int((x + 0.5) * columns / width)
                    if cell in chosen:
                        inserted[:, y, x] = images[i, :, y, x]
                        removed[:, y, x] = hidden[i, :, y, x]
            at = torch.tensor([i])
            shown[i, step], deleted[i, step] = float(score(inserted[None], at)), float(score(removed[None], at))
    return shown, deleted


@pytest.mark.parametrize("seed", range(8))
def test_curves_are_those_of_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    n, height, width = 3, 5 + seed % 4, 6
    images, hidden = (torch.rand(n, 3, height, width, generator=generator) for _ in range(2))
    relevance = torch.randint(0, 4, (n, 2, 3), generator=generator).double()  # ties
    score = weighted(torch.rand(n, height, width, generator=generator))
    steps = 1 + seed
    shown, deleted = slow_curves(score, images, relevance, steps, hidden)
    np.testing.assert_allclose(insertion_curve(score, images, relevance, steps, hidden), shown, atol=1e-5)
    np.testing.assert_allclose(deletion_curve(score, images, relevance, steps, hidden), deleted, atol=1e-5)
    by_hand = [sum((row[i] + row[i + 1]) / 2 for i in range(steps)) / steps for row in shown]
    np.testing.assert_allclose(area_under(torch.tensor(shown)), by_hand)


def test_bad_input_is_named():
    images, score = torch.zeros(2, 3, 4, 4), weighted(torch.ones(2, 4, 4))
    with pytest.raises(InputError, match="2 images, relevance of shape"):
        insertion_curve(score, images, torch.zeros(1, 2, 2))
    with pytest.raises(InputError, match="NaN or infinite"):
        deletion_curve(score, images, torch.full((2, 2, 2), math.nan))
    with pytest.raises(InputError, match="at least one step"):
        relevance_ordering(score, images, torch.zeros(2, 2, 2), steps=0)
    for wrong in ({"epsilon": 0.0}, {"epsilon": 1.0, "steps": 0}):
        with pytest.raises(InputError, match="expected a box for each image"):
            location_misalignment(lambda images, places: images[:, 0], images, torch.zeros(2, 4), **wrong)


# On drawn images: the score is how much of one cell of 8x8 can be seen, so that the truth is one cell of 64.

GRID = (8, 8)


@pytest.fixture(scope="module")
def drawn():
    data = ProceduralParts(24, num_classes=3, size=(64, 64), seed=2)
    images = torch.stack([data[i][0] for i in range(24)])
    points, visible = (torch.stack(some) for some in zip(*(data.keypoints(i) for i in range(24)), strict=True))
    part = points[torch.arange(24), visible.double().argmax(dim=1)]
    cell = (part[:, 1] // 8 * 8 + part[:, 0] // 8).long()
    truth = torch.zeros(24, 64).scatter_(1, cell.unsqueeze(1), 1.0).view(24, *GRID)
    pixels = truth.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)

    def seen(some, places):
        """The share of the part's cell that is as in the image."""
        same = (some == images[places]).all(dim=1) * pixels[places]
        return same.sum(dim=(1, 2)) / 64

    return images, truth, seen


def test_the_true_map_is_the_best_and_its_opposite_the_worst(drawn):
    images, truth, seen = drawn
    black = torch.full_like(images, -1.0)
    steps = 64
    best, worst = (area_under(insertion_curve(seen, images, sign * truth, steps, black)) for sign in (1, -1))
    torch.testing.assert_close(best, torch.full((24,), 1 - 0.5 / 64))  # all of it after the first of 64 cells
    torch.testing.assert_close(worst, torch.full((24,), 0.5 / 64))
    gone, kept = (area_under(deletion_curve(seen, images, sign * truth, steps, black)) for sign in (1, -1))
    torch.testing.assert_close(gone, worst)
    torch.testing.assert_close(kept, best)


def test_ordering_is_zero_by_chance(drawn):
    images, truth, seen = drawn
    black = torch.full_like(images, -1.0)
    found, chance = relevance_ordering(seen, images, truth, 16, random_orders=30, baseline=black)
    assert float(chance.mean()) == pytest.approx(0.5, abs=0.04)
    assert float(found.mean()) == pytest.approx(1 - 0.5 / 16 - 0.5, abs=0.04)
    anything = torch.rand(truth.shape, generator=torch.Generator().manual_seed(5))
    nothing, _ = relevance_ordering(seen, images, anything, 16, random_orders=30, baseline=black)
    assert abs(float(nothing.mean())) < 0.15
    again, _ = relevance_ordering(seen, images, anything, 16, random_orders=30, baseline=black)
    assert torch.equal(nothing, again)


def test_a_prototype_that_sees_its_cell_alone_cannot_be_moved(drawn):
    images, truth, _ = drawn

    def local(some, places):
        return F.avg_pool2d(some.mean(1, keepdim=True), 8).squeeze(1) * (0.1 + truth[places])

    boxes = boxes_of(truth)
    found = location_misalignment(local, images, boxes, epsilon=0.05)
    assert (found["location_change"] == 0).all()
    assert (found["activation_change"] == 0).all()
    for image, changed, (x0, y0, x1, y1) in zip(images, found["images"], boxes.tolist(), strict=True):
        assert torch.equal(image[:, y0:y1, x0:x1], changed[:, y0:y1, x0:x1])
        assert float((image - changed).abs().max()) <= 0.05 + 1e-6


def test_a_prototype_that_sees_all_but_its_cell_is_moved(drawn):
    images, truth, _ = drawn

    def elsewhere(some, places):
        """The cell says how bright everything else is: nothing of what its box shows."""
        rest = F.avg_pool2d(some.mean(1, keepdim=True), 8).squeeze(1) * (1 - truth[places])
        return truth[places] * rest.sum(dim=(1, 2), keepdim=True) / 63 + (1 - truth[places]) * 0.6

    boxes = boxes_of(truth)
    before = elsewhere(images, torch.arange(24)).flatten(1).max(dim=1).values
    found = location_misalignment(elsewhere, images, boxes, epsilon=0.5, steps=20)
    looked_there = before > 0.6
    assert looked_there.any()
    assert (found["location_change"][looked_there] == 1).all()
    assert (found["activation_change"][looked_there] > 0).all()
    assert 0 < float((images - found["images"]).abs().max()) <= 0.5 + 1e-6


def test_a_change_is_as_large_as_it_can_be():
    """For a linear map the best attack is known: each free pixel moved by epsilon against the sign of its weight."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 8, 8, generator=generator)
    images, box = torch.zeros(1, 3, 8, 8), torch.tensor([[0, 0, 4, 4]])

    def linear(some, places):
        return 1.0 + (some * weights).sum(dim=(1, 2, 3)).view(-1, 1, 1)

    found = location_misalignment(linear, images, box, epsilon=0.01, steps=10)
    free = weights.clone()
    free[:, :4, :4] = 0
    assert float(found["activation_change"]) == pytest.approx(0.01 * float(free.abs().sum()), rel=1e-4)


def test_blur_takes_away_what_is_to_be_seen(drawn):
    images, _, _ = drawn
    soft = blur(images)
    assert soft.shape == images.shape
    assert float(soft.var(dim=(2, 3)).mean()) < 0.5 * float(images.var(dim=(2, 3)).mean())
    torch.testing.assert_close(soft.mean(), images.mean(), atol=0.02, rtol=0)
    assert blur(torch.rand(1, 3, 3, 40)).shape == (1, 3, 3, 40)
    images = torch.rand(2, 3, 20, 50, dtype=torch.float64)
    at_once = gaussian_blur(images, [31, 31], [5.0, 5.0])
    torch.testing.assert_close(blur(images), at_once, atol=1e-12, rtol=0)


def boxes_of(truth):
    cells = truth.flatten(1).argmax(dim=1)
    y, x = cells // 8 * 8, cells % 8 * 8
    return torch.stack([x, y, x + 8, y + 8], dim=1)
