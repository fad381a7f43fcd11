"""Unique anchors against enumeration: optimal, and no patch, image or group twice."""

from __future__ import annotations

import logging
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from protopush.data.dataset import Provenance
from protopush.errors import InputError
from protopush.push.selection import assign
from protopush.push.top_candidates import Ranked


class Lesions(Dataset):
    """Ready-made maps with a group each."""

    def __init__(self, patches, labels, groups):
        self.patches, self.labels, self.groups = torch.from_numpy(patches), labels.tolist(), groups

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.patches[index], self.labels[index]

    def eval_view(self):
        return self

    def describe(self, index):
        return Provenance(index, group=self.groups[index])


def random_case(seed: int, classes: int = 3, slots: int = 3):
    """A few images of few cells, so that prototypes compete; groups of one to three images, some images without."""
    random = np.random.default_rng(seed)
    count, cells, dim = int(random.integers(5, 25)), int(random.integers(1, 5)), 3
    labels = random.integers(0, classes, count)
    patches = random.normal(size=(count, cells, dim)).astype(np.float32)
    if seed % 4 == 0:
        patches[count // 2 :] = patches[: count - count // 2]  # ties between images
    groups = [f"g{random.integers(0, count // 2 + 1)}" if random.random() < 0.8 else None for _ in range(count)]
    center = random.normal(size=(classes, 1, dim))  # prototypes of a class lie close together
    prototypes = (center + 0.2 * random.normal(size=(classes, slots, dim))).astype(np.float32)
    return patches, labels, groups, prototypes


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def best_sum(patches, labels, groups, prototypes, c, level):
    """The largest sum of similarities of class c over all ways to choose, and whether there is one without sharing."""
    samples = np.flatnonzero(labels == c)
    own = unit(prototypes[c])
    best: dict[object, np.ndarray] = {}
    for i, cell in product(samples, range(patches.shape[1])):
        key = {"patch": (i, cell), "image": i, "group": groups[i] or ("alone", i)}[level]
        similarity = own @ unit(patches[i, cell])
        best[key] = np.maximum(best.get(key, -2.0), similarity)
    keys = list(best)
    if len(keys) < len(own):
        return None
    return max(sum(best[key][k] for k, key in enumerate(chosen)) for chosen in permutations(keys, len(own)))


def push(toy, patches, labels, groups, start, **options):
    model = toy(*start.shape)
    model.head.proto_manager.prototypes.data = torch.from_numpy(start).flatten(0, 1).clone()
    loader = DataLoader(Lesions(patches, labels, groups), batch_size=4, shuffle=True)
    return model.push_prototypes(loader, "cpu", momentum=0.0, **options), model


LOWER = {"group": "image", "image": "patch", "patch": "none"}


@pytest.mark.parametrize("level", ["patch", "image", "group"])
@pytest.mark.parametrize("seed", range(50))
def test_optimal_and_never_shared(toy, seed, level):
    patches, labels, groups, prototypes = random_case(seed)
    report, _ = push(toy, patches, labels, groups, prototypes, unique=level)
    for c in range(len(prototypes)):
        records = report.of_class(c)
        if not (labels == c).any():
            assert records == []
            assert c in report.kept_classes
            continue
        effective, expected = level, best_sum(patches, labels, groups, prototypes, c, level)
        while expected is None and effective != "none":
            effective = LOWER[effective]
            expected = None if effective == "none" else best_sum(patches, labels, groups, prototypes, c, effective)
        assert report.unique[c] == effective
        if effective == "none":
            continue
        found = sum(r.anchor.similarity for r in records)
        assert found == pytest.approx(expected, abs=1e-5)
        keys = {
            "patch": [(r.anchor.sample_id, r.anchor.cell) for r in records],
            "image": [r.anchor.sample_id for r in records],
            "group": [groups[r.anchor.sample_id] or ("alone", r.anchor.sample_id) for r in records],
        }[effective]
        assert len(set(keys)) == len(records) == prototypes.shape[1]


@pytest.mark.parametrize("level", ["none", "patch", "image", "group"])
def test_the_same_for_any_batching(toy, level):
    for seed in range(0, 12, 4):  # cases with ties
        patches, labels, groups, prototypes = random_case(seed)
        chosen = []
        for size in (1, 3, 64):
            model = toy(*prototypes.shape)
            model.head.proto_manager.prototypes.data = torch.from_numpy(prototypes).flatten(0, 1).clone()
            loader = DataLoader(Lesions(patches, labels, groups), batch_size=size, shuffle=True)
            chosen.append(model.push_prototypes(loader, "cpu", unique=level).prototypes)
        anchors = [[(r.anchor.sample_id, r.anchor.cell, r.choice) for r in records] for records in chosen]
        assert anchors[0] == anchors[1] == anchors[2]


def test_the_report_tells_choices_and_their_cost(toy):
    # Two prototypes, nearest to the same patch; the second best of the first is far, of the second near.
    patches = np.array([[[1, 0, 0]], [[0.9, 0.1, 0]], [[0, 0, 1]]], dtype=np.float32)
    prototypes = np.array([[[1, -0.2, 0], [1, 0.01, 0]]], dtype=np.float32)
    labels = np.zeros(3, dtype=np.int64)
    free, _ = push(toy, patches, labels, [None] * 3, prototypes)
    assert [r.anchor.sample_id for r in free.prototypes] == [0, 0]
    assert free.duplicates_avoided == 0
    assert free.prototypes[1].anchor.runner_up == pytest.approx(float(unit(prototypes[0, 1]) @ unit(patches[1, 0])))
    report, _ = push(toy, patches, labels, [None] * 3, prototypes, unique="image")
    first, second = report.prototypes
    assert [first.anchor.sample_id, second.anchor.sample_id] == [0, 1]
    assert [first.choice, second.choice] == [1, 2]
    assert second.duplicate_avoided
    assert second.distance_before - second.nearest_distance == pytest.approx(
        np.linalg.norm(unit(prototypes[0, 1]) - unit(patches[1, 0]))
        - np.linalg.norm(unit(prototypes[0, 1]) - unit(patches[0, 0])),
        abs=1e-3,
    )
    assert report.duplicates_avoided == 1
    assert "choice 2" in str(report)
    assert report.to_dict()["prototypes"][1]["duplicate_avoided"]


def test_too_few_say_so(toy, caplog):
    patches = np.eye(3, dtype=np.float32)[:, None, :].repeat(2, axis=1)
    patches[:, 1] += 0.5
    labels = np.array([0, 0, 1])
    with caplog.at_level(logging.WARNING):
        prototypes = np.random.default_rng(0).normal(size=(2, 2, 3)).astype(np.float32)
        report, _ = push(toy, patches, labels, ["a", "a", "b"], prototypes, unique="group")
    assert report.unique == ["image", "patch"]
    assert report.notes == [
        "class 0, class 1: fewer groups than prototypes, anchors are unique by image instead",
        "class 1: fewer images than prototypes, anchors are unique by patch instead",
    ]
    assert all(note in caplog.text for note in report.notes)
    assert {r.anchor.sample_id for r in report.of_class(0)} == {0, 1}
    assert {(r.anchor.sample_id, r.anchor.cell) for r in report.of_class(1)} == {(2, 0), (2, 1)}


def test_one_patch_for_two_prototypes_is_shared_in_the_open(toy):
    prototypes = np.random.default_rng(0).normal(size=(1, 2, 3)).astype(np.float32)
    report, _ = push(toy, np.ones((1, 1, 3), np.float32), np.array([0]), [None], prototypes, unique="patch")
    assert report.unique == ["none"]
    assert "anchors are shared" in report.notes[0]


def test_no_groups_are_reported(toy):
    patches, labels, groups, prototypes = random_case(1)
    report, _ = push(toy, patches, labels, [None] * len(groups), prototypes, unique="group")
    assert report.notes[0] == "the dataset has no groups: anchors are unique by image instead"


def test_unknown_word(toy):
    with pytest.raises(InputError, match="unique is 'lesion'; expected one of: none, patch, image, group"):
        push(toy, *random_case(0), unique="lesion")


def test_allow_bounds_what_may_be_chosen(toy):
    patches, labels, groups, prototypes = random_case(2)

    def allow(ids, regions):
        assert len(regions) == patches.shape[1]
        return (ids % 2 == 0).unsqueeze(1) & (torch.arange(patches.shape[1]) > 0)

    report, _ = push(toy, patches, labels, groups, prototypes, allow=allow)
    assert report.prototypes
    assert all(r.anchor.sample_id % 2 == 0 and r.anchor.cell > 0 for r in report.prototypes)


def test_only_the_prototypes_that_are_asked_for_move(toy):
    patches, labels, groups, prototypes = random_case(5)
    report, model = push(toy, patches, labels, groups, prototypes, prototypes=[(0, 1), (2, 0)])
    assert [(r.class_index, r.prototype) for r in report.prototypes] == [(0, 1), (2, 0)]
    assert report.kept_classes == []
    moved = model.head.proto_manager.prototypes.data.view(prototypes.shape).numpy()
    same = (moved == prototypes).all(axis=2)
    assert np.argwhere(~same).tolist() == [[0, 1], [2, 0]]
    with pytest.raises(InputError, match="no prototype 3:0"):
        push(toy, patches, labels, groups, prototypes, prototypes=[(3, 0)])


def test_equal_sums_go_to_smaller_keys_whatever_the_noise():
    """Two prototypes, three images that are all alike but for the last bit."""
    for noise in (0.0, 1e-7, -1e-7):
        similarity = torch.tensor([[[0.5, 0.5], [0.5 - noise, 0.5 + noise], [0.5, 0.5 - noise]]])
        ids = torch.tensor([7, 8, 9]).view(1, 3, 1).expand(1, 3, 2)
        taken, short = assign(Ranked(similarity, ids, torch.zeros_like(ids), ids), torch.ones(1, 2, dtype=torch.bool))
        assert short == []
        assert sorted(ids[0].gather(0, taken).flatten().tolist()) == [7, 8]
