"""Loaders of other people: samplers of their own, batches that are dicts, labels in a column."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler, TensorDataset

from protopush import InputError, push_prototypes


@pytest.fixture
def data() -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(40, 9, 6), torch.tensor([0, 1] * 20))


class Half(Sampler[int]):
    """Draws from the first half alone: the other one is for validation."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        yield from (torch.randperm(self.count // 2)).tolist()

    def __len__(self) -> int:
        return self.count // 2


class PairsOfHalf(Half):
    """The same as a sampler of batches."""

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        order = list(super().__iter__())
        yield from (order[i : i + 2] for i in range(0, len(order), 2))


def chosen(toy, loader) -> set[int]:
    model = toy(classes=2, prototypes=4)
    report = push_prototypes(model, loader, "cpu", momentum=0.0)
    return {one.anchor.sample_id for one in report.prototypes if one.anchor}


@pytest.mark.parametrize("how", [{"sampler": Half(40), "batch_size": 3}, {"batch_sampler": PairsOfHalf(40)}])
def test_only_what_a_sampler_of_ones_own_draws_may_become_an_anchor(toy, data, how):
    state = torch.get_rng_state()
    torch.manual_seed(1)
    found = chosen(toy, DataLoader(data, **how))
    assert found <= set(range(20))
    torch.manual_seed(1)
    first = TensorDataset(*(part[:20] for part in data.tensors))
    assert found == chosen(toy, DataLoader(first, batch_size=5))
    torch.set_rng_state(state)


@pytest.mark.parametrize("sampler", [SequentialSampler, RandomSampler])
def test_known_samplers_draw_from_all(toy, data, sampler):
    torch.manual_seed(1)
    found = chosen(toy, DataLoader(data, sampler=sampler(data), batch_size=7))
    torch.manual_seed(1)
    assert found == chosen(toy, DataLoader(data, batch_size=40))


def as_dicts(items, names=("image", "label")):
    return [dict(zip(names, item, strict=True)) for item in items]


@pytest.mark.parametrize("names", [("image", "label"), ("pixel_values", "labels"), ("img", "targets")])
def test_batches_may_be_dicts(toy, data, names):
    torch.manual_seed(1)
    found = chosen(toy, DataLoader(as_dicts(data, names), batch_size=6, shuffle=True))
    torch.manual_seed(1)
    assert found == chosen(toy, DataLoader(data, batch_size=6))


def test_labels_may_stand_in_a_column(toy, data):
    torch.manual_seed(1)
    column = TensorDataset(data.tensors[0], data.tensors[1].unsqueeze(1))
    found = chosen(toy, DataLoader(column, batch_size=6))
    torch.manual_seed(1)
    assert found == chosen(toy, DataLoader(data, batch_size=6))


def test_other_batches_are_refused_with_their_keys(toy, data):
    loader = DataLoader(as_dicts(data, ("picture", "label")), batch_size=4)
    with pytest.raises(
        InputError, match=r"a dict with picture, label; expected one of image, images, img, pixel_values"
    ):
        push_prototypes(toy(classes=2, prototypes=4), loader, "cpu")
    two = TensorDataset(data.tensors[0], torch.zeros(40, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"labels of shape \(4, 2\)"):
        push_prototypes(toy(classes=2, prototypes=4), DataLoader(two, batch_size=4), "cpu")
