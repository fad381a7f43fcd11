"""The push as other people's code meets it: names, log, provenance, cap, errors, and no trace left."""

from __future__ import annotations

import json
import logging
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import protopush
from protopush import InputError, push_prototypes
from protopush.data.dataset import Provenance
from protopush.data.regions import Regions
from protopush.nn.head import HeadOptimal


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(40, 6, 7, 7), torch.arange(40) % 4)


@pytest.fixture
def model(toy) -> nn.Module:
    return toy(classes=4, prototypes=5, channels=6, dim=8)


def anchors(report):
    return [(r.class_index, r.prototype, r.anchor.sample_id, r.anchor.cell) for r in report.prototypes]


def test_the_four_ways_to_call_it(model, data):
    train_loader, device = DataLoader(data, batch_size=8, shuffle=True), torch.device("cpu")
    assert HeadOptimal is protopush.HeadOptimal
    assert model.push_prototypes(train_loader, device).use_local
    assert model.push_prototypes(train_loader, device, use_local=True, momentum=0.9).momentum == 0.9
    assert not model.push_prototypes(train_loader, "cpu", use_local=False).use_local
    report = model.push_prototypes_local(
        dataloader=train_loader, device=device, momentum=0.9, max_patches_per_class=5000
    )
    assert report.max_patches_per_class == 5000
    assert model.push_prototypes_local(train_loader, "cpu").max_patches_per_class == 5000
    assert model.push_prototypes(train_loader, "cpu").max_patches_per_class is None


def test_the_log_keeps_its_words(model, data, caplog):
    with caplog.at_level(logging.INFO, "protopush"):
        report = model.push_prototypes(DataLoader(ConcatDataset([data] * 11), batch_size=4), "cpu")
    lines = [record.getMessage() for record in caplog.records]
    least = {c: min(r.distance_before for r in report.of_class(c)) for c in range(4)}
    each = [line for c in range(4) for line in (
        f"  Class {c}: {110 * 49} patches", f"    Updated 5 prototypes, min_dist: {least[c]:.4f}")]  # fmt: skip
    assert lines == [
        "Collecting LOCAL patch features for prototype push...",
        "  Using x_fu1 (B, 49, 6) instead of x_fu (B, 1, 6)",
        "  Processed 50 batches...",
        "  Processed 100 batches...",
        "Patch collection statistics:",
        *[f"  Class {c}: {110 * 49} patches" for c in range(4)],
        "Updating prototypes using LOCAL patches...",
        *each,
        "Local prototype push completed!",
    ]


def test_report_as_data_and_as_table(model, data):
    report = model.push_prototypes(DataLoader(data, batch_size=8), "cpu")
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert len(values["prototypes"]) == 20
    assert values["patches_per_class"] == [490] * 4
    first = values["prototypes"][0]
    assert {"distance_before", "distance_after", "anchor", "duplicate_avoided"} <= first.keys()
    assert first["distance_after"] < first["distance_before"]
    row, column = divmod(first["anchor"]["cell"], 7)  # a patch is a pixel of its image here
    assert first["anchor"]["region"] == [column, row, column + 1, row + 1]
    assert report.min_dist == min(r.distance_before for r in report.prototypes)
    assert len(str(report).splitlines()) == 2 + 20


