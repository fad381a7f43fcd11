"""The push: prototypes of a class move towards, or onto, the nearest real patch of that class.

Names are imported when they are first asked for: recipes are made of :class:`PushSettings`, which needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protopush.push.guard import GuardDecision
    from protopush.push.options import PushOptions, PushSchedule, PushSettings
    from protopush.push.push import PushMixin, check_settings, push_prototypes
    from protopush.push.push_report import PushedPrototype, PushReport
    from protopush.push.update import refresh_anchors

_HOME = {
    "GuardDecision": "guard",
    "PushMixin": "push",
    "PushOptions": "options",
    "PushReport": "push_report",
    "PushSchedule": "options",
    "PushSettings": "options",
    "PushedPrototype": "push_report",
    "check_settings": "push",
    "push_prototypes": "push",
    "refresh_anchors": "update",
}

__all__ = [
    "GuardDecision",
    "PushMixin",
    "PushOptions",
    "PushReport",
    "PushSchedule",
    "PushSettings",
    "PushedPrototype",
    "check_settings",
    "push_prototypes",
    "refresh_anchors",
]


def __getattr__(name: str) -> Any:
    """Import the home of a name the first time it is asked for (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
