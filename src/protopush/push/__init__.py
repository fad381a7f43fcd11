"""The push: prototypes of a class move towards, or onto, the nearest real patch of that class."""

from protopush.push.engine import PushMixin, push_prototypes
from protopush.push.report import PushedPrototype, PushReport

__all__ = ["PushMixin", "PushReport", "PushedPrototype", "push_prototypes"]
