"""Inside the batch loop nothing waits for the device.

Tensors on the meta device have shapes but no values: whatever would make the host wait for a GPU (``.item()``,
``.cpu()``, ``nonzero``, boolean indexing, a branch on a value) is an error there. So the loop is run on it.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers import ToyNet
from protopush.push import embedding
from protopush.push.nearest_patches import nearest_patches
from protopush.push.options import PushOptions
from protopush.push.protocol import Slots
from protopush.push.reader import read_through
from protopush.push.selection import RULES
from protopush.push.top_candidates import TopM


@pytest.fixture
def model() -> ToyNet:
    model = ToyNet(3, 4, channels=6, dim=8).to("meta")
    model.norm = torch.nn.Identity()
    return model.eval()


class LoopIsOver(Exception):
    """What comes after the loop may wait."""


def run_loop(model, key="image", width=None, **options):
    """Everything up to the first line after the loop; the lists that it ends with."""
    loader = DataLoader(TensorDataset(torch.randn(40, 6, 5, 5), torch.arange(40) % 3), 7)
    model.head.proto_manager.anchor_features = None if width is None else torch.zeros(12, width, device="meta")
    unit, used = torch.randn(3, 4, 8, device="meta"), torch.ones(3, 4, dtype=torch.bool, device="meta")
    slots = Slots(torch.arange(12, device="meta").view(3, 4), used, unit)
    made = []
    init = TopM.__init__

    def remembered(self, *args):
        init(self, *args)
        made.append(self)

    def over(*_):
        raise LoopIsOver

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(TopM, "__init__", remembered)
        patch.setattr(embedding, "refuse_non_finite", over)
        with pytest.raises(LoopIsOver):
            nearest_patches(model, read_through(loader), slots, PushOptions(**options), RULES[key], 4)
    return made[0]


@pytest.mark.parametrize("options", [
    {}, {"key": "patch"}, {"key": "group"}, {"max_patches_per_class": 100}, {"width": 6}, {"use_local": False},
    {"allow": lambda ids, regions: torch.ones(len(ids), len(regions), dtype=torch.bool)},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
def test_nothing_in_the_batch_loop_waits(model, options):
    assert run_loop(model, **options).ranked.similarity.shape == (3, 4, 4)


WAITING = {
    "item": lambda x: x.max().item(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "branch": lambda x: bool((x > 0).any()),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_would_be_seen(model, monkeypatch, name):
    update = TopM.update

    def waiting(self, embeddings, norm, *others):
        WAITING[name](norm)
        update(self, embeddings, norm, *others)

    monkeypatch.setattr(TopM, "update", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_loop(model)
