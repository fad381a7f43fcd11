"""The head's sum, its independence of the batch, and each loss against a slow version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from protopush import InputError
from protopush.backbones.create import Features
from protopush.data.regions import Regions
from protopush.models.model import ProtoModel
from protopush.nn.head import HeadOptimal, HeadOutput
from protopush.nn.losses import (
    PrototypeLoss,
    balanced_class_weights,
    cluster_loss,
    consistency_loss,
    grounding_loss,
    off_mask_loss,
    orthogonality_loss,
    separation_loss,
)
from protopush.nn.prototypes import Anchor, PrototypeManager


def features(batch: int = 3, cells: int = 49, channels: int = 16) -> Features:
    patches = torch.randn(batch, cells, channels)
    return Features(patches.mean(1, keepdim=True), patches, Regions.grid((7, cells // 7), (224, 224)))


def slow_logits(head: HeadOptimal, patches: np.ndarray) -> np.ndarray:
    """The formula of the docstring, one number at a time."""
    with torch.no_grad():
        z = head.proj(torch.from_numpy(patches)).double().numpy()
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    manager = head.proto_manager
    p = manager.prototypes.detach().double().numpy()
    w = np.log1p(np.exp(head.connections.detach().double().numpy()))
    logits = np.zeros((len(z), manager.num_classes))
    for b in range(len(z)):
        for c, (start, end) in enumerate(manager.get_prototype_indices()):
            rows = [r for r in range(start, end) if manager.valid_mask[r]]
            cosines = [sorted(z[b] @ (p[r] / np.linalg.norm(p[r])))[-head.top_patches :] for r in rows]
            terms = [w[c, r - start] * sum(some) / len(some) for r, some in zip(rows, cosines, strict=True)]
            logits[b, c] = math.exp(head.log_temperature.item()) * sum(terms) / len(rows) + head.bias[c].item()
    return logits


@pytest.mark.parametrize(("counts", "slots"), [(2, None), ([1, 3, 2], 4)])
@pytest.mark.parametrize("top_patches", [1, 2, 3, 49, 60])
@pytest.mark.parametrize("match", ["local", "global"])
def test_logits_are_the_formula_and_the_sum_of_contributions(counts, slots, match, top_patches):
    head = HeadOptimal(16, 3, counts, embed_dim=8, max_prototypes=slots, match=match, top_patches=top_patches).eval()
    torch.nn.init.normal_(head.connections)
    torch.nn.init.normal_(head.bias)
    x = features()
    out = head(x)
    used = x.patches if match == "local" else x.pooled
    np.testing.assert_allclose(out.logits.detach().numpy(), slow_logits(head, used.numpy()), atol=1e-4)
    assert torch.allclose(out.contributions.sum(-1) + head.bias, out.logits, atol=1e-6)
    assert torch.allclose(out.contributions, out.similarities * head.weights())
    mask = head.proto_manager.mask()
    assert (head.weights()[~mask] == 0).all()
    assert (head.weights()[mask] > 0).all()  # evidence is never negative
    best = (out.embeddings @ head.proto_manager.unit().flatten(0, 1).T).gather(1, out.cells.flatten(1).unsqueeze(1))
    assert torch.allclose(best.view_as(out.similarities), out.maps.amax(-1), atol=1e-6)
    if top_patches == 1 or match == "global":
        assert torch.allclose(best.view_as(out.similarities), out.similarities)


def test_a_similarity_needs_a_patch():
    with pytest.raises(InputError, match="top_patches=0; expected at least 1"):
        HeadOptimal(16, 3, top_patches=0)


def test_embeddings_have_unit_norm_and_gradients_reach_everything():
    head = HeadOptimal(16, 3, 2, embed_dim=8)
    out = head(features())
    assert torch.allclose(out.embeddings.norm(dim=-1), torch.ones(3, 49), atol=1e-6)
    F.cross_entropy(out.logits, torch.tensor([0, 1, 2])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize(("name", "options"), [
    ("convnext_atto", {}), ("resnet18", {}), ("efficientnet_b0", {}), ("mobilenetv3_small_050", {}),
    ("swin_tiny_patch4_window7_224", {}), ("vit_tiny_patch16_224", {}),
])  # fmt: skip
def test_logits_of_a_batch_are_those_of_each_image_alone(name, options):
    model = ProtoModel.create(name, num_classes=3, pretrained=False, num_prototypes=4, embed_dim=16).eval()
    size = 224 if "224" in name else 96
    images = torch.randn(3, 3, size, size)
    with torch.no_grad():
        together = model(images).logits
        alone = torch.cat([model(image.unsqueeze(0)).logits for image in images])
        other_order = model(images.flip(0)).logits.flip(0)
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, other_order, atol=1e-5)


def test_head_and_manager_refuse_nonsense():
    with pytest.raises(InputError, match="expected 'local'"):
        HeadOptimal(16, 3, 2, match="both")
    for counts, slots in ((0, None), ([1, 2], None), ([1, 2, 5], 4)):
        with pytest.raises(InputError, match="expected at least one per class"):
            PrototypeManager(3, counts, 8, slots)


def test_anchor_survives_json():
    import json

    anchor = Anchor(
        "a/1.png", 3, (96.0, 0.0, 128.0, 32.0), 0.5, 0.75, "a/1.png", "ab", "g", (1, 2, 3, 4), (0, 0, 9, 9), (300, 100)
    )
    assert Anchor.from_dict(json.loads(json.dumps(anchor.to_dict()))) == anchor
    bare = Anchor(5, 0, (0.0, 0.0, 8.0, 8.0), 0.5, 0.5, pooled=True)
    assert Anchor.from_dict(json.loads(json.dumps(bare.to_dict()))) == bare
    with pytest.raises(InputError, match="before patches had regions; expected a newer run; train again"):
        Anchor.from_dict({**bare.to_dict(), "grid": [7, 7]})


@pytest.mark.parametrize("seed", range(5))
def test_losses_against_slow_versions(seed):
    torch.manual_seed(seed)
    batch, classes, slots = 7, 4, 3
    s, labels = torch.rand(batch, classes, slots) * 2 - 1, torch.randint(classes, (batch,))
    used = torch.rand(classes, slots) > 0.3
    used[:, 0] = True
    p = F.normalize(torch.randn(classes, slots, 6), dim=-1)

    cluster = np.mean([1 - max(float(s[b, y, k]) for k in range(slots) if used[y, k]) for b, y in enumerate(labels)])
    assert float(cluster_loss(s, labels, used)) == pytest.approx(cluster, abs=1e-6)

    near = [
        1 - max(float(s[b, c, k]) for b in range(batch) if labels[b] == c)
        for c in set(labels.tolist()) for k in range(slots) if used[c, k]
    ]  # fmt: skip
    assert float(grounding_loss(s, labels, used)) == pytest.approx(np.mean(near), abs=1e-6)

    others = [
        max(float(s[b, c, k]) for c in range(classes) for k in range(slots) if c != y and used[c, k])
        for b, y in enumerate(labels)
    ]
    expected = np.mean([max(0.0, o - 0.3) for o in others])
    assert float(separation_loss(s, labels, used, 0.3)) == pytest.approx(expected, abs=1e-6)

    pairs = [
        float(p[c, i] @ p[c, j]) ** 2
        for c in range(classes) for i in range(slots) for j in range(slots) if i != j and used[c, i] and used[c, j]
    ]  # fmt: skip
    assert float(orthogonality_loss(p, used)) == pytest.approx(np.mean(pairs) if pairs else 0.0, abs=1e-6)

    use = []
    for b, y in enumerate(labels):
        e = np.array([math.exp(float(s[b, y, k]) / 0.1) if used[y, k] else 0.0 for k in range(slots)])
        use.append(e / e.sum())
    centre = [np.mean([use[j] for j in range(batch) if labels[j] == labels[b]], axis=0) for b in range(batch)]
    expected = np.mean([((u - m) ** 2).sum() for u, m in zip(use, centre, strict=True)])
    assert float(consistency_loss(s, labels, used)) == pytest.approx(expected, abs=1e-5)

    patches, outside = F.normalize(torch.randn(batch, 5, 6), dim=-1), torch.rand(batch, 5).round(decimals=1)
    out = HeadOutput(s.sum(-1), s, s, labels, patches, p)
    worst = [
        max(max(0.0, float(patches[b, cell] @ p[y, k])) * float(outside[b, cell]) for cell in range(5))
        for b, y in enumerate(labels) for k in range(slots) if used[y, k]
    ]  # fmt: skip
    assert float(off_mask_loss(out, labels, used, outside)) == pytest.approx(np.mean(worst), abs=1e-6)
    assert float(off_mask_loss(out, labels, used, torch.zeros(batch, 5))) == 0


def test_weighted_sum_and_class_weights():
    head = HeadOptimal(16, 3, 2, embed_dim=8)
    out, labels = head(features()), torch.tensor([0, 1, 1])
    total, terms = PrototypeLoss(cluster=0.5, separation=0.25)(out, labels, head.proto_manager)
    assert set(terms) == {"cross_entropy", "cluster", "separation"}
    expected = terms["cross_entropy"] + 0.5 * terms["cluster"] + 0.25 * terms["separation"]
    assert total.item() == pytest.approx(float(expected), abs=1e-6)
    assert set(PrototypeLoss()(out, labels, head.proto_manager)[1]) == {"cross_entropy"}
    weights = balanced_class_weights(torch.tensor([0] * 90 + [1] * 10), 3)
    assert float(weights[0] * 90) == pytest.approx(float(weights[1] * 10))
