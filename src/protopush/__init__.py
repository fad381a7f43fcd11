"""protopush: prototype image classifiers whose prototypes are real patches of real training images.

Everything public is reached lazily, so that ``import protopush`` costs nothing that is not used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protopush.api import Run, open_run
    from protopush.backbones.create import Features, create_backbone
    from protopush.errors import InputError
    from protopush.models.model import ProtoModel
    from protopush.nn.head import HeadOptimal
    from protopush.nn.prototypes import Anchor, PrototypeManager
    from protopush.push import (
        GrowthReport,
        PruningReport,
        PushMixin,
        PushReport,
        PushSchedule,
        grow_prototypes,
        prune_prototypes,
        push_prototypes,
        refresh_anchors,
    )
    from protopush.runs.run import load

__version__ = "0.1.0"

_HOME = {
    "Anchor": "protopush.nn.prototypes",
    "Features": "protopush.backbones.create",
    "GrowthReport": "protopush.push",
    "HeadOptimal": "protopush.nn.head",
    "InputError": "protopush.errors",
    "ProtoModel": "protopush.models.model",
    "PrototypeManager": "protopush.nn.prototypes",
    "PruningReport": "protopush.push",
    "PushMixin": "protopush.push",
    "PushReport": "protopush.push",
    "PushSchedule": "protopush.push",
    "Run": "protopush.api",
    "create_backbone": "protopush.backbones.create",
    "grow_prototypes": "protopush.push",
    "load": "protopush.runs.run",
    "open_run": "protopush.api",
    "prune_prototypes": "protopush.push",
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
    "Run",
    "create_backbone",
    "grow_prototypes",
    "load",
    "open_run",
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
