"""Live anchors: prototypes that are, at every step, the embeddings of real patches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from protopush.distributed import all_reduce_sum
from protopush.errors import InputError
from protopush.preserve_state import preserve_state
from protopush.push.protocol import Pushable, unwrap
from protopush.push.reader import DatasetSource, read_through

POOLED = -1  # in place of a cell: the anchor is the pooled feature


def refresh_anchors(model: nn.Module, dataloader: Iterable[Any], device: str | int | torch.device) -> int:
    """Compute the stored features of live anchors anew, from their images.

    While the backbone is trained they grow old; after the last step, this makes the saved prototypes exact. Under
    ``torch.distributed`` every rank must call it: the ranks divide the images.

    Args:
        model: as for :func:`protopush.push_prototypes`, with live anchors.
        dataloader: over the dataset of the push, whose indices the anchors keep.
        device: where the model is.

    Returns:
        The number of images that were embedded; 0 where there is no live anchor.

    Raises:
        InputError: the model's anchors aren't live, or the loader can't be read by index.
    """
    net = unwrap(model)
    manager: Any = net.head.proto_manager
    if getattr(manager, "anchor_features", None) is None:
        raise InputError("the model's anchors are not live; expected a head with anchoring='live'")
    rows = (manager.anchor_ids >= 0).nonzero().flatten()
    ids = sorted(set(manager.anchor_ids[rows].tolist()))
    with preserve_state(model, dataloader):
        source = read_through(dataloader)
        if not isinstance(source, DatasetSource):
            raise InputError(
                "live anchors are read again by their index, but the loader is a stream; expected a DataLoader over a "
                "dataset with len() and []"
            )
        features = features_at(net, source, ids, manager.anchor_ids, manager.anchor_cells, torch.device(device))
    manager.anchor_features[rows] = features[rows].to(manager.anchor_features.dtype)
    manager.anchors = [anchor and replace(anchor, similarity_after=1.0) for anchor in manager.anchors]
    net.head.sync_prototypes()  # type: ignore[attr-defined]
    return len(ids)


def features_at(
    net: Pushable, source: DatasetSource, ids: list[int], anchor_ids: Tensor, anchor_cells: Tensor, device: torch.device
) -> Tensor:
    """The features (S, C) at the anchors; 0 in slots without one."""
    found = torch.zeros(len(anchor_ids), net.head.proto_manager.anchor_features.shape[1], device=device)  # type: ignore[attr-defined]
    for images, _, numbers in source.pick(ids):
        x_fu, x_fu1 = net.extract_features(images.to(device))
        every = torch.cat([x_fu1, x_fu], dim=1)  # so that the last, -1, is the pooled one
        row, image = (anchor_ids.cpu().unsqueeze(1) == numbers.unsqueeze(0)).nonzero(as_tuple=True)
        found[row] = every[image, anchor_cells[row.to(anchor_cells.device)]].float()
    return all_reduce_sum(found)
