"""The push: prototypes of a class move towards, or onto, the nearest real patch of that class."""

from protopush.push.live_anchors import refresh_anchors
from protopush.push.push import PushMixin, check_momentum, push_prototypes
from protopush.push.push_report import PushedPrototype, PushReport

__all__ = ["PushMixin", "PushReport", "PushedPrototype", "check_momentum", "push_prototypes", "refresh_anchors"]