def test_foreign_manager_with_uneven_classes_and_a_mask(data):
    class Manager(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = nn.Parameter(torch.randn(9, 6))
            self.valid_mask = torch.tensor([True] * 8 + [False])

        def get_prototype_indices(self):
            return [(0, 1), (1, 4), (4, 6), (6, 9)]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Module()
            self.head.proj, self.head.proto_manager = nn.Identity(), Manager()

        def extract_features(self, images):
            patches = images.flatten(2).transpose(1, 2)
            return patches.mean(1, keepdim=True), patches

    net = Net()
    before = net.head.proto_manager.prototypes.detach().clone()
    parameter = net.head.proto_manager.prototypes
    report = push_prototypes(net, DataLoader(data, batch_size=8), "cpu", momentum=0.0)
    assert [len(report.of_class(c)) for c in range(4)] == [1, 3, 2, 2]
    assert net.head.proto_manager.prototypes is parameter  # updated in place, not replaced
    assert torch.equal(parameter[8], before[8])
    flat = torch.nn.functional.normalize(data.tensors[0].flatten(2).transpose(1, 2), dim=2)
    rows = [0, 1, 2, 3, 4, 5, 6, 7]
    for row, r in zip(rows, report.prototypes, strict=True):
        assert torch.allclose(parameter[row], flat[r.anchor.sample_id, r.anchor.cell], atol=1e-6)


def test_wrapped_model(model, data):
    class Wrapper(nn.Module):  # as DistributedDataParallel and Fabric do
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    loader = DataLoader(data, batch_size=8)
    expected = anchors(push_prototypes(model, loader, "cpu", momentum=1.0))
    assert anchors(push_prototypes(Wrapper(Wrapper(model)), loader, "cpu", momentum=1.0)) == expected


@pytest.mark.parametrize("how", ["shuffle", "batch_sampler", "weighted", "ids"])
def test_every_anchor_names_the_very_patch(model, data, how):
    loaders = {
        "shuffle": lambda: DataLoader(data, batch_size=8, shuffle=True, drop_last=True),
        "batch_sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 7, True)),
        "weighted": lambda: DataLoader(data, batch_size=8, sampler=WeightedRandomSampler(torch.ones(40), 20)),
        "ids": lambda: DataLoader(TensorDataset(*data.tensors, torch.arange(40)), batch_size=8, shuffle=True),
    }
    report = model.push_prototypes(loaders[how](), "cpu", momentum=0.9)
    assert report.verified
    assert report.images_per_class == [10] * 4  # every sample once, also those a shuffled loader would drop
    model.eval()
    for r in report.prototypes:
        image, label = data[r.anchor.sample_id][:2]
        assert int(label) == r.class_index
        _, patches = model.extract_features(image.unsqueeze(0))
        z = torch.nn.functional.normalize(model.head.proj(patches)[0, r.anchor.cell].detach(), dim=0)
        p = model.head.proto_manager.prototypes.data[r.class_index * 5 + r.prototype]
        assert float(z @ p) == pytest.approx(r.anchor.similarity_after, abs=1e-5)


def test_a_loader_of_a_subset_never_reads_the_rest(model, data):
    allowed = list(range(0, 40, 3))
    by_sampler = model.push_prototypes(DataLoader(data, 4, sampler=SubsetRandomSampler(allowed)), "cpu", momentum=1.0)
    assert {r.anchor.sample_id for r in by_sampler.prototypes} <= set(allowed)
    by_subset = model.push_prototypes(DataLoader(Subset(data, allowed), 4, shuffle=True), "cpu", momentum=1.0)
    assert anchors(by_subset) == anchors(by_sampler)


class Augmenting(Dataset):
    """Returns a noisy picture, as random crops do; its view doesn't."""

    def __init__(self, data, noise=1.0, has_view=True):
        self.data, self.noise = data, noise
        if has_view:
            self.eval_view = lambda: Augmenting(data, 0.0)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        return image + self.noise * torch.randn_like(image), label


def test_anchors_come_from_the_view_without_augmentation(model, data):
    expected = model.push_prototypes(DataLoader(data, 8), "cpu", momentum=1.0)
    for dataset in (Augmenting(data), Subset(Augmenting(data), range(40)), ConcatDataset([Augmenting(data)])):
        report = model.push_prototypes(DataLoader(dataset, 8, shuffle=True), "cpu", momentum=1.0)
        assert anchors(report) == anchors(expected)
        assert report.verified


def test_augmentation_without_a_view_is_told_and_marked(model, data, caplog):
    report = model.push_prototypes(DataLoader(Augmenting(data, has_view=False), 8, shuffle=True), "cpu")
    assert not report.verified
    assert not any(r.anchor.verified for r in report.prototypes)
    assert "eval_view" in caplog.text
    again = model.push_prototypes(DataLoader(Augmenting(data, has_view=False), 8, shuffle=True), "cpu", momentum=1.0)
    same = model.push_prototypes(DataLoader(Augmenting(data, has_view=False), 8, shuffle=True), "cpu", momentum=1.0)
    assert anchors(again) == anchors(same)


class Stream(IterableDataset):
    def __init__(self, data, order, with_ids):
        self.data, self.order, self.with_ids = data, order, with_ids

    def __iter__(self):
        for i in self.order:
            yield (*self.data[i], f"sample-{i:02d}") if self.with_ids else self.data[i]


def test_streams_with_ids_do_not_depend_on_their_order(model, data):
    data.tensors[0][20:] = data.tensors[0][:20]  # each image twice: ties
    reports = [
        model.push_prototypes(DataLoader(Stream(data, order, True), batch_size=size), "cpu", momentum=1.0)
        for order, size in ((range(40), 8), (torch.randperm(40).tolist(), 3))
    ]
    assert anchors(reports[0]) == anchors(reports[1])
    assert reports[0].verified
    for r in reports[0].prototypes:
        assert int(r.anchor.sample_id.removeprefix("sample-")) % 4 == r.class_index


def test_streams_without_ids_are_marked_unverified(model, data, caplog):
    report = model.push_prototypes(DataLoader(Stream(data, range(40), False), batch_size=8), "cpu")
    assert not report.verified
    assert "marked unverified" in caplog.text


def test_cap_is_kept_seeded_and_ends_early(model, data):
    read = []

    class Counting(TensorDataset):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    counted = Counting(*data.tensors)
    loader = DataLoader(counted, batch_size=4)
    report = model.push_prototypes_local(loader, "cpu", momentum=1.0, max_patches_per_class=120)
    assert report.patches_per_class == [120] * 4
    assert report.images_per_class == [3] * 4  # 49 + 49 + 22
    assert len(read) < 40
    assert any(r.anchor.sample_id > 12 for r in report.prototypes)  # not simply the first images
    same = model.push_prototypes_local(
        DataLoader(data, 7, shuffle=True), "cpu", momentum=1.0, max_patches_per_class=120
    )
    assert anchors(same) == anchors(report)
    other = model.push_prototypes_local(loader, "cpu", momentum=1.0, max_patches_per_class=120, seed=1)
    assert anchors(other) != anchors(report)
    everything = model.push_prototypes_local(loader, "cpu", momentum=1.0, max_patches_per_class=5000)
    assert anchors(everything) == anchors(model.push_prototypes(loader, "cpu", momentum=1.0))


def test_full_classes_are_passed_over_unread(model, data):
    read = []

    class Labelled(TensorDataset):
        def describe(self, index):
            return Provenance(index)

        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    uneven = torch.cat([torch.zeros(37, dtype=torch.long), torch.tensor([1, 2, 3])])
    dataset = Labelled(data.tensors[0], uneven)
    dataset.labels = uneven.tolist()
    report = model.push_prototypes_local(DataLoader(dataset, batch_size=4), "cpu", max_patches_per_class=49)
    assert report.patches_per_class == [49] * 4
    assert len(read) < 20


@pytest.mark.parametrize("workers", [0, 2])
def test_leaves_no_trace(model, data, workers):
    model.train()
    model.norm.eval()  # a submodule that somebody froze
    modes = [m.training for m in model.modules()]
    statistics = {k: v.clone() for k, v in model.norm.state_dict().items()}
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(Augmenting(data), 8, shuffle=True, generator=generator, num_workers=workers)
    states = torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].copy()
    model.head.proto_manager.prototypes.grad = torch.ones(20, 8)
    model.push_prototypes(loader, "cpu")
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, statistics[k]) for k, v in model.norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    assert random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[3]).all()
    assert torch.equal(model.head.proto_manager.prototypes.grad, torch.ones(20, 8))
    assert all(p.grad is None for n, p in model.named_parameters() if not n.endswith("prototypes"))
    assert model.head.proto_manager.prototypes.requires_grad


