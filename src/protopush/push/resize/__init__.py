"""Growth and pruning: classes get another prototype where they are badly covered, and lose those that don't matter."""

from protopush.push.resize.grow import GrownPrototype, GrowthReport, grow_prototypes
from protopush.push.resize.prune import PrunedPrototype, PruningReport, prune_prototypes

__all__ = [
    "GrownPrototype",
    "GrowthReport",
    "PrunedPrototype",
    "PruningReport",
    "grow_prototypes",
    "prune_prototypes",
]
