"""The graph of a model: what goes into the file, traced."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from protopush.backbones import Backbone, Features
from protopush.errors import InputError, first_line
from protopush.head_optimal import HeadOptimal, classify
from protopush.untouched import untouched

INPUT = "images"
OUTPUTS = ("logits", "similarities", "best_cells")


class Graph(nn.Module):
    """Images to logits, similarities and best cells, all that doesn't depend on the images being constant.

    Live anchors are constants as well: their embeddings were computed when this was made.

    Args:
        backbone: of the model.
        head: of the model, with ``local`` or ``global`` match.
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
        output = classify(embeddings, prototypes, weights, self.head.bias)
        return output.logits, output.similarities, output.cells


def trace(backbone: Backbone, head: HeadOptimal) -> Any:
    """The model as an ``onnx.ModelProto`` that takes any number of images.

    It names no source file: what the exporter notes of each node, the paths of this computer among it, is left out.

    Raises:
        InputError: the backbone does what can't be traced, or only for one size of batches.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    graph = Graph(backbone, head)
    images = torch.zeros(2, 3, *backbone.preprocessing.size)
    with untouched(graph), _quiet():
        try:
            program = torch.onnx.export(
                graph,
                (images,),
                dynamo=True,
                input_names=[INPUT],
                output_names=OUTPUTS,
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        except Exception as cause:  # what a foreign module raises while it is traced may be anything
            reason = first_line(cause.__cause__ or cause)
            raise InputError(
                f"{backbone.name} can't be traced to ONNX ({reason}); expected a backbone without branches that depend "
                "on pixels; choose another backbone, or keep to protopush.load"
            ) from cause
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


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of its own internals, which a user can do nothing about."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
