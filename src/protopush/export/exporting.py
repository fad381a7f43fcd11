"""A run as an ONNX file, checked before it gets its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from protopush import __version__
from protopush.data.files import atomic
from protopush.errors import InputError, listing
from protopush.export.graph import INPUT, OUTPUTS, trace
from protopush.export.metadata import metadata_of
from protopush.model import ProtoModel
from protopush.training.run import Run
from protopush.untouched import untouched

NEEDED = ("onnx", "onnxruntime", "onnxscript")
TOLERANCE = 1e-4
BATCHES = (1, 3)  # other ones than the graph was traced with
LARGEST = 2_000_000_000  # bytes of weights; a protobuf message holds 2 GiB


class ParityError(RuntimeError):
    """The exported graph doesn't compute what the model computes."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        file: where.
        megabytes: its size.
        opset: of ONNX's operators.
        difference: the largest one to PyTorch, of logits and similarities of a random batch.
    """

    file: Path
    megabytes: float
    opset: int
    difference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"file": str(self.file)}


def export_onnx(run: Run, out: str | Path, tolerance: float = TOLERANCE) -> Exported:
    """Write a run as one ONNX file: ``images`` (B, 3, H, W) to what :class:`protopush.export.graph.Graph` gives.

    The file is checked by ``onnx.checker`` and compared with PyTorch in onnxruntime, on random batches of 1 and 3,
    before it takes the place of what was there.

    Args:
        run: as :func:`protopush.training.run.open_run` opens it, on the CPU.
        out: the file to write.
        tolerance: of the difference in logits and similarities. A best cell may be another one where it is as near.

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
    _check_weights(run.model)
    with atomic(out) as draft:
        draft.touch()  # so that a folder which can't be written is told before the work
        model = trace(run.model.backbone, run.head)  # type: ignore[arg-type]
        model.producer_name, model.producer_version = "protopush", __version__
        onnx.helper.set_model_props(model, metadata_of(run))
        onnx.save_model(model, str(draft))
        onnx.checker.check_model(str(draft), full_check=True)
        difference = largest_difference(run, draft)
        if not difference <= tolerance:  # NaN neither
            raise ParityError(
                f"the exported graph differs from the model by {difference:.2g}, more than {tolerance:g}; nothing was "
                "written; update torch, onnxscript and onnxruntime, or allow more with --tolerance"
            )
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return Exported(out, out.stat().st_size / 1e6, opset, difference)


def require_extra() -> None:
    """Whether all that an export needs is there, told before anything is opened.

    Raises:
        InputError: it isn't.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise InputError(f'exporting needs {", ".join(missing)}; run: pip install "protopush[export]"')


def _check_weights(model: ProtoModel) -> None:
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size > LARGEST:
        raise InputError(
            f"the model's weights take {size / 1e9:.1f} GB, and one ONNX file holds {LARGEST / 1e9:.0f} GB at most; "
            "choose a smaller backbone, or keep to protopush.load"
        )
    broken = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"the model holds NaN or infinity in {listing(broken, 3)}; expected numbers; train it again")


def largest_difference(run: Run, file: Path, batches: Sequence[int] = BATCHES) -> float:
    """How far an ONNX file is from a run's model on the CPU, over random batches; NaN where either gives NaN.

    A cell counts by how much less similar it is than the best one: among equals either may be named.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = torch.zeros(())
    for batch in batches:
        images = torch.randn(batch, 3, *run.transform.preprocessing.size, generator=generator)
        try:
            found = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        except Exception as cause:  # onnxruntime has a type for each error, none of them public
            raise ParityError(
                f"the exported graph fails on a batch of {batch} ({cause}); nothing was written"
            ) from cause
        logits, similarities, cells = (torch.from_numpy(values) for values in found)
        with untouched(run.model):
            wanted = run.model(images)
        near = wanted.maps.gather(-1, cells.unsqueeze(-1)).squeeze(-1)
        for one, other in ((logits, wanted.logits), (similarities, wanted.similarities), (near, wanted.similarities)):
            worst = torch.maximum(worst, (one - other).abs().max())
    return float(worst)
