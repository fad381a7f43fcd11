"""What an image processor of transformers does to images, read from its config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protopush.data.transforms import Preprocessing
from protopush.errors import InputError, first_line

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
INTERPOLATION_OF = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # PIL's numbers


def preprocessing_in(folder: Path, image_size: Any) -> Preprocessing:
    """What the image processor of a checkpoint does; ImageNet's preprocessing where the folder tells of none.

    Args:
        folder: of the checkpoint.
        image_size: of its config, in any form; used where the processor tells no size.

    Raises:
        InputError: a damaged file, or values that no preprocessing can have.
    """
    told: Mapping[str, Any] = {}
    for file in (folder / name for name in PROCESSOR_FILES):
        if file.is_file() and not told:
            try:
                read = json.loads(file.read_text(encoding="utf-8"))
                told = read.get("image_processor") or (read if file.name == PROCESSOR_FILES[0] else {})
            except (OSError, ValueError, AttributeError) as cause:
                raise InputError(
                    f"cannot read {file} ({first_line(cause)}); expected the JSON of an image processor; "
                    "take it from a copy of the checkpoint"
                ) from cause
    return read_processor(told, side_lengths(image_size) or Preprocessing().size)


def read_processor(told: Mapping[str, Any], size: tuple[int, int]) -> Preprocessing:
    """The preprocessing that an image processor's config tells.

    Args:
        told: a ``preprocessor_config.json``.
        size: (height, width) in pixels, where it tells none.

    Raises:
        InputError: values that no preprocessing can have.

    Example:
        >>> told = {"crop_size": {"height": 224, "width": 224}, "size": {"shortest_edge": 256}, "resample": 2}
        >>> read_processor({**told, "image_mean": [0.5, 0.5, 0.5], "do_center_crop": True}, (518, 518)).to_dict()
        {'mean': [0.5, 0.5, 0.5], 'std': [0.229, 0.224, 0.225], 'size': [224, 224], 'interpolation': 'bilinear'}
    """
    if told.get("do_flip_channel_order"):
        raise InputError(
            "the image processor wants BGR images (do_flip_channel_order); expected one for RGB; choose another model, "
            "timm has most of these families for RGB"
        )
    default = Preprocessing()
    cropped = told.get("crop_size") if told.get("do_center_crop", True) else None
    normalised = told.get("do_normalize", True)
    look = Preprocessing.from_dict(
        {
            "mean": (told.get("image_mean") or default.mean) if normalised else (0.0,) * 3,
            "std": (told.get("image_std") or default.std) if normalised else (1.0,) * 3,
            "size": side_lengths(cropped or told.get("size")) or size,
            "interpolation": INTERPOLATION_OF.get(told.get("resample", 3), default.interpolation),
        }
    )
    # Some scale pixels to another range than 0..1 first; mean and std are here in units of 0..1.
    factor, offset = round(255 * told.get("rescale_factor", 1 / 255), 6), float(bool(told.get("rescale_offset")))
    mean, std = [(m + offset) / factor for m in look.mean], [s / factor for s in look.std]
    return Preprocessing.from_dict({**look.to_dict(), "mean": mean, "std": std})


def side_lengths(size: Any) -> tuple[int, int] | None:
    """(height, width) from any of the ways in which configs tell them: 224, [224, 224], {"shortest_edge": 224}, ..."""
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge") or size.get("longest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(isinstance(side, int) for side in size):
        return size[0], size[1]
    return (size, size) if isinstance(size, int) else None
