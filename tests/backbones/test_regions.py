"""Regions say where patches lie and what they see; windows and measured receptive fields keep that true."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.backbones import windows as windows_module
from protopush.backbones.create import Backbone, create_backbone
from protopush.backbones.receptive_field import receptive_fields
from protopush.backbones.windows import Windows
from protopush.data.regions import Regions
from protopush.errors import InputError

ensure_torchvision()
pytest.importorskip("timm")
pytestmark = pytest.mark.usefixtures("one_thread")

SMALL_SWIN = {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
WINDOWED: dict[str, dict[str, Any]] = {
    "tf_efficientnet_lite0": {},
    "efficientnet_b0": {},  # squeeze and excitation
    "convnext_atto": {},
    "vit_tiny_patch16_224": {"depth": 3},
    "swin_tiny_patch4_window7_224": SMALL_SWIN,
    "fusion:resnet18+convnext_atto": {},
}


def outside_changed(images: Tensor, box: tuple[float, ...], seed: int) -> Tensor:
    """The images with noise everywhere but in the box."""
    x0, y0, x1, y1 = map(int, box)
    noise = 3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    noise[..., y0:y1, x0:x1] = images[..., y0:y1, x0:x1]
    return noise


def largest_change(backbone: Backbone, images: Tensor) -> float:
    """Of the unit feature of a patch, over some patches, when all outside of what they see becomes noise."""
    with torch.no_grad():
        features = backbone(images)
        changes = []
        for i in (0, len(features.regions) // 2, len(features.regions) - 1):
            other = backbone(outside_changed(images, features.regions.sees[i], i)).patches[:, i]
            unit, after = (nn.functional.normalize(some, dim=-1) for some in (features.patches[:, i], other))
            changes.append(float((unit - after).abs().max()))
    return max(changes)


@pytest.mark.parametrize("name", WINDOWED)
def test_nothing_outside_a_window_changes_its_feature(name: str) -> None:
    torch.manual_seed(0)
    backbone = create_backbone(
        name, pretrained=False, size=(128, 160), windows={"size": 64, "stride": 32}, **WINDOWED[name]
    ).eval()
    images = torch.randn(2, 3, 128, 160)
    assert backbone.is_local
    assert len(backbone.regions) == 3 * 4
    assert largest_change(backbone, images) <= 1e-6
    with torch.no_grad():
        features = backbone(images)
        x0, y0, x1, y1 = map(int, features.regions.boxes[5])
        images[:, :, y0:y1, x0:x1] += 1
        cosine = nn.functional.cosine_similarity(backbone(images).patches[:, 5], features.patches[:, 5])
    assert float(cosine.max()) < 0.999  # the test can fail


def test_whole_model_alone_sees_the_whole_image() -> None:
    backbone = create_backbone("resnet18", pretrained=False, size=(64, 64))
    assert not backbone.is_local
    assert set(backbone.regions.sees) == {(0.0, 0.0, 64.0, 64.0)}
    assert backbone.regions.reach == "all"
    assert backbone.regions == Regions.grid((2, 2), (64, 64))


def test_windows_of_the_guide() -> None:
    found = Windows.of({"size": 56, "stride": 28}).regions((224, 224))
    assert len(found) == 49
    assert found.is_local
    assert found.reach == Regions.whole((224, 224)).reach == "box"
    backbone = create_backbone("resnet18", pretrained=False, windows={"size": 56, "stride": 28})
    assert backbone(torch.zeros(2, 3, 224, 224)).patches.shape == (2, 49, 512)


def test_windows_cover_every_image_to_its_borders() -> None:
    draw = random.Random(0)
    for _ in range(200):
        size = (draw.randint(1, 90), draw.randint(1, 90))
        sides: list[int | str] = [draw.randint(1, 70) for _ in range(draw.randint(1, 2))]
        if draw.random() < 0.3:
            sides.append("full")
        # A stride above the side would leave gaps on purpose: not here.
        strides = [draw.randint(1, side) for side in sides if isinstance(side, int)]
        found = Windows.of({"size": sides, "stride": strides}).regions(size)
        covered = torch.zeros(size)
        for x0, y0, x1, y1 in found.boxes:
            assert 0 <= x0 < x1 <= size[1]
            assert 0 <= y0 < y1 <= size[0]
            covered[int(y0) : int(y1), int(x0) : int(x1)] += 1
        assert (covered >= 1).all()
        assert len(set(found.boxes)) == len(found)


def test_maps_take_the_largest_value_over_each_pixel() -> None:
    draw = random.Random(1)
    for _ in range(60):
        size = (draw.randint(4, 40), draw.randint(4, 40))
        found = Windows.of([draw.randint(2, 30), draw.randint(2, 30)]).regions(size)
        values = torch.randn(2, len(found), generator=torch.Generator().manual_seed(draw.randint(0, 999)))
        slow = torch.full((2, *size), -torch.inf)
        for i, (x0, y0, x1, y1) in enumerate(found.boxes):
            part = slow[:, int(y0) : int(y1), int(x0) : int(x1)]
            part.copy_(torch.maximum(part, values[:, i, None, None]))
        drawn = found.map(values)
        rows, columns = drawn.shape[1:]
        assert (size[0] % rows, size[1] % columns) == (0, 0)
        whole = drawn.repeat_interleave(size[0] // rows, dim=1).repeat_interleave(size[1] // columns, dim=2)
        torch.testing.assert_close(whole, slow, rtol=0, atol=0)


def test_map_of_a_grid_is_its_cells() -> None:
    values = torch.arange(12.0).view(1, 12)
    regions = Regions.grid((3, 4), (50, 70))
    assert regions.raster == (3, 4)
    assert torch.equal(regions.map(values), values.view(1, 3, 4))
    with pytest.raises(ValueError, match="11 values for 12"):
        regions.map(values[:, 1:])


def test_features_do_not_depend_on_how_memory_divides_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", pretrained=False, size=(96, 96), windows=[32, 48, "full"]).eval()
    images = torch.randn(3, 3, 96, 96)
    with torch.no_grad():
        whole = backbone(images).patches
        monkeypatch.setitem(windows_module.PIXELS_AT_ONCE, "cpu", 1)
        torch.testing.assert_close(backbone(images).patches, whole, rtol=1e-4, atol=1e-5)
        alone = backbone.model.backbone(images[:1, :, 16:48, 32:64]).pooled[0, 0]
    regions = backbone.regions
    torch.testing.assert_close(whole[0, regions.boxes.index((32.0, 16.0, 64.0, 48.0))], alone, rtol=1e-4, atol=1e-5)


def test_a_black_image_is_seen_by_one_window_of_each_size() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("resnet18", pretrained=False, size=(96, 80), windows=[32, 48, "full"]).eval()
    seen: list[int] = []
    backbone.model.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    black = torch.zeros(1, 3, 96, 80)
    with torch.no_grad():
        found = backbone.model.forward_black(black)
        assert seen == [1, 1, 1]
        torch.testing.assert_close(found, backbone.model(black), rtol=1e-4, atol=1e-5)


def test_windows_are_enlarged_for_a_model_of_one_size() -> None:
    backbone = create_backbone(
        "vit_tiny_patch16_224", pretrained=False, depth=1, windows=[64, "full"], window_input=96
    ).eval()
    assert backbone.model.backbone.preprocessing.size == (96, 96)
    assert backbone.preprocessing.size == (224, 224)
    assert backbone(torch.zeros(1, 3, 224, 224)).patches.shape == (1, 37, 192)


def test_images_of_448_pixels() -> None:
    backbone = create_backbone("convnext_atto", pretrained=False, size=(448, 448), windows=64).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 448, 448)).patches.shape == (1, 13 * 13, 320)


def test_norm_that_takes_its_statistics_from_the_batch_is_not_local() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4, track_running_stats=False))
    backbone = create_backbone(net, size=(32, 32), windows=16)
    assert not backbone.is_local
    assert create_backbone(nn.Conv2d(3, 4, 8, 8), size=(32, 32), windows=16).is_local


@pytest.mark.parametrize(
    ("windows", "window_input", "said"),
    [
        ({"stride": 3}, None, "expected size and stride"),
        ({"size": 64, "step": 3}, None, "expected size and stride"),
        (0, None, "above 0"),
        ("whole", None, "above 0"),
        ([], None, "above 0"),
        ([64, 1.5], None, "above 0"),
        (True, None, "above 0"),
        ({"size": [64, 32], "stride": 8}, None, "have 1 strides"),
        (64, -1, "window_input -1"),
    ],
)
def test_windows_that_make_no_sense_are_refused(windows: Any, window_input: int | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        create_backbone("resnet18", pretrained=False, windows=windows, window_input=window_input)


def test_window_input_without_windows_is_refused() -> None:
    with pytest.raises(InputError, match="without windows"):
        create_backbone("resnet18", pretrained=False, window_input=96)


@pytest.mark.parametrize(
    ("options", "patches"),
    [
        ({"windows": {"size": [32, "full"], "stride": [16]}, "window_input": 64}, 10),
        ({"stage": 1}, 64),
        ({"stage": "layer2"}, 64),
    ],
)
def test_recipe_builds_the_same_backbone_again(options: dict[str, Any], patches: int) -> None:
    backbone = create_backbone("resnet18", pretrained=False, size=(64, 64), **options).eval()
    if "windows" not in options and options != {"stage": 1}:
        backbone.measure()
    again = create_backbone(pretrained=False, **backbone.recipe, **backbone.preprocessing.to_dict()).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images).patches, backbone(images).patches)
    assert again.regions == backbone.regions
    assert again.recipe == backbone.recipe


# layer by layer: kernel, stride, padding of both axes
PLAIN = [(7, 2, 3), (3, 2, 1), (3, 1, 1), (3, 2, 1)]


def by_hand(layers: list[tuple[int, int, int]], cell: int, side: int) -> tuple[float, float]:
    """The pixels of an axis that a cell sees: (o * stride - padding) to (o * stride - padding + kernel - 1), back."""
    low = high = cell
    for kernel, stride, padding in reversed(layers):
        low, high = low * stride - padding, high * stride - padding + kernel - 1
    return float(max(0, low)), float(min(side, high + 1))


@pytest.mark.parametrize("name", ["plain", "resnet18"])
def test_receptive_field_equals_a_hand_calculation(name: str) -> None:
    if name == "plain":
        channels, layers = 3, list[nn.Module]()
        for kernel, stride, padding in PLAIN:
            layers += [nn.Conv2d(channels, 6, kernel, stride, padding), nn.BatchNorm2d(6), nn.ReLU()]
            channels = 6
        backbone, known = create_backbone(nn.Sequential(*layers), size=(96, 128)), PLAIN
    else:
        backbone = create_backbone("resnet18", pretrained=False, stage=2, size=(96, 128))
        block = [(3, 1, 1)] * 2
        known = [(7, 2, 3), (3, 2, 1), *block, *block, (3, 2, 1), (3, 1, 1), *block]
    rows, columns = backbone.regions.raster
    wanted = tuple(
        (*by_hand(known, column, 128), *by_hand(known, row, 96)) for row in range(rows) for column in range(columns)
    )
    wanted = tuple((x0, y0, x1, y1) for x0, x1, y0, y1 in wanted)
    assert receptive_fields(backbone, (96, 128)) == wanted
    backbone.measure().eval()
    assert backbone.regions.sees == wanted
    assert not backbone.is_local
    assert backbone.regions.reach == "more"
    assert largest_change(backbone, torch.randn(1, 3, 96, 128)) == 0.0
    # Every edge is reached: with weights that let all through, one pixel on it changes the cell.
    for parameter in backbone.parameters():
        parameter.data.uniform_(0.5, 1.5)
    cell = backbone.regions.raster[1] + 2
    x0, y0, x1, y1 = map(int, backbone.regions.sees[cell])
    images = torch.rand(1, 3, 96, 128, dtype=torch.float64)
    net = backbone.double()
    with torch.no_grad():
        before = net(images).patches[0, cell]
        for y, x in ((y0, (x0 + x1) // 2), (y1 - 1, (x0 + x1) // 2), ((y0 + y1) // 2, x0), ((y0 + y1) // 2, x1 - 1)):
            changed = images.clone()
            changed[..., y, x] += 100
            assert not torch.equal(net(changed).patches[0, cell], before)


def test_attention_sees_everything_and_measuring_leaves_no_trace() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", pretrained=False, depth=2, stage=1, size=(64, 64)).train()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    backbone.measure()
    assert set(backbone.regions.sees) == {(0.0, 0.0, 64.0, 64.0)}
    assert torch.equal(state, torch.get_rng_state())
    assert backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("name", "stage", "channels", "raster"),
    [
        ("tf_efficientnet_lite0", 2, 40, (8, 12)),
        ("tf_efficientnet_lite0", "blocks.3", 80, (4, 6)),
        ("convnext_atto", 1, 80, (8, 12)),
        ("convnext_atto", "stages.1.blocks.0", 80, (8, 12)),
        ("vit_tiny_patch16_224", 1, 192, (4, 6)),
        ("swin_tiny_patch4_window7_224", 1, 64, (8, 12)),
        ("resnet18", -2, 256, (4, 6)),
    ],
)
def test_stage_stops_early_and_builds_no_later_layers(
    name: str, stage: int | str, channels: int, raster: tuple[int, int]
) -> None:
    options = {"vit_tiny_patch16_224": {"depth": 3}, "swin_tiny_patch4_window7_224": SMALL_SWIN}.get(name, {})
    whole = create_backbone(name, pretrained=False, size=(64, 96), **options)
    cut = create_backbone(name, pretrained=False, size=(64, 96), stage=stage, **options)
    assert (cut.channels, cut.regions.raster) == (channels, raster)
    count, before = (sum(p.numel() for p in one.parameters()) for one in (cut, whole))
    assert count < 0.8 * before
    assert all(p.requires_grad for p in cut.parameters())  # nothing that no feature depends on is left


def test_stage_gives_what_the_whole_model_computes_there() -> None:
    torch.manual_seed(0)
    whole = create_backbone("resnet18", pretrained=False, size=(64, 64)).eval()
    images = torch.randn(2, 3, 64, 64)
    seen: list[Tensor] = []
    whole.model.layer2.register_forward_hook(lambda _, __, output: seen.append(output))
    with torch.no_grad():
        whole(images)
        for stage in (2, "layer2"):
            torch.manual_seed(0)
            cut = create_backbone("resnet18", pretrained=False, size=(64, 64), stage=stage).eval()
            torch.testing.assert_close(cut(images).patches, seen[0].flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("stage", "said"), [(9, "no stage 9; expected 0 to 4"), ("layer9", "did you mean layer"), (-6, "no stage -6")]
)
def test_stage_that_is_not_there_is_refused(stage: int | str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        create_backbone("resnet18", pretrained=False, stage=stage)
