"""The push against a brute-force search that holds every patch in memory, and its invariances."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from protopush import push_prototypes
from protopush.push.top_candidates import TopM
from protopush.push.update import slerp_update

CASES = 60


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """patches (N, L, D), labels (N,), prototypes (C, K, D): uneven and empty classes, duplicated patches, ties."""
    random = np.random.default_rng(seed)
    classes, slots = int(random.integers(1, 21)), int(random.integers(1, 11))
    count, cells, dim = int(random.integers(1, 60)), int(random.integers(1, 10)), int(random.integers(2, 9))
    shares = random.dirichlet(np.full(classes, 0.3))  # uneven; some classes get nothing
    labels = random.choice(classes, size=count, p=shares)
    if seed % 3 == 0:  # few distinct directions: many exact ties
        patches = random.choice([-1.0, 0.0, 1.0], size=(count, cells, dim))
        patches[np.linalg.norm(patches, axis=2) == 0] = 1.0
    else:
        patches = random.normal(size=(count, cells, dim))
        copies = random.integers(0, count, size=(count // 2, 2))
        patches[copies[:, 0]] = patches[copies[:, 1]]  # whole images twice: ties between samples
        patches[:, -1] = patches[:, 0]  # and within a sample
    prototypes = random.normal(size=(classes, slots, dim))
    return patches.astype(np.float32), labels, prototypes.astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def brute_force(patches, labels, prototypes, depth=1):
    """{(class, prototype): [(similarity, sample, cell), ...]}, the best cell of each of the best samples."""
    found = {}
    for c, own in enumerate(unit(prototypes)):
        for k, p in enumerate(own):
            every = []
            for i in np.flatnonzero(labels == c):
                s = (unit(patches[i]) @ p).round(9)  # what is equal but for float64's rounding is a tie
                cell = min(range(len(s)), key=lambda j: (-s[j], j))
                every.append((s[cell], int(i), cell))
            found[c, k] = sorted(every, key=lambda e: (-e[0], e[1]))[:depth]
    return found


def push(toy, patches, labels, prototypes, momentum=0.9, interpolation="linear", **loading):
    classes, slots, dim = prototypes.shape
    model = toy(classes, slots, dim)
    model.head.proto_manager.prototypes.data = torch.from_numpy(prototypes).flatten(0, 1).clone()
    data = TensorDataset(torch.from_numpy(patches), torch.from_numpy(labels))
    report = model.push_prototypes(
        DataLoader(data, **({"batch_size": 7} | loading)), "cpu", momentum=momentum, interpolation=interpolation
    )
    return report, model.head.proto_manager.prototypes.data.view(classes, slots, dim).numpy()


@pytest.mark.parametrize("seed", range(CASES))
def test_equals_brute_force_to_the_index(toy, seed):
    patches, labels, prototypes = random_case(seed)
    report, moved = push(toy, patches, labels, prototypes, momentum=0.9, batch_size=1 + seed % 13, shuffle=True)
    expected = {key: best[0] for key, best in brute_force(patches, labels, prototypes).items() if best}
    found = {(r.class_index, r.prototype): (r.anchor.sample_id, r.anchor.cell) for r in report.prototypes}
    assert found == {key: (i, cell) for key, (_, i, cell) in expected.items()}

    for (c, k), (similarity, i, cell) in expected.items():
        mixed = 0.9 * unit(prototypes[c, k]) + 0.1 * unit(patches[i, cell])
        np.testing.assert_allclose(moved[c, k], unit(mixed), atol=1e-6)
        record = next(r for r in report.prototypes if (r.class_index, r.prototype) == (c, k))
        assert record.anchor.similarity == pytest.approx(similarity, abs=1e-6)
        assert record.distance_before == pytest.approx(np.sqrt(max(0, 2 - 2 * float(similarity))), abs=1e-3)
    empty = sorted(set(range(len(prototypes))) - set(labels.tolist()))
    assert report.kept_classes == empty
    np.testing.assert_array_equal(moved[empty], prototypes[empty])
    assert report.patches_per_class == [int((labels == c).sum()) * patches.shape[1] for c in range(len(prototypes))]


@pytest.mark.parametrize("depth", [2, 3, 5])
@pytest.mark.parametrize("seed", range(12))
def test_top_m_candidates_equal_brute_force(seed, depth):
    patches, labels, prototypes = random_case(seed)
    search = TopM(torch.from_numpy(unit(prototypes)), torch.ones(prototypes.shape[:2], dtype=torch.bool), depth)
    order = np.random.default_rng(seed).permutation(len(labels))
    for rows in np.array_split(order, range(4, len(order), 4)):
        embeddings, ids = torch.from_numpy(patches[rows]), torch.from_numpy(rows)
        norm = embeddings.norm(dim=2)
        search.update(embeddings, norm, torch.from_numpy(labels[rows]), ids, ids[:, None], norm > 0, embeddings)
        if rows[0] % 3 == 0:  # at the latest after the last
            search.flush()
    search.flush()
    for (c, k), expected in brute_force(patches, labels, prototypes, depth).items():
        found = search.ranked
        hit = found.similarity[c, :, k].isfinite()
        assert list(zip(found.ids[c, hit, k].tolist(), found.cells[c, hit, k].tolist(), strict=True)) == [
            (i, cell) for _, i, cell in expected
        ]
        for m, (_, i, cell) in enumerate(expected):
            np.testing.assert_allclose(search.vectors[c, m, k].numpy(), patches[i, cell])


@pytest.mark.parametrize("loading", [
    {"batch_size": 1}, {"batch_size": 64}, {"batch_size": 7, "shuffle": True}, {"batch_size": 7, "num_workers": 2},
    {"batch_size": 64, "shuffle": True, "num_workers": 2}, {"batch_size": 7, "drop_last": True},
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_same_for_any_batching_order_and_workers(toy, seed, loading):
    case = random_case(seed)
    report, moved = push(toy, *case, batch_size=7)
    other, other_moved = push(toy, *case, **loading)
    assert [r.anchor for r in other.prototypes] == [r.anchor for r in report.prototypes]
    np.testing.assert_array_equal(other_moved, moved)


@pytest.mark.parametrize("seed", range(5))
def test_duplicated_images_are_ties_whatever_the_projection_rounds(toy, seed):
    """A matrix product gives a row other last bits from one batch size to another: that must not choose the image."""
    torch.manual_seed(seed)
    images = torch.randn(30, 49, 64)
    images[15:] = images[:15]
    data = TensorDataset(images, torch.arange(30) % 15 % 3)
    model = toy(3, 10, 64, dim=32)
    reports = [
        model.push_prototypes(DataLoader(data, size, shuffle=True), "cpu", momentum=1.0) for size in (1, 3, 7, 11, 64)
    ]
    chosen = [[(r.anchor.sample_id, r.anchor.cell) for r in report.prototypes] for report in reports]
    assert all(other == chosen[0] for other in chosen)
    assert max(sample for sample, _ in chosen[0]) < 15


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 1.0])
def test_momentum_means_what_it_says(toy, momentum):
    patches, labels, prototypes = random_case(1)
    report, moved = push(toy, patches, labels, unit(prototypes).astype(np.float32), momentum)
    assert report.prototypes
    for r in report.prototypes:
        p, f = unit(prototypes[r.class_index, r.prototype]), unit(patches[r.anchor.sample_id, r.anchor.cell])
        expected = unit(momentum * p + (1 - momentum) * f)
        np.testing.assert_allclose(moved[r.class_index, r.prototype], expected, atol=1e-6)
        assert r.anchor.similarity_after == pytest.approx(float(expected @ f), abs=1e-6)
        assert r.distance_after == pytest.approx(float(np.linalg.norm(expected - f)), abs=1e-6)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=-1), 1.0, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9, 1.0])
def test_slerp_goes_its_share_of_the_angle(toy, momentum):
    patches, labels, prototypes = random_case(1)
    report, moved = push(toy, patches, labels, unit(prototypes).astype(np.float32), momentum, interpolation="slerp")
    for r in report.prototypes:
        p, f = unit(prototypes[r.class_index, r.prototype]), unit(patches[r.anchor.sample_id, r.anchor.cell])
        angle = np.arccos(np.clip(p @ f, -1, 1))
        new = unit(moved[r.class_index, r.prototype])
        assert np.arccos(np.clip(new @ p, -1, 1)) == pytest.approx((1 - momentum) * angle, abs=1e-3)
        assert np.arccos(np.clip(new @ f, -1, 1)) == pytest.approx(momentum * angle, abs=1e-3)
        assert r.anchor.similarity_after == pytest.approx(np.cos(momentum * angle), abs=1e-5)
    assert report.interpolation == "slerp"


def test_slerp_where_the_great_circle_is_none():
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    f = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.0, 1e-6]])
    moved = slerp_update(p, f, 0.9)
    assert torch.equal(moved[0], f[0])  # opposite: the patch
    assert torch.equal(moved[1], p[1])
    assert torch.allclose(moved[2], torch.tensor([1.0, 1e-7]))
    assert torch.equal(slerp_update(p, f, 1.0), p)


@pytest.mark.parametrize("seed", range(9))
def test_unnormalised_patches_change_nothing(toy, seed):
    patches, labels, prototypes = random_case(seed)
    report, moved = push(toy, patches, labels, prototypes)
    # Powers of two, so that scaling itself rounds nothing and ties stay ties
    scale = 2.0 ** np.random.default_rng(seed).integers(-9, 10, size=(*patches.shape[:2], 1))
    scaled, scaled_moved = push(toy, (patches * scale).astype(np.float32), labels, prototypes)
    assert [r.anchor for r in scaled.prototypes] == [r.anchor for r in report.prototypes]
    np.testing.assert_array_equal(scaled_moved, moved)


def test_global_push_equals_brute_force_on_the_pooled_feature(toy):
    patches, labels, prototypes = random_case(4)
    classes, slots, dim = prototypes.shape
    model = toy(classes, slots, dim)
    model.head.proto_manager.prototypes.data = torch.from_numpy(prototypes).flatten(0, 1).clone()
    loader = DataLoader(TensorDataset(torch.from_numpy(patches), torch.from_numpy(labels)), batch_size=5, shuffle=True)
    report = model.push_prototypes(loader, "cpu", use_local=False)
    pooled = torch.from_numpy(patches).mean(1, keepdim=True).numpy()
    expected = {key: best[0][1] for key, best in brute_force(pooled, labels, prototypes).items() if best}
    assert {(r.class_index, r.prototype): r.anchor.sample_id for r in report.prototypes} == expected
    assert {r.anchor.pooled for r in report.prototypes} == {True}


def test_min_dist_falls_from_push_to_push(toy):
    patches, labels, _ = random_case(1)
    model = toy(int(labels.max()) + 1, 3, patches.shape[2])
    loader = DataLoader(TensorDataset(torch.from_numpy(patches), torch.from_numpy(labels)), batch_size=8)
    distances = [push_prototypes(model, loader, "cpu").mean_dist for _ in range(6)]
    assert all(later < earlier for earlier, later in pairwise(distances))


def test_patches_without_direction_are_never_anchors(toy):
    patches = np.zeros((3, 4, 5), dtype=np.float32)
    patches[1, 2] = [-1, 0, 0, 0, 0]
    report, moved = push(toy, patches, np.array([0, 0, 1]), np.ones((2, 2, 5), dtype=np.float32), momentum=0.0)
    assert {(r.class_index, r.anchor.sample_id, r.anchor.cell) for r in report.prototypes} == {(0, 1, 2)}
    assert report.kept_classes == [1]
    np.testing.assert_allclose(moved[0], [[-1, 0, 0, 0, 0]] * 2, atol=1e-7)
