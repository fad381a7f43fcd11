"""Export of a run as an ONNX file: traced, and compared with the model before it gets its name."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protopush import __version__
from protopush.backbones.create import Backbone, Features
from protopush.data.files import atomic
from protopush.data.images import sha256_of
from protopush.data.transforms import Preprocessing, as_pixels, normalised
from protopush.errors import InputError, first_line, listing
from protopush.models.model_folder import Run
from protopush.nn.head import HeadOptimal, classify
from protopush.preserve_state import preserve_state
from protopush.runs.run import quiet

INPUTS = {"float32": "images", "uint8": "pixels"}
OUTPUTS = ("logits", "similarities", "best_cells")
NEEDED = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4
BATCHES = (1, 3)  # other ones than the graph was traced with
FORMAT = 1  # of the metadata
PATCH = ("file", "sha256", "cell", "box", "sees", "image_size")  # of an anchor, in the metadata
LARGEST = 2_000_000_000  # bytes of weights; a protobuf message holds 2 GiB


class Graph(nn.Module):
    """Images to logits, similarities and best cells, all that doesn't depend on the images being constant.

    Live anchors are constants as well: their embeddings were computed when this was made.
    """

    def __init__(self, backbone: nn.Module, head: HeadOptimal) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        with torch.no_grad():
            self.register_buffer("prototypes", head.prototypes().clone())  # (num_classes, K, D), unit norm
            self.register_buffer("weights", head.weights().clone())  # (num_classes, K), 0 in unused slots

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) to logits (B, C), similarities (B, C, K) and best cells (B, C, K), int64."""
        features: Features = self.backbone(images)
        embeddings = self.head.embed_features(features)
        prototypes, weights = self.get_buffer("prototypes"), self.get_buffer("weights")
        output = classify(embeddings, prototypes, weights, self.head.bias, self.head.top_patches)
        return output.logits, output.similarities, output.cells


class FromPixels(nn.Module):
    """The graph behind the normalisation: pixels (B, H, W, 3), RGB as they lie in memory."""

    def __init__(self, graph: Graph, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.classifier, self.preprocessing = graph, preprocessing

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels uint8 (B, H, W, 3) to what :class:`Graph` gives."""
        found: tuple[Tensor, Tensor, Tensor] = self.classifier(from_pixels(pixels, self.preprocessing))
        return found


def from_pixels(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels uint8 (B, H, W, 3) as the model's input (B, 3, H, W)."""
    return normalised(pixels.permute(0, 3, 1, 2), preprocessing)


def trace(backbone: Backbone, head: HeadOptimal, input: str = "float32") -> Any:
    """The model as an ``onnx.ModelProto`` that takes any number of images.

    It names no source file: what the exporter notes of each node, the paths of this computer among it, is left out.

    Raises:
        InputError: the backbone does what can't be traced, or only for one size of batches.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph: nn.Module = Graph(backbone, head)
    images = torch.zeros(2, 3, *backbone.preprocessing.size)
    if input == "uint8":
        graph = FromPixels(graph, backbone.preprocessing)  # type: ignore[arg-type]
        images = torch.zeros(2, *backbone.preprocessing.size, 3, dtype=torch.uint8)
    log = logging.getLogger("torch.onnx")
    level = log.level
    with preserve_state(graph), quiet():  # the exporter warns of its own internals, which a user can do nothing about
        log.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                graph,
                (images,),
                dynamo=True,
                input_names=[INPUTS[input]],
                output_names=OUTPUTS,
                dynamic_shapes=[{0: torch.export.Dim("batch")}],
                verbose=False,
            )
        except Exception as cause:  # what a foreign module raises while it is traced may be anything
            reason = first_line(cause.__cause__ or cause)
            raise InputError(
                f"{backbone.name} can't be traced to ONNX ({reason}); expected a backbone without branches that depend "
                "on pixels; choose another backbone, or keep to protopush.load"
            ) from cause
        finally:
            log.setLevel(level)
    if program is None:
        raise InputError(f"{backbone.name} can't be traced to ONNX; update torch and onnxscript")
    ClearMetadataAndDocStringPass()(program.model)
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise InputError(
            f"{backbone.name} fixes the size of a batch when it is traced (len(tensor) or int(shape) in its forward?); "
            "expected one that keeps it open; write tensor.shape[0] there"
        )
    return model


class ParityError(RuntimeError):
    """The exported graph doesn't compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """A file that was written."""

    file: Path
    megabytes: float
    opset: int  # of ONNX's operators
    difference: float  # the largest one to PyTorch, of logits and similarities of a random batch

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"file": str(self.file)}


