"""Metadata of an ONNX file: all that is needed to use it and to show what its prototypes stand for."""

from __future__ import annotations

import json
from typing import Any

from protopush import __version__
from protopush.data.images import sha256_of
from protopush.models.model_folder import Run
from protopush.nn.prototypes import Anchor

FORMAT = 1


def metadata_of(run: Run) -> dict[str, str]:
    """The ``metadata_props`` of a run's file: each value is JSON.

    ==================  ================================================================================================
    format              of these entries: 1
    protopush_version   that wrote the file
    weights_sha256      of the run's ``model.safetensors``
    class_names         in the order of the logits
    preprocessing       from a picture to ``images``: see :func:`preprocessing_of`
    grid                (rows, columns) of the cells: cell = row * columns + column
    match               ``local`` or ``global`` (one cell, the whole picture)
    weights, bias       (C, K), (C): logits = (weights * similarities).sum(-1) + bias; weights are 0 in unused slots
    anchors             a list, one entry for each prototype in use: see :func:`anchor_of`
    ==================  ================================================================================================
    """
    head = run.head
    manager = head.proto_manager
    grid = run.model.backbone.grid if head.match == "local" else (1, 1)
    values = {
        "format": FORMAT,
        "protopush_version": __version__,
        "weights_sha256": sha256_of(run.folder / "model.safetensors"),
        "class_names": run.class_names,
        "preprocessing": preprocessing_of(run),
        "grid": grid,
        "match": head.match,
        "weights": head.weights().tolist(),
        "bias": head.bias.tolist(),
        "anchors": [anchor_of(run.class_names, (c, k), manager.anchor(c, k)) for c, k in manager.used_slots()],
    }
    return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}


def preprocessing_of(run: Run) -> dict[str, Any]:
    """What :class:`protopush.data.transforms.EvalTransform` does, in the order in which it does it.

    ``size`` is (height, width); ``mean`` and ``std`` are in units of 0..1 pixels; ``crop_pct`` is the share of the
    resized short side that the crop keeps.
    """
    return {
        "colour": "upright (EXIF), RGB, 8 bits; 16-bit grey is divided by 257",
        "resize": "keep the aspect ratio; scale = max(width / image width, height / image height) / crop_pct",
        "crop": "centre; offset = (resized - size) // 2",
        "normalise": "(pixels / 255 - mean) / std, as (3, height, width) float32",
        **run.transform.preprocessing.to_dict(),
        "crop_pct": run.transform.crop_pct,
    }


def anchor_of(class_names: list[str], slot: tuple[int, int], anchor: Anchor | None) -> dict[str, Any]:
    """The prototype of a slot (class, number) and the patch that it stands for; None in place of what isn't known.

    ``file`` is relative to the folder of the training images; ``box`` is (x0, y0, x1, y1) in pixels of that upright
    picture; ``similarity`` is the cosine of prototype and patch. Who is on the picture (group, patient) is left out.
    """
    return {
        "class_index": slot[0],
        "class": class_names[slot[0]],
        "prototype": slot[1],
        "file": anchor and anchor.file,
        "sha256": anchor and anchor.sha256,
        "cell": anchor and anchor.cell,
        "grid": anchor and anchor.grid,
        "box": anchor and anchor.box,
        "image_size": anchor and anchor.image_size,
        "similarity": anchor and anchor.similarity_after,
    }