def test_dropout_is_inactive_and_the_result_repeats(model, data):
    model.train()
    loader = DataLoader(data, 8, shuffle=True)
    first, second = (model.push_prototypes(loader, "cpu", momentum=1.0) for _ in range(2))
    model.eval()
    third = model.push_prototypes(loader, "cpu", momentum=1.0)
    assert first.prototypes == second.prototypes == third.prototypes


def test_non_finite_features_name_the_samples_and_change_nothing(model, data):
    data.tensors[0][[3, 17]] = torch.nan
    data.tensors[0][5, 0, 0, 0] = torch.inf
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError, match=r"3 samples: 3, 5, 17; .*nothing was changed"):
        model.push_prototypes(DataLoader(data, 8, shuffle=True), "cpu")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.head.proto_manager.anchors == [None] * 20
    assert model.training


def test_a_class_without_a_sample_keeps_its_prototypes(model, data, caplog):
    only = Subset(data, [i for i in range(40) if i % 4 != 2])
    before = model.head.proto_manager.prototypes.detach().clone()
    report = model.push_prototypes(DataLoader(only, 8), "cpu", momentum=0.0)
    assert report.kept_classes == [2]
    assert torch.equal(model.head.proto_manager.prototypes[10:15], before[10:15])
    assert model.head.proto_manager.anchors[10:15] == [None] * 5
    assert "Class 2 has no sample" in caplog.text
    assert "no sample: prototypes kept" in str(report)


