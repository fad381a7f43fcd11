"""Make ``import torchvision`` possible beside a torch that its wheel was not built for.

The trap: the torchvision wheels of the package index are CUDA builds. Beside a CPU-only torch their C++ extension
``_C`` cannot be loaded, so its operators are never declared, and ``import torchvision`` dies on its shape functions:

    RuntimeError: operator torchvision::nms does not exist

timm, torchmetrics and lightning_fabric import torchvision and die with it. (The other cure is to install the
torchvision wheel of the same build as torch: https://pytorch.org/get-started.)

The cure here: before any of them is imported, call :func:`ensure_torchvision`. When ``_C`` does not load it declares
the schemas (names and argument types) of the missing operators, with no implementation. The import then works, and so
does everything in torchvision that is plain Python: transforms, datasets, models. Calling one of the operators
themselves (``torch.ops.torchvision.nms``, ...) still raises torch's own NotImplementedError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@cache
def ensure_torchvision() -> None:
    """Declare torchvision's operators if its C++ extension cannot be loaded; otherwise change nothing.

    Call it before importing torchvision, timm, torchmetrics or lightning_fabric. It does its work once per process; an
    install that works, an import that has already succeeded and an absent torchvision are all left as they are.

    Example:
        >>> ensure_torchvision()
        >>> import torchvision
    """
    # None in sys.modules blocks an import on purpose; a module there has been imported already.
    if "torchvision" in sys.modules:
        return
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    if not _extension_loads(Path(spec.origin).parent):
        _declare_operators()


def _extension_loads(folder: Path) -> bool:
    """Whether torchvision's ``_C`` in ``folder`` loads beside this torch; loading it twice is harmless."""
    for suffix in EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.is_file():
            try:
                torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
            except (ImportError, OSError):  # the errors that torchvision itself takes for "not usable"
                return False
            return True
    return False


def _declare_operators() -> None:
    """Declare each schema that nobody has declared so far (another package may use the same cure)."""
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in SCHEMAS:
        if not hasattr(torch.ops.torchvision, schema.partition("(")[0]):
            library.define(schema)  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)


# The declarations last as long as their Library object.
_LIBRARIES: list[torch.library.Library] = []

# As in torchvision's C++ sources (torchvision/csrc/ops), version 0.28. Its import needs nms and qnms; the others are
# here so that code that looks them up gets NotImplementedError at the call and not AttributeError.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio, bool aligned) -> Tensor",
    "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "SymInt batch_size, SymInt channels, SymInt height, SymInt width, int sampling_ratio, bool aligned) -> Tensor",
    "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width, "
    "int sampling_ratio) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    "SymInt pooled_height, SymInt pooled_width, int sampling_ratio, SymInt batch_size, SymInt channels, "
    "SymInt height, SymInt width) -> Tensor",
    "roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, SymInt pooled_height, "
    "SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) -> Tensor",
    "ps_roi_pool(Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width) "
    "-> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, float spatial_scale, "
    "SymInt pooled_height, SymInt pooled_width, SymInt batch_size, SymInt channels, SymInt height, SymInt width) "
    "-> Tensor",
    "qroi_align(Tensor input, Tensor rois, float input_scale, int input_zero_point, float rois_scale, "
    "int rois_zero_point, float spatial_scale, SymInt pooled_height, SymInt pooled_width, int sampling_ratio, "
    "bool aligned) -> Tensor",
    "deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, SymInt stride_h, "
    "SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, SymInt groups, "
    "SymInt offset_groups, bool use_mask) -> Tensor",
    "_deform_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, "
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "box_iou_rotated(Tensor boxes1, Tensor boxes2) -> Tensor",
)


@cache
def ensure_policies() -> None:
    """Keep a bit where timm's augmentation policies would keep none.

    At its strongest level timm's posterize asks Pillow for 0 bits: a black picture up to Pillow 12, an error since 13.
    """
    ensure_torchvision()
    from timm.data import auto_augment as timm_policies

    bits_of: dict[str, Any] = timm_policies.LEVEL_TO_ARG
    for name in ("Posterize", "PosterizeIncreasing", "PosterizeOriginal"):
        bits_of[name] = _at_least_one_bit(bits_of[name])


def _at_least_one_bit(bits_of: Callable[..., tuple[int]]) -> Callable[..., tuple[int]]:
    return lambda level, hparams: (max(1, bits_of(level, hparams)[0]),)
