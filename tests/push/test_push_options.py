"""One list of push options, one seam for selection rules, and a short way from a push to its first matrix product."""

from __future__ import annotations

import inspect
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

import protopush
from protopush.push.options import PushKeywords, PushOptions, PushSettings
from protopush.push.selection import RULES
from protopush.push.update import momentum_update
from protopush.training.config import PushConfig

ROOM = str(Path(protopush.__file__).parent)


@pytest.fixture
def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.randn(24, 6, 4, 4), torch.arange(24) % 3), batch_size=5, shuffle=True)


def test_the_signature_is_the_list():
    shown = inspect.signature(protopush.push_prototypes).parameters
    options = {one.name: one.default for one in fields(PushOptions)}
    assert {name: shown[name].default for name in options} == options
    assert set(shown) == {"model", "dataloader", "device", *options}


def test_what_type_checkers_see_is_the_list():
    first = [name for name in inspect.signature(protopush.PushMixin.push_prototypes).parameters if name != "self"]
    assert first == ["dataloader", "device", "use_local", "momentum", "max_patches_per_class", "options"]
    listed = {one.name: one.type for one in fields(PushOptions) if one.name not in first}
    assert PushKeywords.__annotations__.keys() == listed.keys()
    assert {name: one.__forward_arg__ for name, one in PushKeywords.__annotations__.items()} == listed


def test_recipes_have_the_settings():
    assert {one.name for one in fields(PushSettings)} <= {one.name for one in fields(PushConfig)}
    # A run measures nothing unless it is asked to.
    assert PushConfig(unique="image").settings() == PushSettings(unique="image", guard="off").settings()


def test_options_are_not_changed_on_the_way():
    with pytest.raises(FrozenInstanceError):
        PushOptions().momentum = 0.5
    with pytest.raises(TypeError, match="momentun"):
        PushOptions(momentun=0.5)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_goes_by_its_name_or_itself(toy, loader, name):
    models = [toy(3, 4), toy(3, 4)]
    models[1].load_state_dict(models[0].state_dict())
    named, itself = (
        model.push_prototypes(loader, "cpu", unique=rule)
        for model, rule in zip(models, (name, RULES[name]), strict=True)
    )
    assert named.prototypes == itself.prototypes
    assert named.unique == itself.unique


def test_a_rule_of_your_own(toy, loader):
    def by_quarter(reader, ids, cells):
        """Images that lie six apart count as one."""
        return ids % 12

    report = toy(3, 4).push_prototypes(loader, "cpu", unique=by_quarter)
    assert report.unique == ["by_quarter"] * 3
    for c in range(3):
        assert len({p.anchor.sample_id % 12 for p in report.of_class(c)}) == 4
    few = toy(3, 5).push_prototypes(loader, "cpu", unique=by_quarter)  # a class has 4 keys, but 8 images
    assert few.unique == ["image"] * 3


def test_an_interpolation_goes_by_itself(toy, loader):
    models = [toy(3, 4), toy(3, 4)]
    models[1].load_state_dict(models[0].state_dict())
    for model, how in zip(models, ("linear", momentum_update), strict=True):
        model.push_prototypes(loader, "cpu", interpolation=how)
    first, second = (model.head.proto_manager.prototypes for model in models)
    assert torch.equal(first, second)


class FirstProduct(TorchFunctionMode):
    """Remembers our functions on the stack at the first product of similarities."""

    def __init__(self) -> None:
        self.way: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__matmul__, torch.Tensor.matmul, torch.matmul, torch.bmm) and not self.way:
            frame = sys._getframe(1)
            while frame is not None:
                if frame.f_code.co_filename.startswith(ROOM):
                    self.way.insert(0, frame.f_code.co_name)
                frame = frame.f_back
        return func(*args, **(kwargs or {}))


def test_five_functions_from_a_push_to_its_first_matrix_product(toy, loader):
    with FirstProduct() as seen:
        toy(3, 4).push_prototypes(loader, "cpu", unique="image")
    assert seen.way == [
        "push_prototypes", "push_prototypes", "choose", "nearest_patches", "update",
    ]  # fmt: skip
