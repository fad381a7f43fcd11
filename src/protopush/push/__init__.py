"""The push: prototypes of a class move towards, or onto, the nearest real patch of that class; growth and pruning.

Names are imported when they are first asked for: recipes are made of :class:`PushSettings`, which needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protopush.push.guard import GuardDecision
    from protopush.push.options import PushOptions, PushSchedule, PushSettings
    from protopush.push.push import PushMixin, check_settings, push_prototypes
    from protopush.push.push_report import GrowthReport, PruningReport, PushedPrototype, PushReport
    from protopush.push.resize import grow_prototypes, prune_prototypes
    from protopush.push.update import refresh_anchors

__all__ = [
    "GrowthReport",
    "GuardDecision",
    "PruningReport",
    "PushMixin",
    "PushOptions",
    "PushReport",
    "PushSchedule",
    "PushSettings",
    "PushedPrototype",
    "check_settings",
    "grow_prototypes",
    "prune_prototypes",
    "push_prototypes",
    "refresh_anchors",
]


def __getattr__(name: str) -> Any:
    """Import the first file that has the name when it is first asked for (PEP 562); the first needs no torch."""
    for home in ("options", "push", "push_report", "guard", "update", "resize") if name in __all__ else ():
        module = import_module(f"{__name__}.{home}")
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
