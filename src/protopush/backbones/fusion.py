"""Fusion of two or more backbones: their feature maps, cell by cell, mixed by a learned gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from protopush.backbones.timm_models import BuiltModel
from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, listing

GATES = ("channel", "cell")


class FusedModel(nn.Module):
    """Feature maps of the same grid, fused: in each cell a convex combination of the parts.

    Each part is projected to one width where its own differs, and layer-normalised, so that no part is louder than the
    others. From all of them together a linear layer computes the gate: a softmax over the parts, for each channel of
    each cell. That is the gated multimodal unit (Arevalo et al., 2017: its gate, too, has a value for each channel),
    with a softmax for more than two parts and LayerNorm (Ba et al., 2016) in the place of tanh.

    The gate starts at zero, so that the fused map starts as the plain mean of the normalised parts. Projections start
    orthogonal (angles are kept as far as the widths allow), from a seed of their own. A fusion that is frozen before it
    was ever trained, gate included, is therefore sensible, and the same in every run.

    Args:
        parts: two or more :class:`protopush.backbones.Backbone` with the same grid. Images come normalised for the
            first one; the others get them re-normalised, exactly, for their own mean and std.
        width: channels of the fused map; by default the first part's.
        gate: ``"channel"``: a gate for each channel of a cell; ``"cell"``: one for the whole cell (as of experts:
            Jacobs et al., 1991), which has fewer parameters and says how much of a cell is each part's.

    Raises:
        InputError: fewer than two parts, other grids than the first part's, an unknown gate or width.

    Example:
        >>> from protopush.backbones.create import create_backbone
        >>> stems = [create_backbone(nn.Conv2d(3, channels, 32, 32)) for channels in (8, 6)]
        >>> FusedModel(stems)(torch.zeros(2, 3, 64, 96)).shape
        torch.Size([2, 2, 3, 8])
    """

    output_fmt = "NHWC"

    def __init__(self, parts: Sequence[Any], width: int | None = None, gate: str = "channel") -> None:
        super().__init__()
        _check_count([part.name for part in parts])
        if gate not in GATES:
            raise InputError(f"unknown gate {gate!r}; expected one of {', '.join(GATES)}; choose one")
        if width is not None and (not isinstance(width, int) or width < 1):
            raise InputError(f"fused_dim is {width!r}; expected a number of channels above 0; correct it")
        _check_grids([(part.name, part.regions.raster) for part in parts], parts[0].preprocessing.size)
        width = width or parts[0].channels
        count = len(parts)
        self.parts = nn.ModuleList(parts)
        self.projections = nn.ModuleList(_projection(part.channels, width) for part in parts)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in parts)
        self.gate = nn.Linear(count * width, count * (width if gate == "channel" else 1))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        scale, shift = zip(*(_renormalise(parts[0].preprocessing, part.preprocessing) for part in parts), strict=True)
        # Not in the state dict: they belong to the recipe, as the preprocessing does.
        self.register_buffer("scale", torch.stack(scale), persistent=False)
        self.register_buffer("shift", torch.stack(shift), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised for the first part, to the fused map (B, h, w, width).

        Raises:
            InputError: the parts see different grids in images of this size.
        """
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        features = [part(images * scale[i] + shift[i] if i else images) for i, part in enumerate(self.parts)]
        grids = [(str(part.name), seen.regions.raster) for part, seen in zip(self.parts, features, strict=True)]
        _check_grids(grids, (images.shape[2], images.shape[3]))
        aligned = [
            norm(project(seen.patches))
            for seen, project, norm in zip(features, self.projections, self.norms, strict=True)
        ]
        parts = torch.stack(aligned, dim=2)  # (B, L, parts, width)
        gate = self.gate(parts.flatten(2)).unflatten(2, (len(aligned), -1)).softmax(dim=2)
        fused: Tensor = (gate * parts).sum(dim=2)
        return fused.reshape(fused.shape[0], *grids[0][1], -1)  # len() would fix the size of batches in an export


def fused_model(
    create: Callable[..., Any],
    names: str,
    pretrained: bool,
    options: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
) -> BuiltModel:
    """The fusion of ``a+b``, the first part's preprocessing, and the recipe.

    Args:
        create: builds a part: :func:`protopush.backbones.create_backbone`.
        names: two or more, joined by "+".
        pretrained: of all parts.
        options: ``fused_dim`` and ``gate``: width and gate of :class:`FusedModel`; ``parts``: for each part a dict of
            overrides for ``create``.
        preprocessing: overrides of the first part's. The others are built for its size.

    Raises:
        InputError: unknown options, or what ``create`` and :class:`FusedModel` refuse.
    """
    overrides = {"fused_dim": None, "gate": "channel", "parts": None, **options}
    if unknown := [key for key in options if key not in ("fused_dim", "gate", "parts")]:
        raise InputError(
            f"a fusion takes no {listing(unknown)}; expected fused_dim, gate, parts and the preprocessing; give what "
            "is meant for one part in parts=[{...}, {...}]"
        )
    split = names.split("+")
    _check_count(split)
    given = overrides["parts"] or [{}] * len(split)
    if len(given) != len(split):
        raise InputError(
            f"parts has {len(given)} entries, but fusion:{names} has {len(split)} parts; expected a dict of overrides "
            "for each; add or remove entries"
        )
    recipes = [{"name_or_module": name, **own} for name, own in zip(split, given, strict=True)]
    parts = [create(pretrained=pretrained, **{**recipes[0], **preprocessing})]
    size = parts[0].preprocessing.size
    parts += [create(pretrained=pretrained, **{**recipe, "size": size}) for recipe in recipes[1:]]
    model = FusedModel(parts, overrides["fused_dim"], overrides["gate"])
    kept = [
        {**(part.recipe or recipe), **part.preprocessing.to_dict()} for part, recipe in zip(parts, recipes, strict=True)
    ]
    recipe = {"fused_dim": overrides["fused_dim"], "gate": overrides["gate"], "parts": kept}
    return model, parts[0].preprocessing, {"name_or_module": f"fusion:{names}", **recipe}


def _check_count(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise InputError(
            f"a fusion of {listing(names) or 'nothing'} alone; expected two or more parts; give fusion:first+second, "
            "or the one backbone by its own name"
        )


def _check_grids(grids: Sequence[tuple[str, tuple[int, int]]], size: tuple[int, int]) -> None:
    if len({grid for _, grid in grids}) > 1:
        seen = listing([f"{name} {grid[0]}x{grid[1]}" for name, grid in grids])
        raise InputError(
            f"the parts see different grids in images of {size[0]}x{size[1]} pixels ({seen}); expected the same cells "
            "from all; choose parts of the same stride, or another image size"
        )


def _projection(channels: int, width: int) -> nn.Module:
    if channels == width:
        return nn.Identity()
    linear = nn.Linear(channels, width, bias=False)  # the norm after it has a bias
    nn.init.orthogonal_(linear.weight, generator=torch.Generator().manual_seed(0))
    return linear


def _renormalise(given: Preprocessing, wanted: Preprocessing) -> tuple[Tensor, Tensor]:
    """Scale and shift (3, 1, 1) that turn images normalised as ``given`` into images normalised as ``wanted``."""
    mean, std, own_mean, own_std = (
        torch.tensor(values, dtype=torch.float64).reshape(3, 1, 1)
        for values in (given.mean, given.std, wanted.mean, wanted.std)
    )
    return (std / own_std).float(), ((mean - own_mean) / own_std).float()
