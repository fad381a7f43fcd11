"""Divided backbones: their parts against the whole, what is frozen, and models that cannot be divided."""

from __future__ import annotations

import pytest
import torch

from protopush import InputError, create_backbone
from protopush.backbones.division import Tail, Trunk, divide

DIVIDED = [
    ("resnet18", {}, 1, "layer3"),
    ("resnet18", {}, 3, "layer1"),
    ("resnet18", {}, "layer2.0", "layer2.0"),
    ("resnet18", {"windows": 64}, 2, "layer2"),
    ("resnet18", {"windows": [64, 96], "size": (160, 224)}, 1, "layer3"),
    ("resnet18", {"windows": [64, "full"]}, 1, "layer3"),
    ("resnet18", {"windows": {"size": 48, "stride": 48}, "window_input": 64}, 1, "layer3"),
    ("resnet18", {"stage": 3}, 1, "model.layer2"),
    ("tf_efficientnet_lite0", {"windows": 64}, 1, "blocks.4"),
    ("convnext_atto", {}, 1, "stages.2"),
    ("swin_tiny_patch4_window7_224", {}, 1, "layers.2"),
    ("vit_tiny_patch16_224", {}, 2, "blocks.9"),
    ("vit_tiny_patch16_224", {"windows": {"size": 64, "stride": 80}}, "blocks.3", "blocks.3"),
    ("mobilenetv3_small_100", {}, 2, "blocks.1"),
]


@pytest.mark.parametrize(("name", "options", "trainable", "layer"), DIVIDED)
def test_the_parts_are_the_whole(name, options, trainable, layer):
    backbone = create_backbone(name, pretrained=False, **options)
    for module in backbone.modules():  # norms that do nothing would hide one that is left out
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    backbone.eval()
    division = divide(backbone, trainable)
    trunk, tail = Trunk(backbone, division), Tail(backbone, division)
    images = torch.randn(3, 3, *backbone.preprocessing.size)
    whole, stored = backbone(images), trunk(images)
    parts = tail(stored.patches)
    assert division.layer == layer
    assert stored.patches.shape == (3, sum(run.numbers for run in tail.runs))
    torch.testing.assert_close(parts.patches, whole.patches, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.pooled, whole.pooled, rtol=1e-5, atol=1e-5)
    assert parts.regions == whole.regions == stored.regions


@pytest.mark.parametrize("options", [{}, {"windows": 64}])
def test_gradients_are_those_of_the_whole_and_the_trunk_has_none(options):
    backbone = create_backbone("resnet18", pretrained=False, **options).eval()
    wanted, images = dict(backbone.named_parameters()), torch.randn(2, 3, 224, 224)
    backbone(images).patches.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in wanted.items()}
    backbone.zero_grad()
    division = divide(backbone, 1)
    tail = Tail(backbone, division)
    tail(Trunk(backbone, division)(images).patches.detach()).patches.square().mean().backward()
    for name, parameter in backbone.named_parameters():
        if "layer4" in name:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-7)
        else:
            assert parameter.grad is None, name
            assert not parameter.requires_grad, name
    assert {p.data_ptr() for p in tail.parameters()} == {p.data_ptr() for p in backbone.parameters()}


@pytest.mark.parametrize("options", [{}, {"windows": 64}])
def test_norms_of_the_trunk_never_learn(options):
    backbone = create_backbone("resnet18", pretrained=False, **options)
    divide(backbone, 1)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone.train()(torch.randn(2, 3, 224, 224))
    moved = {name for name, value in backbone.named_buffers() if not torch.equal(value, before[name])}
    assert moved
    assert all("layer4" in name for name in moved)


def test_crops_of_anchors_are_embedded_as_windows_are():
    backbone = create_backbone("resnet18", pretrained=False, windows=64).eval()
    division = divide(backbone, 1)
    tail, crops = Tail(backbone, division), torch.randn(5, 3, 64, 64)
    torch.testing.assert_close(tail.embed_crops(crops), backbone.embed_crops(crops))
    with torch.no_grad():
        for parameter in backbone.model.backbone.model.layer4.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(tail.embed_crops(crops), backbone.embed_crops(crops))  # trunk kept, last layers not
    other = crops + 1
    torch.testing.assert_close(tail.embed_crops(other), backbone.embed_crops(other))


@pytest.mark.parametrize(
    ("name", "trainable", "text"),
    [
        ("resnet18", 5, "expected of its stages (act1, layer1, layer2, layer3, layer4) 1 to 4, or a layer behind"),
        ("resnet18", 0, "1 to 4"),
        ("resnet18", "layer9", "has no layer 'layer9'"),
        (
            "densenet121",
            "features.denseblock3.denselayer1",
            "cannot be divided behind features.denseblock3.denselayer1",
        ),
        ("fusion:resnet18+convnext_atto", 1, "expected a layer behind which"),
        ("resnet18", "layer2.0.conv1", "cannot be divided behind layer2.0.conv1"),
    ],
)
def test_what_cannot_be_divided_is_refused(name, trainable, text):
    backbone = create_backbone(name, pretrained=False)
    with pytest.raises(InputError) as refused:
        divide(backbone, trainable)
    assert text in str(refused.value)
    assert all(not module.always_eval for module in backbone.modules() if hasattr(module, "always_eval"))
