"""Models of transformers: the cells are the model's own, in order, and a run reopens without a network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import assert_prototypes_are_patches, python
from protopush import ProtoModel, load
from protopush._compat import ensure_torchvision
from protopush.backbones.create import Backbone, create_backbone
from protopush.backbones.hugging_face import read_processor
from protopush.data.features import weights_fingerprint
from protopush.data.transforms import EvalTransform, Preprocessing
from protopush.errors import InputError
from protopush.models.model_folder import Run, save_run

ensure_torchvision()
hf = pytest.importorskip("transformers")
hub = pytest.importorskip("huggingface_hub")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
VIT = {**SMALL, "patch_size": 16}
DINO = {**SMALL, "patch_size": 14, "mlp_ratio": 2}
STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
SWIN = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "patch_size": 4, "window_size": 2}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}

# class of the checkpoint -> its config, tokens in front, channels, grid of an image of 96x160 pixels
FAMILIES: dict[str, tuple[Any, int, int, tuple[int, int]]] = {
    "ViTModel": (hf.ViTConfig(**VIT), 1, 32, (6, 10)),
    "DeiTModel": (hf.DeiTConfig(**VIT), 2, 32, (6, 10)),
    "BeitModel": (hf.BeitConfig(**VIT, use_relative_position_bias=True, use_mean_pooling=False), 1, 32, (6, 10)),
    "Dinov2Model": (hf.Dinov2Config(**DINO), 1, 32, (6, 11)),
    "Dinov2WithRegistersModel": (hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4), 5, 32, (6, 11)),
    "DINOv3ViTModel": (hf.DINOv3ViTConfig(**VIT, num_register_tokens=3), 4, 32, (6, 10)),
    "DINOv3ConvNextModel": (hf.DINOv3ConvNextConfig(**STAGES), 1, 24, (3, 5)),
    "SiglipVisionModel": (hf.SiglipVisionConfig(**VIT), 0, 32, (6, 10)),
    "CLIPVisionModel": (hf.CLIPVisionConfig(**VIT), 1, 32, (6, 10)),
    "SwinModel": (hf.SwinConfig(**SWIN, image_size=96), 0, 64, (3, 5)),
    "ConvNextModel": (hf.ConvNextConfig(**STAGES), 0, 24, (3, 5)),
    "ResNetModel": (hf.ResNetConfig(**STAGES, embedding_size=8, layer_type="basic"), 0, 24, (3, 5)),
    "Dinov2Backbone": (hf.Dinov2Config(**DINO), 0, 32, (6, 11)),
    "SwinBackbone": (hf.SwinConfig(**SWIN, image_size=96), 0, 64, (3, 5)),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As with HF_HUB_OFFLINE=1, and an empty cache."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def save(folder: Path, kind: str, config: Any, **processor: Any) -> Path:
    """A checkpoint with random weights, larger than those that training starts with, so that cells differ."""
    torch.manual_seed(0)
    net = getattr(hf, kind)(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    net.save_pretrained(folder)
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    return save(tmp_path / "vit", "ViTModel", FAMILIES["ViTModel"][0])


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Backbone, nn.Module]:
    """A backbone, and the model itself, as transformers loads it."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    save(folder, kind, FAMILIES[kind][0])
    return kind, create_backbone(f"hf:{folder}", size=(96, 160)).eval(), getattr(hf, kind).from_pretrained(folder)