def test_moments_of_pushed_prototypes_are_reset(model, data):
    manager = model.head.proto_manager
    optimizer = torch.optim.AdamW(model.parameters())
    manager.prototypes.sum().backward()
    optimizer.step()
    assert optimizer.state[manager.prototypes]["exp_avg"].abs().min() > 0
    only = Subset(data, [i for i in range(40) if i % 4 != 3])
    model.push_prototypes(DataLoader(only, 8), "cpu", optimizer=optimizer)
    for key in ("exp_avg", "exp_avg_sq"):
        assert optimizer.state[manager.prototypes][key][:15].abs().max() == 0
        assert optimizer.state[manager.prototypes][key][15:].abs().min() > 0
    assert optimizer.state[manager.prototypes]["step"] == 1


@pytest.mark.parametrize(("change", "message"), [
    (lambda m, d: m.push_prototypes(DataLoader(d, 8), "cpu", momentum=1.5), "momentum is 1.5; expected 0"),
    (lambda m, d: m.push_prototypes_local(DataLoader(d, 8), "cpu", max_patches_per_class=0), "expected at least 1"),
    (lambda m, d: m.push_prototypes(DataLoader(TensorDataset(d.tensors[0], d.tensors[1] + 1), 8), "cpu"),
     r"label 4 of sample 3; expected 0 to 3"),
    (lambda m, d: m.push_prototypes(DataLoader(TensorDataset(d.tensors[0]), 8), "cpu"), r"expected \(images, labels\)"),
    (lambda m, d: m.push_prototypes([], "cpu"), "yields no batch"),
    (lambda m, d: m.push_prototypes(DataLoader(d, 8), "meta"), "move the model there first"),
    (lambda m, d: push_prototypes(nn.Linear(1, 1), DataLoader(d, 8), "cpu"), "no extract_features, no head.proj"),
    (lambda m, d: m.push_prototypes(DataLoader(TensorDataset(d.tensors[0], torch.rand(40, 4)), 8), "cpu"),
     r"expected class numbers"),
])  # fmt: skip
def test_bad_input_gets_one_clear_line_and_changes_nothing(model, data, change, message):
    before = model.head.proto_manager.prototypes.detach().clone()
    with pytest.raises(InputError, match=message) as caught:
        change(model, data)
    assert "\n" not in str(caught.value)
    assert torch.equal(model.head.proto_manager.prototypes, before)


def test_collate_that_drops_samples_is_refused(model, data):
    def collate(batch):
        return torch.stack([b[0] for b in batch[1:]]), torch.stack([b[1] for b in batch[1:]])

    with pytest.raises(InputError, match=re.escape("collate_fn made 7 labels of 8 samples")):
        model.push_prototypes(DataLoader(data, 8, collate_fn=collate), "cpu")


def test_half_precision_prototypes_and_images_of_other_shapes(toy, data):
    model = toy(4, 2, 6)
    model.head.proto_manager.prototypes.data = model.head.proto_manager.prototypes.data.bfloat16()
    wide = TensorDataset(torch.randn(8, 6, 3, 12), torch.arange(8) % 4)
    report = model.push_prototypes(DataLoader(wide, 3), "cpu", momentum=0.0)
    assert {r.anchor.region for r in report.prototypes} <= set(Regions.grid((3, 12), (3, 12)).boxes)
    assert model.head.proto_manager.prototypes.dtype == torch.bfloat16
