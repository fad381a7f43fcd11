"""Models for others: folders that leave this computer out, with a model card."""

from protopush.hub.card import card
from protopush.hub.folder import check, opened, save

__all__ = ["card", "check", "opened", "save"]