@torch.no_grad()
def test_cells_are_the_models_own_in_row_major_order(family: tuple[str, Backbone, nn.Module]) -> None:
    kind, backbone, net = family
    _, prefix, channels, grid = FAMILIES[kind]
    images = torch.randn(2, 3, 96, 160)
    pooled, patches, regions = backbone(images)
    assert (regions.raster, backbone.regions.raster, backbone.channels) == (grid, grid, channels)
    assert (pooled.shape, patches.shape) == ((2, 1, channels), (2, grid[0] * grid[1], channels))
    resized = {"ViTModel", "DeiTModel", "BeitModel", "SiglipVisionModel", "CLIPVisionModel"}
    output = net.eval()(images, **({"interpolate_pos_encoding": True} if kind in resized else {}))
    raw = output.feature_maps[-1] if kind.endswith("Backbone") else output.last_hidden_state
    if raw.ndim == 4:
        raw = torch.stack([raw[:, :, row, column] for row in range(grid[0]) for column in range(grid[1])], dim=1)
    torch.testing.assert_close(patches, raw[:, prefix:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_change_in_the_image_shows_in_its_cell(family: tuple[str, Backbone, nn.Module]) -> None:
    kind, backbone, _ = family
    rows, columns = backbone.regions.raster
    step = 14 if kind.startswith("Dinov2") else 96 // rows
    images = torch.randn(1, 3, 96, 160) * 0.1
    before = backbone(images).patches
    for row, column in [(0, columns - 1), (rows // 2, 1), (rows - 1, 2)]:
        changed = images.clone()
        changed[:, :, row * step : (row + 1) * step, column * step : (column + 1) * step] += 3
        moved = (backbone(changed).patches - before)[0].norm(dim=-1)
        peak = divmod(int(moved.argmax()), columns)
        # Only a convolution's receptive field may put the peak beside the place.
        assert max(abs(peak[0] - row), abs(peak[1] - column)) <= (kind == "ResNetModel"), (peak, (row, column))


@torch.no_grad()
def test_a_recipe_builds_it_again_and_all_can_be_trained(
    family: tuple[str, Backbone, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, backbone, _ = family
    monkeypatch.setattr("protopush.backbones.hugging_face._folder", None)  # neither hub nor folder is asked
    recipe = json.loads(json.dumps(backbone.recipe))
    again = create_backbone(pretrained=False, **recipe, **backbone.preprocessing.to_dict()).eval()
    again.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 96, 160)
    assert torch.equal(again(images).patches, backbone(images).patches)
    assert (again.recipe, again.name) == (backbone.recipe, backbone.name)
    with torch.enable_grad():  # a parameter without a gradient would hang DistributedDataParallel
        again.train()(images).patches.square().sum().backward()
    assert [name for name, p in again.named_parameters() if p.requires_grad != (p.grad is not None)] == []


# Checkpoints.


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("CLIPModel", hf.CLIPConfig(vision_config=VIT, text_config={**TEXT, "eos_token_id": 1, "bos_token_id": 0})),
        ("SiglipModel", hf.SiglipConfig(vision_config=VIT, text_config=TEXT)),
    ],
)
def test_the_vision_tower_is_taken(tmp_path: Path, kind: str, config: Any) -> None:
    save(tmp_path, kind, config)
    tower = getattr(hf, kind).from_pretrained(tmp_path).vision_model.eval()
    backbone = create_backbone(f"hf:{tmp_path}").eval()
    images = torch.randn(1, 3, 64, 64)
    expected = tower(images).last_hidden_state[:, -16:]
    torch.testing.assert_close(backbone(images).patches, expected, atol=1e-5, rtol=1e-4)


def test_a_missing_pooler_does_not_matter(tmp_path: Path) -> None:
    """Made-up weights would differ each time, and with them the key of cached features."""
    save(tmp_path, "ViTForImageClassification", FAMILIES["ViTModel"][0])
    first, second = (create_backbone(f"hf:{tmp_path}") for _ in range(2))
    assert any("pooler" in name for name in first.state_dict())
    assert weights_fingerprint(first.state_dict()) == weights_fingerprint(second.state_dict())


def test_half_precision_checkpoints_become_float32(tmp_path: Path) -> None:
    hf.ViTModel(FAMILIES["ViTModel"][0]).half().save_pretrained(tmp_path)
    backbone = create_backbone(f"hf:{tmp_path}")
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    again = create_backbone(pretrained=False, **backbone.recipe)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


@torch.no_grad()
def test_a_stage_can_be_chosen(tmp_path: Path) -> None:
    save(tmp_path, "ConvNextModel", FAMILIES["ConvNextModel"][0])
    backbone = create_backbone(f"hf:{tmp_path}", out_features=["stage2"])
    assert (backbone.channels, backbone.regions.raster) == (8, (28, 28))
    again = create_backbone(pretrained=False, **backbone.recipe)
    assert (again.channels, again.regions.raster) == (8, (28, 28))
    # The norm of a stage is new, and does nothing yet but normalise.
    means = backbone(torch.randn(1, 3, 224, 224)).patches.mean(dim=-1)
    torch.testing.assert_close(means, torch.zeros(1, 784), atol=1e-4, rtol=0)
    with pytest.raises(InputError, match="gives the maps stage2, stage4; expected one"):
        create_backbone(f"hf:{tmp_path}", out_features=["stage2", "stage4"])


def test_fields_of_the_config(vit: Path) -> None:
    backbone = create_backbone(f"hf:{vit}", hidden_dropout_prob=0.25)
    assert backbone.model.net.embeddings.dropout.p == 0.25
    assert backbone.recipe["config"]["hidden_dropout_prob"] == 0.25
    with pytest.raises(
        InputError, match="takes no hiden_act; expected fields of its ViTConfig; did you mean hidden_act"
    ):
        create_backbone(f"hf:{vit}", hiden_act="relu")


def test_state_dicts_as_torch_saves_them(vit: Path, tmp_path: Path) -> None:
    expected = create_backbone(f"hf:{vit}").state_dict()
    state = {key.removeprefix("model.net."): value for key, value in expected.items()}
    (vit / "model.safetensors").unlink()
    torch.save(state, vit / "pytorch_model.bin")
    loaded = create_backbone(f"hf:{vit}").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())
    torch.save({"model." + key.removeprefix("model."): value for key, value in expected.items()}, tmp_path / "own.pt")
    loaded = create_backbone(f"hf:{vit}", pretrained=tmp_path / "own.pt").state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.items())


class Opened:
    """Would leave a file behind if it were unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


def test_nothing_is_unpickled(vit: Path, tmp_path: Path) -> None:
    (vit / "model.safetensors").unlink()
    torch.save({"layernorm.weight": Opened(tmp_path / "trace")}, vit / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"transformers cannot build hf:.*UnpicklingError"):
        create_backbone(f"hf:{vit}")
    assert not (tmp_path / "trace").exists()


def test_a_part_of_a_fusion(vit: Path, tmp_path: Path) -> None:
    backbone = create_backbone(f"fusion:test_vit+hf:{vit}", pretrained=False)
    assert (backbone.regions.raster, backbone.channels) == ((10, 10), 64)
    vit.rename(tmp_path / "elsewhere")
    again = create_backbone(pretrained=False, **backbone.recipe, **backbone.preprocessing.to_dict())
    again.load_state_dict(backbone.state_dict())
    with pytest.raises(InputError, match=r"hf:.* 4x4"):
        create_backbone(f"fusion:hf:{tmp_path / 'elsewhere'}+test_resnet", pretrained=False)


# Preprocessing.

HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, Preprocessing(size=(48, 48))),
        ({**HALF, "size": {"height": 96, "width": 64}, "resample": 2}, ((0.5,) * 3, (0.5,) * 3, (96, 64), "bilinear")),
        ({**HALF, "size": 96, "resample": 0}, ((0.5,) * 3, (0.5,) * 3, (96, 96), "nearest")),
        (  # DINOv2's
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "do_center_crop": True},
            Preprocessing(),
        ),
        ({"size": {"shortest_edge": 96}, "crop_size": 64, "do_center_crop": False}, Preprocessing(size=(96, 96))),
        ({**HALF, "do_normalize": False}, ((0.0,) * 3, (1.0,) * 3, (48, 48), "bicubic")),
        # x / 127.5 - 1 before (x - 0) / 1: as if mean and std were 0.5
        (
            {"image_mean": [0] * 3, "image_std": [1] * 3, "rescale_factor": 1 / 127.5, "rescale_offset": True},
            ((0.5,) * 3, (0.5,) * 3, (48, 48), "bicubic"),
        ),
    ],
)
def test_image_processors(told: dict[str, Any], expected: Any) -> None:
    look = read_processor(told, (48, 48))
    wanted = expected if isinstance(expected, Preprocessing) else Preprocessing(*expected)
    assert (look.size, look.interpolation) == (wanted.size, wanted.interpolation)
    assert (look.mean, look.std) == (pytest.approx(wanted.mean), pytest.approx(wanted.std))


def test_preprocessing_is_read_and_can_be_overridden(vit: Path) -> None:
    assert create_backbone(f"hf:{vit}").preprocessing == Preprocessing(size=(64, 64))
    (vit / "processor_config.json").write_text(json.dumps({"image_processor": {**HALF, "size": 32}}))
    assert create_backbone(f"hf:{vit}").preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, (32, 32))
    (vit / "preprocessor_config.json").write_text(json.dumps({**HALF, "size": {"shortest_edge": 96}}))
    backbone = create_backbone(f"hf:{vit}", mean=(0.4, 0.4, 0.4))
    assert backbone.preprocessing == Preprocessing((0.4,) * 3, (0.5,) * 3, (96, 96))
    assert backbone.regions.raster == (6, 6)
    (vit / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*preprocessor_config\.json"):
        create_backbone(f"hf:{vit}")
    (vit / "preprocessor_config.json").write_text(json.dumps({"do_flip_channel_order": True}))
    with pytest.raises(InputError, match="wants BGR images"):
        create_backbone(f"hf:{vit}")


# Runs.


@torch.no_grad()
def test_push_and_reopen_without_the_checkpoint(tmp_path: Path) -> None:
    folder = save(tmp_path / "dino", "Dinov2WithRegistersModel", FAMILIES["Dinov2WithRegistersModel"][0])
    (folder / "preprocessor_config.json").write_text(json.dumps({**HALF, "size": {"height": 56, "width": 70}}))
    model = ProtoModel.create(f"hf:{folder}", 2, num_prototypes=2, embed_dim=8).eval()
    images, labels = torch.randn(4, 3, 56, 70), torch.tensor([0, 1, 1, 0])
    model.push_prototypes(DataLoader(TensorDataset(images, labels), batch_size=3), "cpu", momentum=0.0)
    assert_prototypes_are_patches(model, images, (4, 5))

    out = tmp_path / "run"
    out.mkdir()
    save_run(Run(model, ["a", "b"], EvalTransform(model.backbone.preprocessing), out, {}, out))
    folder.rename(tmp_path / "elsewhere")
    again = load(out)
    assert torch.equal(again(images).logits, model(images).logits)
    assert again.backbone.preprocessing == Preprocessing((0.5,) * 3, (0.5,) * 3, (56, 70))


@torch.no_grad()
def test_a_model_in_the_hubs_cache(vit: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--org--vit" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    vit.rename(snapshot)
    refs = tmp_path / "cache" / "models--org--vit" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert create_backbone("hf:org/vit").name == "hf:org/vit"


# Errors.


def told_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def lacking(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layernorm" not in key}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "cannot read the config of hf:.*"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"cannot build hf:.*no file named model\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 9), "cannot build hf:"),
        (lacking, r"the checkpoint of hf:.* lacks .*layernorm.* and \d more; expected all weights"),
        (lambda folder: told_config(folder, model_type="vitt"), "cannot read the config of hf:.*vitt"),
        (lambda folder: told_config(folder, model_type="bert"), "fails on an image|cannot build hf:"),
        (lambda folder: told_config(folder, model_type="vit_mae"), "is a vit_mae; .*vit_base_patch16_224.mae"),
        (lambda folder: told_config(folder, hidden_size=64), "cannot build hf:"),
    ],
)
def test_spoilt_checkpoints(vit: Path, spoil: Any, message: str) -> None:
    spoil(vit)
    with pytest.raises(InputError, match=message) as error:
        create_backbone(f"hf:{vit}")
    assert "\n" not in str(error.value)
    assert str(error.value).count("; ") >= 2  # the fact; what was expected; what to do


def test_no_network() -> None:
    with pytest.raises(InputError) as error:
        create_backbone("hf:facebook/dinov2-small")
    message = str(error.value)
    assert message.startswith("cannot get facebook/dinov2-small from the Hugging Face hub (LocalEntryNotFoundError: ")
    assert "\n" not in message
    assert "give hf:<a folder that holds it>" in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:./nowhere", "no such folder: './nowhere'; expected one that save_pretrained wrote"),
        ("hf:a b", "cannot get a b from the Hugging Face hub .HFValidationError"),
        ("hf:", "no such folder: ''"),
    ],
)
def test_no_such_model(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_backbone(name)


def test_transformers_is_not_installed(vit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'needs transformers .*; run: pip install "protopush\[hf\]"'):
        create_backbone(f"hf:{vit}")


def test_models_are_imported_when_they_are_needed() -> None:
    code = "import sys, protopush.backbones.create; print({'timm', 'torchvision', 'transformers'} & set(sys.modules))"
    done = python("-c", code)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_recipe_names_no_kernel_of_the_hub(key):
    """transformers would fetch and run it where the package kernels is installed."""
    config = {"model_type": "vit", **VIT, key: "somebody/kernel"}
    backbone = create_backbone("hf:vit", pretrained=False, config=config, size=(64, 64))
    assert backbone(torch.zeros(1, 3, 64, 64)).regions.raster == (4, 4)
    assert "kernel" not in json.dumps(backbone.recipe)
