"""A shortlist of images finds what a pass over all of the class finds, or reads the class."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from protopush import push_prototypes
from protopush.nn.prototypes import PrototypeManager
from protopush.preserve_state import preserve_state
from protopush.push.nearest_patches import nearest_patches
from protopush.push.options import PushOptions
from protopush.push.protocol import Slots
from protopush.push.reader import read_through
from protopush.push.selection import RULES
from protopush.push.shortlist import Bounds, nearest_on_shortlist
from protopush.push.top_candidates import NO_ID

CLASSES, SLOTS, CELLS, DIM = 3, 4, 5, 6


class Given(nn.Module):
    """Patches that are given: an item of its data is an image's number, and counts how often it is read."""

    def __init__(self, patches: torch.Tensor, used: torch.Tensor) -> None:
        super().__init__()
        self.head = nn.Module()
        self.head.proj = nn.Identity()
        self.head.proto_manager = PrototypeManager(CLASSES, used.sum(dim=1).tolist(), DIM, SLOTS)
        self.patches, self.read = patches, list[int]()

    def extract_features(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.read += numbers.flatten().tolist()
        found = self.patches[numbers.flatten()]
        return found.mean(dim=1, keepdim=True), found


def a_case(seed: int):
    """A model over random patches, with ties, its loader, and a random choice of patches that are allowed."""
    random = np.random.default_rng(seed)
    count = int(random.integers(1, 40))
    patches = torch.tensor(random.normal(size=(count, CELLS, DIM)), dtype=torch.float32)
    for _ in range(count // 4):  # the same picture twice
        patches[random.integers(count)] = patches[random.integers(count)]
    labels = torch.tensor(random.integers(0, CLASSES, count))
    used = torch.arange(SLOTS).expand(CLASSES, SLOTS) < torch.tensor(random.integers(1, SLOTS + 1, CLASSES))[:, None]
    torch.manual_seed(seed)
    model = Given(patches, used).eval()
    free = torch.tensor(random.random((count, CELLS)) < random.choice([0.3, 0.9, 1.0]))
    loader = DataLoader(TensorDataset(torch.arange(count), labels), batch_size=int(random.integers(1, 9)))
    return random, model, loader, labels, free


def true_bounds(model: Given, labels: torch.Tensor, most: int, error: float, random) -> Bounds:
    """By numpy: each prototype's best images, whatever is allowed, their similarities off by at most ``error``."""
    patches = model.patches.double().numpy()
    patches /= np.linalg.norm(patches, axis=2, keepdims=True)
    unit = model.head.proto_manager.unit().detach().double().numpy()
    ids, similarity = torch.full((most, CLASSES, SLOTS), NO_ID), torch.full((most, CLASSES, SLOTS), -torch.inf)
    rest = torch.full((CLASSES, SLOTS), -torch.inf)
    for c in range(CLASSES):
        (own,) = np.nonzero(labels.numpy() == c)
        for k in range(SLOTS):
            best = (patches[own] @ unit[c, k]).max(axis=1) + random.uniform(-error, error, len(own))
            order = np.argsort(-best, kind="stable")
            few = order[:most]
            ids[: len(few), c, k] = torch.tensor(own[few])
            similarity[: len(few), c, k] = torch.tensor(best[few], dtype=torch.float32)
            if len(order) > most:
                rest[c, k] = float(best[order[most - 1]])
    return Bounds(ids, similarity, rest, error)


@pytest.mark.parametrize("seed", range(120))
def test_it_finds_what_a_pass_over_all_finds(seed):
    random, model, loader, labels, free = a_case(seed)
    slots = Slots.of(model.head.proto_manager)
    slots.used[torch.tensor(random.random(slots.used.shape) < 0.5)] = False
    if not slots.used.any():
        slots.used[0, 0] = True
    rule, depth = RULES[str(random.choice(["none", "patch", "image"]))], int(random.integers(2, 5))
    options = PushOptions(allow=lambda ids, _: free[ids])
    error = float(random.choice([1e-5, 0.05]))
    bounds = true_bounds(model, labels, int(random.integers(1, 12)), error, random)
    reader = read_through(loader)
    classes = slots.used.any(dim=1).nonzero().flatten().tolist()
    with preserve_state(model):
        few = nearest_on_shortlist(model, reader, slots, replace(options, bounds=bounds), rule, depth)
        every = nearest_patches(model, reader.of_classes(classes), slots, options, rule, depth)
    here = slots.used.unsqueeze(1).expand_as(few.ranked.ids)
    for one, other in zip(few.ranked, every.ranked, strict=True):
        torch.testing.assert_close(one[here], other[here], atol=1e-6, rtol=0)
    assert torch.equal(few.vectors[here], every.vectors[here])


def test_few_images_are_read_where_they_settle_it(caplog):
    torch.manual_seed(0)
    patches = torch.randn(400, CELLS, DIM)
    labels = torch.arange(400) % CLASSES
    model = Given(patches, torch.ones(CLASSES, SLOTS, dtype=torch.bool)).eval()
    loader = DataLoader(TensorDataset(torch.arange(400), labels), batch_size=16)
    bounds = true_bounds(model, labels, 16, 1e-5, np.random.default_rng(0))
    caplog.set_level(logging.INFO, "protopush.push")
    report = model_push(model, loader, bounds)
    few = set(model.read)
    assert len(few) <= 3
    model.read.clear()
    assert anchors_of(report) == anchors_of(model_push(model, loader, None))
    assert len(set(model.read)) == 400
    assert "images settle it; the others cannot win" in caplog.text


def model_push(model, loader, bounds):
    return push_prototypes(model, loader, "cpu", momentum=1.0, prototypes=[(1, 2)], bounds=bounds)


def anchors_of(report):
    return [(one.class_index, one.prototype, one.anchor.sample_id, one.anchor.cell) for one in report.prototypes]


def test_a_similarity_above_its_bound_makes_it_read_the_class(caplog):
    torch.manual_seed(1)
    patches, labels = torch.randn(60, CELLS, DIM), torch.arange(60) % CLASSES
    model = Given(patches, torch.ones(CLASSES, SLOTS, dtype=torch.bool)).eval()
    loader = DataLoader(TensorDataset(torch.arange(60), labels), batch_size=16)
    bounds = true_bounds(model, labels, 16, 1e-5, np.random.default_rng(0))
    bounds = bounds._replace(similarity=bounds.similarity - 0.3, rest=bounds.rest - 0.3)  # images have changed since
    report = model_push(model, loader, bounds)
    assert "nearer than its recorded similarity" in caplog.text
    assert anchors_of(report) == anchors_of(model_push(model, loader, None))
