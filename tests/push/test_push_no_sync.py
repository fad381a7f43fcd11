"""Inside the batch loop nothing waits for the device.

Tensors on the meta device have shapes but no values: whatever would make the host wait for a GPU (``.item()``,
``.cpu()``, ``nonzero``, boolean indexing, a branch on a value) is an error there. So the loop is run on it.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from helpers import ToyNet
from protopush.push import nearest_patches as search
from protopush.push.patch_cap import NonFinite, Tally
from protopush.push.reader import DatasetSource
from protopush.push.top_candidates import TopM


@pytest.fixture
def model() -> ToyNet:
    model = ToyNet(3, 4, channels=6, dim=8).to("meta")
    model.norm = torch.nn.Identity()
    return model.eval()


def run_loop(model, key="image", cap=None, width=None, use_local=True, allow=None):
    loader = DataLoader(TensorDataset(torch.randn(40, 6, 5, 5), torch.arange(40) % 3), 7)
    top = TopM(
        torch.randn(3, 4, 8, device="meta"),
        torch.ones(3, 4, dtype=torch.bool, device="meta"),
        depth=4,
        width=width,
        by_patch=key == "patch",
    )
    query = search.Query(use_local, cap, 0, allow, width)
    with torch.no_grad():
        search._read(model, DatasetSource(loader), query, top, NonFinite(torch.device("meta")), Tally(3, cap), key)
    return top


@pytest.mark.parametrize("options", [
    {}, {"key": "patch"}, {"key": "group"}, {"cap": 100}, {"width": 6}, {"use_local": False},
    {"allow": lambda ids, grid: torch.ones(len(ids), grid[0] * grid[1], dtype=torch.bool)},
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

    def waiting(self, batch):
        WAITING[name](batch.norm)
        update(self, batch)

    monkeypatch.setattr(TopM, "update", waiting)
    with pytest.raises((RuntimeError, NotImplementedError)):
        run_loop(model)
