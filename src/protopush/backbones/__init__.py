"""Feature extractors: images to patch features and a pooled feature."""

from protopush.backbones.create import Backbone, Features, create_backbone

__all__ = ["Backbone", "Features", "create_backbone"]
