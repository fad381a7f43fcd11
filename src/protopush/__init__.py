"""protopush: prototype image classifiers whose prototypes are real patches of real training images.

Everything public is reached lazily, so that ``import protopush`` costs nothing that is not used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protopush.backbones import Features, create_backbone
    from protopush.errors import InputError
    from protopush.growth import GrowthReport, PruningReport, grow_prototypes, prune_prototypes
    from protopush.head_optimal import HeadOptimal
    from protopush.model import ProtoModel
    from protopush.prototypes import Anchor, PrototypeManager
    from protopush.push import PushMixin, PushReport, push_prototypes, refresh_anchors
    from protopush.schedule import PushSchedule
    from protopush.training.run import load

__version__ = "0.1.0"

_HOME = {
    "Anchor": "protopush.prototypes",
    "Features": "protopush.backbones",
    "GrowthReport": "protopush.growth",
    "HeadOptimal": "protopush.head_optimal",
    "InputError": "protopush.errors",
    "ProtoModel": "protopush.model",
    "PrototypeManager": "protopush.prototypes",
    "PruningReport": "protopush.growth",
    "PushMixin": "protopush.push",
    "PushReport": "protopush.push",
    "PushSchedule": "protopush.schedule",
    "create_backbone": "protopush.backbones",
    "grow_prototypes": "protopush.growth",
    "load": "protopush.training.run",
    "prune_prototypes": "protopush.growth",
    "push_prototypes": "protopush.push",
    "refresh_anchors": "protopush.push",
}

__all__ = [
    "Anchor",
    "Features",
    "GrowthReport",
    "HeadOptimal",
    "InputError",
    "ProtoModel",
    "PrototypeManager",
    "PruningReport",
    "PushMixin",
    "PushReport",
    "PushSchedule",
    "create_backbone",
    "grow_prototypes",
    "load",
    "prune_prototypes",
    "push_prototypes",
    "refresh_anchors",
]


def __getattr__(name: str) -> Any:
    """Import the home of a public name the first time it is asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'protopush' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