def export_onnx(run: Run, out: str | Path, tolerance: float = TOLERANCE, input: str = "float32") -> Exported:
    """Write a run as one ONNX file: ``images`` (B, 3, H, W) to what :class:`protopush.runs.onnx_export.Graph` gives.

    With ``input`` ``uint8``, ``pixels`` (B, H, W, 3) instead: RGB, resized and cropped; normalised inside.

    The file is checked by ``onnx.checker`` and compared with PyTorch in onnxruntime, on random batches of 1 and 3,
    before it takes the place of what was there.

    Args:
        run: as :func:`protopush.runs.run.open_run` opens it, on the CPU.
        out: the file to write.
        tolerance: of the difference in logits and similarities. A best cell may be another one where it is as near.
        input: ``float32`` or ``uint8``.

    Raises:
        InputError: the extra ``export`` is missing, the file can't be written, the model is too large for one file,
            has NaN among its weights, or can't be traced.
        ParityError: the outputs differ by more than ``tolerance``; nothing is written.

    Example:
        >>> export_onnx(run, "model.onnx").difference < 1e-4  # doctest: +SKIP
        True
    """
    require_extra()
    import onnx

    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a folder; expected the ONNX file to write")
    size = sum(value.numel() * value.element_size() for value in run.model.state_dict().values())
    if size > LARGEST:
        raise InputError(
            f"the model's weights take {size / 1e9:.1f} GB, and one ONNX file holds {LARGEST / 1e9:.0f} GB at most; "
            "choose a smaller backbone, or keep to protopush.load"
        )
    broken = [name for name, value in run.model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"the model holds NaN or infinity in {listing(broken, 3)}; expected numbers; train it again")
    with atomic(out) as draft:
        draft.touch()  # so that a folder which can't be written is found before the work
        model = trace(run.model.backbone, run.head, input)
        model.producer_name, model.producer_version = "protopush", __version__
        onnx.helper.set_model_props(model, metadata_of(run, input))
        onnx.save_model(model, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        difference = largest_difference(run, draft, input)
        if not difference <= tolerance:  # NaN neither
            raise ParityError(
                f"the exported graph differs from the model by {difference:.2g}, more than {tolerance:g}; nothing was "
                "written; update torch, onnxscript and onnxruntime, or allow more with --tolerance"
            )
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return Exported(out, out.stat().st_size / 1e6, opset, difference)


def metadata_of(run: Run, input: str = "float32") -> dict[str, str]:
    """All that is needed to use a run's file and to show what its prototypes stand for: each value is JSON.

    ==================  ================================================================================================
    format              of these entries: 1
    protopush_version   that wrote the file
    weights_sha256      of the run's ``model.safetensors``
    class_names         in the order of the logits
    prior               shares of the classes that ``softmax(logits)`` assumes, in that order; null: not known
    preprocessing       from a picture to ``images`` (or ``pixels``, which ends before ``normalise``), step by step;
                        ``size`` is (height, width), ``mean`` and ``std`` are in units of 0..1 pixels, ``crop_pct`` is
                        the share of the resized short side that is kept
    regions             ``boxes``, one for each patch (``cells`` counts them), and what each ``sees``: (x0, y0, x1, y1)
                        in pixels of the input; equal where nothing outside a box can change its similarity
    match               ``local`` or ``global`` (one patch, the whole picture)
    top_patches         over how many of the most similar patches a similarity is the mean
    weights, bias       (C, K), (C): logits = (weights * similarities).sum(-1) + bias; weights are 0 in unused slots
    anchors             a list, one entry for each prototype in use, and the patch that it stands for (None: unknown):
                        ``file`` is relative to the folder of the training images, ``box`` is (x0, y0, x1, y1) in pixels
                        of that upright picture, ``similarity`` the cosine of prototype and patch
    ==================  ================================================================================================

    Who is on a picture (group, patient) is left out.
    """
    head, preprocessing = run.head, run.transform.preprocessing.to_dict()
    steps = {
        "colour": "upright (EXIF), RGB, 8 bits; 16-bit grey is divided by 257, transparent pixels are laid on white",
        "resize": "keep the aspect ratio; scale = max(width / image width, height / image height) / crop_pct",
        "crop": "centre; offset = (resized - size) // 2",
        "normalise": "(pixels / 255 - mean) / std, as (3, height, width) float32",
    }
    if input == "uint8":
        steps["normalise"] = "nothing: the graph does; pixels (height, width, 3) uint8"
    anchors = []
    for c, k in head.proto_manager.used_slots():
        anchor = head.proto_manager.anchor(c, k)
        place = {"class_index": c, "class": run.class_names[c], "prototype": k}
        patch = {name: anchor and getattr(anchor, name) for name in PATCH}
        anchors.append({**place, **patch, "similarity": anchor and anchor.similarity_after})
    values = {
        "format": FORMAT,
        "protopush_version": __version__,
        "weights_sha256": sha256_of(run.folder / "model.safetensors"),
        "class_names": run.class_names,
        "prior": run.model.prior,
        "preprocessing": {**steps, **preprocessing, "crop_pct": run.transform.crop_pct},
        "regions": head.compared(run.model.backbone.regions).to_dict(),
        "match": head.match,
        "top_patches": head.top_patches,
        "weights": head.weights().tolist(),
        "bias": head.bias.tolist(),
        "anchors": anchors,
    }
    return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}


def require_extra() -> None:
    """Refuse, with an InputError and before anything is opened, to export without what that needs."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f'exporting needs {", ".join(missing)}; run: pip install "protopush[export]"')


def largest_difference(run: Run, file: Path, input: str = "float32") -> float:
    """How far an ONNX file is from a run's model on the CPU, over random batches; NaN where either gives NaN.

    A cell counts by how much less similar it is than the best one: among equals either may be named.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch in BATCHES:
        given = images = torch.randn(batch, 3, *run.transform.preprocessing.size, generator=generator)
        if input == "uint8":
            given = as_pixels(images, run.transform.preprocessing).permute(0, 2, 3, 1).contiguous()
            images = from_pixels(given, run.transform.preprocessing)
        try:
            found = session.run(list(OUTPUTS), {INPUTS[input]: given.numpy()})
        except Exception as cause:  # onnxruntime has a type for each error, none of them public
            raise ParityError(
                f"the exported graph fails on a batch of {batch} ({cause}); nothing was written"
            ) from cause
        logits, similarities, cells = (torch.from_numpy(values) for values in found)
        with preserve_state(run.model):
            wanted = run.model(images)
        near = wanted.maps.gather(-1, cells.unsqueeze(-1)).squeeze(-1)
        best = wanted.maps.amax(dim=-1)
        for one, other in ((logits, wanted.logits), (similarities, wanted.similarities), (near, best)):
            worst = torch.maximum(worst, (one - other).abs().max())
    return float(worst)
