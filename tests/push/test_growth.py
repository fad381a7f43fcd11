"""Growth and pruning against brute force over all patches, and their invariances."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from helpers import ToyNet, start_ranks
from protopush import HeadOptimal, InputError, push_prototypes
from protopush.backbones.create import Features
from protopush.data.regions import Regions
from protopush.nn.prototypes import Anchor, PrototypeManager
from protopush.push import grow_prototypes, prune_prototypes, refresh_anchors
from protopush.push.guard import Validation

TIE = 2.0**-21


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def random_case(seed: int):
    """patches (N, L, D), labels (N,), prototypes (C, K, D), used (C, K): uneven, empty and full classes, ties."""
    random = np.random.default_rng(seed)
    classes, slots = int(random.integers(1, 7)), int(random.integers(1, 6))
    count, cells, dim = int(random.integers(1, 50)), int(random.integers(1, 8)), int(random.integers(3, 9))
    labels = random.choice(classes, size=count, p=random.dirichlet(np.full(classes, 0.7)))
    if seed % 3 == 0:  # few directions: exact ties, between samples and within them
        patches = random.choice([-1.0, 0.0, 1.0], size=(count, cells, dim))
        patches[np.linalg.norm(patches, axis=2) == 0] = 1.0
    else:
        patches = random.normal(size=(count, cells, dim))
        copies = random.integers(0, count, size=(count // 2, 2))
        patches[copies[:, 0]] = patches[copies[:, 1]]
    prototypes = random.normal(size=(classes, slots, dim))
    used = random.random((classes, slots)) < 0.6  # holes, full classes, and classes with no prototype at all
    return patches.astype(np.float32), labels, prototypes.astype(np.float32), used


def make(patches, labels, prototypes, used, batch_size=7, **loading):
    classes, slots, dim = prototypes.shape
    model = ToyNet(classes, slots, dim)
    manager = model.head.proto_manager
    manager.prototypes.data = torch.from_numpy(prototypes).flatten(0, 1).clone()
    manager.valid_mask = torch.from_numpy(used).flatten().clone()
    data = TensorDataset(torch.from_numpy(patches), torch.from_numpy(labels))
    return model, manager, DataLoader(data, batch_size, **loading)


def cover(patches, prototypes):
    """The best cosine of each sample (n, L, D) to any of the prototypes (k, D); -1 where there is none."""
    if not len(prototypes):
        return np.full(len(patches), -1.0)
    return np.array([(unit(p) @ unit(prototypes).T).max() for p in patches]).round(9)


def grow_by_force(patches, labels, prototypes, used, per_class, quantile, min_coverage, max_samples):
    """{class: ([(slot, sample, cell, gain), ...], quantile before, after)} of classes with samples."""
    found = {}
    for c in range(len(prototypes)):
        ids = np.flatnonzero(labels == c)
        if not len(ids):
            continue
        own, added = prototypes[c][used[c]], []
        coverage = cover(patches[ids], own)
        before = np.quantile(coverage, quantile)
        worst = sorted(sorted(ids, key=lambda i: (coverage[ids == i][0], i))[:max_samples])
        at, now = np.isin(ids, worst), coverage.copy()
        for slot in np.flatnonzero(~used[c])[:per_class]:
            if np.quantile(now, quantile) >= min_coverage - TIE:
                break
            gains = {
                (i, cell): np.maximum(0, cover(patches[worst], patches[i, [cell]]) - now[at]).sum()
                for i in worst
                for cell in range(patches.shape[1])
            }
            best = next(key for key in gains if gains[key] >= max(gains.values()) - TIE * len(worst))
            added.append((int(slot), int(best[0]), best[1], gains[best]))
            now[at] = np.maximum(now[at], cover(patches[worst], patches[best[0], [best[1]]]))
        new = np.array([patches[i, cell] for _, i, cell, _ in added]).reshape(-1, patches.shape[2])
        after = np.quantile(np.maximum(coverage, cover(patches[ids], new)), quantile)
        found[c] = added, before, after
    return found


@pytest.mark.parametrize("seed", range(40))
def test_growth_equals_brute_force(seed):
    patches, labels, prototypes, used = random_case(seed)
    wish = {
        "per_class": 1 + seed % 3,
        "quantile": [0.0, 0.1, 0.5][seed % 3],
        "min_coverage": [0.5, 0.8, 1.0][seed // 3 % 3],
        "max_samples": 256 if seed % 4 else 5,  # all of a class's samples, or the worst five
    }
    model, manager, loader = make(patches, labels, prototypes, used, 1 + seed % 13, shuffle=True)
    report = grow_prototypes(model, loader, "cpu", **wish)
    expected = grow_by_force(patches, labels, prototypes, used, **wish)

    keys = [(c, *new[:3]) for c, (added, *_) in expected.items() for new in added]
    assert [(a.class_index, a.prototype, a.anchor.sample_id, a.anchor.cell) for a in report.added] == keys
    gains = [new[3] for added, *_ in expected.values() for new in added]
    np.testing.assert_allclose([a.gain for a in report.added], gains, atol=1e-4)

    after = prototypes.copy()
    for c, slot, sample, cell in keys:
        after[c, slot] = unit(patches[sample, cell])
    np.testing.assert_allclose(manager.prototypes.data.view(after.shape).numpy(), after, atol=1e-6)
    untouched = [(c, k) not in {key[:2] for key in keys} for c, k in np.ndindex(used.shape)]
    assert torch.equal(manager.prototypes.data[untouched], torch.from_numpy(prototypes).flatten(0, 1)[untouched])
    now = used.copy()
    for key in keys:
        now[key[:2]] = True
    np.testing.assert_array_equal(manager.mask().numpy(), now)

    for told in report.classes:
        own = labels == told.class_index
        assert (told.samples, told.prototypes_before) == (own.sum(), used[told.class_index].sum())
        assert told.prototypes_after == now[told.class_index].sum()
        if not own.any():
            assert (told.before, told.after, told.note) == (None, None, "")
            continue
        _, low, high = expected[told.class_index]
        assert (told.before, told.after) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
        assert told.after >= told.before  # coverage never gets worse
        full = low < wish["min_coverage"] - TIE and used[told.class_index].all()
        assert told.note == ("badly covered, no free slot" if full else "")


def test_a_new_prototype_is_recorded_as_its_patch():
    patches, labels, prototypes, used = random_case(4)
    model, manager, loader = make(patches, labels, prototypes, used)
    report = grow_prototypes(model, loader, "cpu", min_coverage=1.0)
    assert report.added
    for new in report.added:
        anchor = manager.anchors[new.class_index * manager.max_prototypes + new.prototype]
        assert anchor == new.anchor
        assert (anchor.similarity, anchor.similarity_after, anchor.verified) == (1.0, 1.0, True)
        others = np.flatnonzero((labels == new.class_index) & (np.arange(len(labels)) != anchor.sample_id))
        runner_up = cover(patches[others], patches[anchor.sample_id, [anchor.cell]]).max() if len(others) else None
        assert anchor.runner_up == (None if runner_up is None else pytest.approx(runner_up, abs=1e-6))
    new = [(new.class_index, new.prototype) for new in report.added]
    again = push_prototypes(model, loader, "cpu", momentum=1.0, prototypes=new)
    assert all(r.distance_before < 1e-3 for r in again.prototypes)  # what the push finds is what growth took


@pytest.mark.parametrize("loading", [
    {"batch_size": 1}, {"batch_size": 64, "shuffle": True}, {"batch_size": 5, "shuffle": True, "drop_last": True},
    {"batch_size": 5, "num_workers": 1},
])  # fmt: skip
def test_same_for_any_batching_order_and_workers(loading):
    torch.manual_seed(3)
    images = torch.randn(40, 6, 4, 4)
    images[20:] = images[:20]  # ties that a projection rounds otherwise from one batch size to another
    data = TensorDataset(images, torch.arange(40) % 20 % 3)

    def outcome(**loading):
        torch.manual_seed(0)
        model = ToyNet(3, 2, channels=6, dim=8)
        model.head.proto_manager = PrototypeManager(3, [1, 2, 1], 8, max_prototypes=4)
        loader = DataLoader(data, **loading)
        grown = grow_prototypes(model, loader, "cpu", per_class=2, min_coverage=1.0, max_samples=7)
        pruned = prune_prototypes(model, loader, "cpu", max_cosine=0.5)
        told = [(a.class_index, a.prototype, a.anchor.sample_id, a.anchor.cell) for a in grown.added]
        return told, [(r.class_index, r.prototype, r.reason, r.twin) for r in pruned.removed], model.head.proto_manager

    grown, pruned, manager = outcome(batch_size=7)
    assert len(grown) == 6
    assert pruned
    other_grown, other_pruned, other = outcome(**loading)
    assert (other_grown, other_pruned) == (grown, pruned)
    torch.testing.assert_close(other.prototypes, manager.prototypes, rtol=0, atol=1e-6)
    assert torch.equal(other.valid_mask, manager.valid_mask)


def prune_by_force(patches, labels, prototypes, used, anchors, max_cosine, unused, keep_at_least):
    """[(class, slot, reason, twin), ...]"""
    removed = []
    for c in range(len(prototypes)):
        slots = np.flatnonzero(used[c]).tolist()
        ids = np.flatnonzero(labels == c)
        found = {k: np.array([(unit(patches[i]) @ unit(prototypes[c, k])).max() for i in ids]) for k in slots}

        def wins(k, among, found=found, ids=ids):
            return sum(found[k][n] >= max(found[j][n] for j in among) - TIE for n in range(len(ids)))

        stay, doubles = [], []
        for k in sorted(slots, key=lambda k: (-wins(k, slots), k)):
            for j in stay:
                same = anchors[c, k] is not None and anchors[c, k] == anchors[c, j]
                if same or unit(prototypes[c, k]) @ unit(prototypes[c, j]) > max_cosine:
                    doubles.append((c, k, "duplicate", j))
                    break
            else:
                stay.append(k)
        gone = doubles[::-1][: max(0, len(slots) - keep_at_least)]
        left = [k for k in slots if k not in [g[1] for g in gone]]
        if unused and len(ids):
            never = [k for k in left if wins(k, left) == 0]
            lead = {k: max(found[k][n] - max(found[j][n] for j in left) for n in range(len(ids))) for k in never}
            never.sort(key=lambda k: (round(lead[k], 6), -k))
            gone += [(c, k, "unused", None) for k in never[: max(0, len(slots) - keep_at_least - len(gone))]]
        removed += gone
    return removed


@pytest.mark.parametrize("seed", range(40))
def test_pruning_equals_brute_force(seed):
    patches, labels, prototypes, used = random_case(seed)
    random = np.random.default_rng(seed)
    for c, k in np.ndindex(used.shape):  # some double the one before, some share its patch
        if k and random.random() < 0.3:
            prototypes[c, k] = prototypes[c, k - 1] + np.float32(random.choice([0, 0.02])) * prototypes[c, 0]
    cells = random.integers(0, 4, size=used.shape)
    anchors = {
        key: Anchor(0, int(cells[key]), Regions.grid((2, 2), (2, 2)).boxes[int(cells[key])], 0.9, 0.9)
        if random.random() < 0.4
        else None
        for key in np.ndindex(used.shape)
    }
    rule = {"max_cosine": 0.99, "unused": seed % 4 != 0, "keep_at_least": 1 + seed % 3}
    model, manager, loader = make(patches, labels, prototypes, used, 1 + seed % 13, shuffle=True)
    manager.anchors = list(anchors.values())
    report = prune_prototypes(model, loader, "cpu", quantile=0.5, **rule)
    expected = prune_by_force(patches, labels, prototypes, used, anchors, **rule)
    assert [(r.class_index, r.prototype, r.reason, r.twin) for r in report.removed] == expected

    now = used.copy()
    for c, k, *_ in expected:
        now[c, k] = False
        assert manager.anchors[c * used.shape[1] + k] is None
    np.testing.assert_array_equal(manager.mask().numpy(), now)
    assert (now.sum(1) >= np.minimum(used.sum(1), rule["keep_at_least"])).all()
    assert torch.equal(manager.prototypes.data, torch.from_numpy(prototypes).flatten(0, 1))
    for told in report.classes:
        own = patches[labels == told.class_index]
        if len(own):
            c = told.class_index
            levels = [np.quantile(cover(own, prototypes[c][mask[c]]), 0.5) for mask in (used, now)]
            np.testing.assert_allclose([told.before, told.after], levels, atol=1e-6)


def test_weights_decide_what_matters():
    patches = np.array([[[1.0, 0.0]], [[0.9, 0.1]]], dtype=np.float32)
    model, loader = head_model([2], 2, patches=torch.from_numpy(patches), labels=torch.zeros(2, dtype=torch.int64))
    model.head.proto_manager.prototypes.data = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    assert [r.prototype for r in prune_prototypes(model, loader, "cpu", keep_at_least=2).removed] == []
    model.head.connections.data = torch.tensor([[0.0, 5.0]])
    report = prune_prototypes(model, loader, "cpu")
    assert [(r.prototype, r.reason) for r in report.removed] == [(0, "unused")]


class Net(nn.Module):
    """A HeadOptimal on images that are patches already."""

    def __init__(self, head: HeadOptimal) -> None:
        super().__init__()
        self.head = head
        self.class_names = ["ant", "bee", "cat"][: head.proto_manager.num_classes]

    def extract_features(self, patches):
        return patches.mean(1, keepdim=True), patches

    def forward(self, patches):
        return self.head(Features(*self.extract_features(patches), Regions.grid((2, 2), (2, 2))))


def head_model(counts, slots, patches=None, labels=None, **options):
    if patches is None:
        patches, labels = torch.randn(30, 4, 6), torch.arange(30) % len(counts)
    head = HeadOptimal(patches.shape[2], len(counts), counts, patches.shape[2], slots, **options)
    if "anchoring" not in options:
        head.proj = nn.Identity()
    return Net(head).eval(), DataLoader(TensorDataset(patches, labels), 8, shuffle=True)


@pytest.mark.parametrize("use_local", [True, False])
def test_head_after_growth_and_pruning_is_still_a_sum_of_contributions(use_local):
    model, loader = head_model([1, 2, 3], 4, match="local" if use_local else "global")
    head, manager = model.head, model.head.proto_manager
    head.connections.data.normal_()
    before = head.connections.detach().clone()
    images = loader.dataset.tensors[0]
    for change in (
        lambda: grow_prototypes(model, loader, "cpu", min_coverage=1.0, use_local=use_local).added,
        lambda: prune_prototypes(model, loader, "cpu", use_local=use_local, max_cosine=0.2).removed,
    ):
        used = manager.mask().clone()
        changed = change()
        assert changed
        assert not torch.equal(manager.mask(), used)
        out = model(images)
        torch.testing.assert_close(out.logits, out.contributions.sum(-1) + head.bias)
        assert (out.contributions[:, ~manager.mask()] == 0).all()
        assert out.logits.isfinite().all()
    for c, k in ((0, 1), (1, 2), (2, 3)):
        assert head.connections[c, k].item() == pytest.approx(before[c, :k].mean().item())
    free = {(c, int((~row).nonzero()[0])) for c, row in enumerate(manager.mask())}
    refilled = grow_prototypes(model, loader, "cpu", min_coverage=1.0, use_local=use_local).added
    assert {(new.class_index, new.prototype) for new in refilled} == free  # freed slots are filled again
    if not use_local:
        assert {new.anchor.pooled for new in refilled} == {True}


def test_moments_of_new_prototypes_are_reset():
    model, loader = head_model([1, 1, 3], 3)
    manager, head = model.head.proto_manager, model.head
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in (manager.prototypes, head.connections):
        optimizer.state[parameter] = {"exp_avg": torch.ones_like(parameter), "step": torch.tensor(1.0)}
    grow_prototypes(model, loader, "cpu", min_coverage=1.0, optimizer=optimizer)
    new = torch.tensor([[1, 0, 1], [1, 0, 1], [1, 1, 1]])
    assert torch.equal(optimizer.state[head.connections]["exp_avg"], new.float())
    assert torch.equal(optimizer.state[manager.prototypes]["exp_avg"][:, 0], new.flatten().float())


@pytest.mark.parametrize("use_local", [True, False])
def test_live_head_grows(use_local):
    model, loader = head_model([1, 2, 1], 3, anchoring="live", match="local" if use_local else "global")
    manager = model.head.proto_manager
    push_prototypes(model, loader, "cpu", use_local=use_local)
    report = grow_prototypes(model, loader, "cpu", per_class=2, min_coverage=1.0, use_local=use_local)
    assert len(report.added) > 3
    images = loader.dataset.tensors[0]
    with torch.no_grad():
        every = model.head.prototypes().flatten(0, 1)
        for new in report.added:
            row = new.class_index * 3 + new.prototype
            assert int(manager.anchor_ids[row]) == new.anchor.sample_id
            image = images[new.anchor.sample_id]
            feature = image[new.anchor.cell] if use_local else image.mean(0)
            torch.testing.assert_close(manager.anchor_features[row], feature)
            torch.testing.assert_close(every[row], model.head.embed(feature))
            torch.testing.assert_close(manager.prototypes[row], every[row])
        model.head.proj[0].weight.add_(0.1 * torch.randn_like(model.head.proj[0].weight))
        assert not torch.allclose(model.head.prototypes().flatten(0, 1)[row], every[row])  # it lives
    refresh_anchors(model, loader, "cpu")
    removed = prune_prototypes(model, loader, "cpu", max_cosine=0.0, use_local=use_local).removed
    gone = [r.class_index * 3 + r.prototype for r in removed]
    assert gone
    assert (manager.anchor_ids[gone] == -1).all()


def test_effect_on_validation_is_told():
    model, loader = head_model([1, 1, 1], 4)
    val_loader = DataLoader(TensorDataset(torch.randn(20, 4, 6), torch.arange(20) % 3), 6)

    def score():
        with torch.no_grad():
            return Validation(model, model, val_loader).score()

    for change in (
        lambda: grow_prototypes(model, loader, "cpu", min_coverage=1.0, val_loader=val_loader),
        lambda: prune_prototypes(model, loader, "cpu", max_cosine=-1.0, val_loader=val_loader),
    ):
        before = score()
        report = change()
        assert (report.val_before, report.val_after) == (before, score())
        assert report.val_before != report.val_after
        assert "validation: balanced_accuracy 0." in str(report)
    kept = grow_prototypes(model, loader, "cpu", min_coverage=-1.0, val_loader=val_loader)
    assert kept.added == []
    assert kept.val_before == kept.val_after == score()


def test_reports_as_data_and_as_tables():
    model, loader = head_model([1, 4, 2], 4)
    loader.dataset.tensors[1][loader.dataset.tensors[1] == 2] = 0  # no cat
    grown = grow_prototypes(model, loader, "cpu", min_coverage=1.0)
    first = json.loads(json.dumps(grown.to_dict(), allow_nan=False))["added"][0]["anchor"]
    assert first["region"] == list(Regions.grid((2, 2), (2, 2)).boxes[first["cell"]])
    lines = str(grown).splitlines()
    assert lines[0].startswith("growth, coverage at quantile 0.1 below 1: 1 prototypes added in")
    assert lines[2].startswith("ant                       20     1 -> 2/4")
    assert f"slot 1: {grown.added[0].anchor.sample_id} cell" in lines[2]
    assert lines[3].endswith("badly covered, no free slot")
    assert lines[4] == f"{'cat':<20} {0:>7} {'2 -> 2/4':>12} {'-':>7} {'-':>7}"
    assert lines[5] == "validation: not measured (no val_loader)"
    model.head.proto_manager.prototypes.data[3 + 4] = model.head.proto_manager.prototypes.data[4]
    pruned = prune_prototypes(model, loader, "cpu", unused=False)
    assert json.loads(json.dumps(pruned.to_dict(), allow_nan=False))["removed"][0]["twin"] == 0
    assert "slot 3: duplicate of slot 0 (cosine 1.0000)" in str(pruned)


def test_no_slot_at_all_is_told():
    model, loader = head_model([2, 2, 2], 2)
    report = grow_prototypes(model, loader, "cpu", min_coverage=1.0)
    assert report.notes == ["no class has a free slot: make the head with max_prototypes above num_prototypes"]


def test_allow_decides_which_patches_may_become_prototypes():
    model, loader = head_model([1, 1, 1], 3)
    second = lambda ids, regions: torch.arange(len(regions)).expand(len(ids), -1) == 1  # noqa: E731
    none = lambda ids, regions: torch.zeros(len(ids), len(regions), dtype=torch.bool)  # noqa: E731
    refused = grow_prototypes(model, loader, "cpu", min_coverage=1.0, allow=none)
    assert refused.added == []
    assert {c.note for c in refused.classes} == {"badly covered, no patch helps"}
    report = grow_prototypes(model, loader, "cpu", min_coverage=1.0, allow=second)
    assert [new.anchor.cell for new in report.added] == [1, 1, 1]


def test_streams_grow_too_and_batches_may_differ_in_their_cells():
    images, labels = torch.randn(12, 9, 6), torch.arange(12) % 2
    rows = [list(range(5)), list(range(5, 12))]
    stream = [(images[r][:, : 9 - 5 * n], labels[r], torch.tensor(r)) for n, r in enumerate(rows)]
    results = []
    for loader in (stream, stream[::-1]):
        torch.manual_seed(0)
        model, _ = head_model([1, 1], 3)
        report = grow_prototypes(model, loader, "cpu", per_class=2, min_coverage=1.0)
        results.append([(a.class_index, a.prototype, a.anchor.sample_id, a.anchor.cell) for a in report.added])
        assert {a.anchor.region[3] - a.anchor.region[1] for a in report.added} <= {1.0}
        assert len(prune_prototypes(model, loader, "cpu", max_cosine=0.0).removed) > 0
    assert len(results[0]) == 4
    assert results[0] == results[1]


def test_patches_without_direction_count_for_nothing():
    images = torch.randn(10, 4, 6)
    images[:, 1:3] = 0
    images[4] = 0
    model, loader = head_model([1, 1], 3, images, torch.arange(10) % 2)
    model.head.proto_manager.prototypes.data = -images[[5, 5, 5, 4, 4, 4], 0] + 0.1  # far from all
    report = grow_prototypes(model, loader, "cpu", min_coverage=1.0, per_class=2)
    assert [c.samples for c in report.classes] == [4, 5]
    assert len(report.added) == 4
    assert {new.anchor.cell for new in report.added} <= {0, 3}
    assert 4 not in {new.anchor.sample_id for new in report.added}


def test_a_patch_without_direction_is_not_a_cosine_of_0():
    images = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[-1.0, 0.0], [0.0, 0.0]]])
    model, loader = head_model([1], 2, images, torch.zeros(2, dtype=torch.int64))
    model.head.proto_manager.valid_mask[:] = False
    (new,) = grow_prototypes(model, loader, "cpu").added
    assert (new.anchor.sample_id, new.gain, new.anchor.runner_up) == (0, 2.0, -1.0)


def test_what_differs_by_rounding_alone_matters_alike():
    angles = torch.tensor([0.01 + 2e-5, 0.01, 0.5], dtype=torch.float64)  # cosines to (1, 0) differ by 2e-7
    model, loader = head_model([3], 3, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, dtype=torch.int64))
    model.head.proto_manager.prototypes.data = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    report = prune_prototypes(model, loader, "cpu", max_cosine=1.0)
    assert [(gone.prototype, gone.reason) for gone in report.removed] == [(2, "unused")]
    report = prune_prototypes(model, loader, "cpu")
    assert [(gone.prototype, gone.twin) for gone in report.removed] == [(1, 0)]  # not 0, for its last bits


class Faulty(Dataset):
    def __init__(self, data) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return (image * float("nan") if index == 3 else image), label


def test_errors_change_nothing_and_say_what_to_do(monkeypatch):
    model, loader = head_model([1, 1, 1], 3)
    data = loader.dataset
    state = {name: value.clone() for name, value in model.state_dict().items()}
    once = iter([(data.tensors[0], data.tensors[1], torch.arange(30))])
    live, _ = head_model([1, 1, 1], 3, anchoring="live")
    batches = [(data.tensors[0], data.tensors[1], torch.arange(30))]
    foreign = ToyNet(3, 1)
    del foreign.head.proto_manager.valid_mask
    cases = [
        (model, once, {}, "no sample 0, 1, 2, 3, 4 and 25 more"),
        (model, [], {}, "yields no batch"),
        (model, DataLoader(Faulty(data), 8), {}, "NaN or infinite features in 1 samples: 3"),
        (model, DataLoader(TensorDataset(data.tensors[0], data.tensors[1] + 1), 8), {}, "expected 0 to 2"),
        (model, loader, {"per_class": 0}, "per_class is 0"),
        (model, loader, {"max_samples": 0}, "max_samples is 0"),
        (model, loader, {"quantile": float("nan")}, "quantile is nan"),
        (model, loader, {"min_coverage": 2.0}, "min_coverage is 2.0"),
        (live, batches, {}, "the loader is a stream"),
        (foreign, loader, {}, "no valid_mask, so that its prototypes cannot grow"),
    ]
    for net, source, options, message in cases:
        with pytest.raises(InputError, match=message):
            grow_prototypes(net, source, "cpu", **({"min_coverage": 1.0} | options))
    for options, message in (
        ({"max_cosine": 1.5}, "max_cosine is 1.5"), ({"keep_at_least": 0}, "keep_at_least is 0"),
        ({"quantile": -1.0}, "quantile is -1.0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            prune_prototypes(model, loader, "cpu", **options)
    with pytest.raises(InputError, match="no valid_mask, so that its prototypes cannot be removed"):
        prune_prototypes(foreign, loader, "cpu")

    scores = iter([{"balanced_accuracy": 0.5, "auroc": None, "ece": 0.1}] * 1)
    monkeypatch.setattr(Validation, "score", lambda self: next(scores))  # the second one fails
    with pytest.raises(StopIteration):
        grow_prototypes(model, loader, "cpu", min_coverage=1.0, val_loader=loader)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(model.head.proto_manager.anchors)


def test_leaves_no_trace():
    model, loader = head_model([1, 2, 1], 3)
    model.train()
    model.head.proj = nn.Dropout(0.5)
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(loader.dataset, 8, shuffle=True, generator=generator)
    states = generator.get_state(), torch.get_rng_state()
    grow_prototypes(model, loader, "cpu", min_coverage=1.0, val_loader=loader)
    prune_prototypes(model, loader, "cpu", val_loader=loader)
    assert torch.equal(generator.get_state(), states[0])
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(module.training for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"anchoring": "live"}])
def test_same_on_a_gpu(options):
    told = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model, loader = head_model([1, 2, 3], 4, **options)
        model.to(device)
        optimizer = torch.optim.Adam(model.parameters())
        grown = grow_prototypes(
            model, loader, device, per_class=2, min_coverage=1.0, max_samples=6, val_loader=loader, optimizer=optimizer
        )
        pruned = prune_prototypes(model, loader, device, max_cosine=0.4, val_loader=loader)
        added = [(new.class_index, new.prototype, new.anchor.sample_id, new.anchor.cell) for new in grown.added]
        told.append((added, [(gone.class_index, gone.prototype, gone.reason) for gone in pruned.removed]))
    assert told[0] == told[1]


def grow_and_prune(kind: str, rank: int = 0, world: int = 1):
    """Prototypes, mask and reports in one process or as one of several."""
    torch.manual_seed(0)
    images = torch.randn(31, 4, 6)
    images[20:25] = images[:5]  # ties between the shards
    data = TensorDataset(images, torch.arange(31) % 3)
    model, _ = head_model([1, 2, 3], 4, images, data.tensors[1], **({"anchoring": "live"} if kind == "live" else {}))
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, world, rank, shuffle=True))
    if kind == "stream":
        rows = torch.arange(31)[rank::world].split(4)
        loader = [(images[part], data.tensors[1][part], part) for part in rows]
    reports = [
        grow_prototypes(model, loader, "cpu", per_class=2, min_coverage=1.0, max_samples=6),
        prune_prototypes(model, loader, "cpu", max_cosine=0.4),
    ]
    plain = [{key: value for key, value in report.to_dict().items() if key != "seconds"} for report in reports]
    return dict(model.state_dict()), json.dumps(plain)


KINDS = ("loader", "stream", "live")


def rank_main(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({kind: grow_and_prune(kind, rank, world) for kind in KINDS}, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_end_as_one_process(tmp_path):
    start_ranks(rank_main, 2, tmp_path)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for kind in KINDS:
        state, told = grow_and_prune(kind)
        grown, pruned = json.loads(told)
        assert len(grown["added"]) == 5
        assert pruned["removed"]
        for found in ranks:
            assert found[kind][1] == ranks[0][kind][1]
            assert all(torch.equal(found[kind][0][name], value) for name, value in state.items())
            if kind != "stream":  # shards of a stream are batches of their own: other last bits
                assert found[kind][1] == told
