"""The push of the library cabrnet (its ProtoPNet's ``project``) on ready-made maps, where that library is installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import protopush._compat

SIMILARITIES = {
    "cabrnet, cosine": "CosineSimilarity",  # what protopush compares by
    "cabrnet, L2": "ProtoPNetSimilarity",  # its own default
}


class NoExtractor(nn.Module):
    """Maps (B, D, h, w) as they are."""

    def forward(self, maps: Tensor, **_: Any) -> Tensor:
        """The maps."""
        return maps


def why_not() -> str:
    """Why cabrnet can't be run; empty if it can."""
    protopush._compat.ensure_torchvision()  # cabrnet imports torchvision
    try:
        import cabrnet.archs.protopnet.decision
        import cabrnet.archs.protopnet.model  # noqa: F401
    except ModuleNotFoundError as error:
        return "not installed" if error.name == "cabrnet" else f"installed, but {error.name} is missing"
    except ImportError as error:
        return f"cannot be imported: {error}"
    return ""


def build(similarity: str, prototypes: Tensor, num_classes: int) -> nn.Module:
    """A ProtoPNet of cabrnet with these prototypes (S, D), the same number for each class."""
    from cabrnet.archs.protopnet.decision import ProtoPNetClassifier
    from cabrnet.archs.protopnet.model import ProtoPNet

    count, dim = prototypes.shape
    classifier = ProtoPNetClassifier({"name": similarity}, num_classes, dim, count // num_classes)
    model = ProtoPNet(NoExtractor(), classifier)
    restart(model, prototypes)
    return model


def restart(model: Any, prototypes: Tensor) -> None:
    """Give a model the prototypes (S, D) that it started with."""
    model.classifier.prototypes.data.copy_(prototypes.view(*prototypes.shape, 1, 1))


def found_by(model: Any, loader: Any, columns: int, device: str) -> list[tuple[int, int]]:
    """The (sample, cell) that each prototype is nearest to, where samples are read in order."""
    records = model.project(loader, device, update_prototypes=False)
    return [(record["img_idx"], record["h"] * columns + record["w"]) for record in records]
