"""What the model saw in a picture, as data and as pictures: this part looks like that part of a training image."""

from protopush.explain.explanation import ClassEvidence, Explanation, Match, explain_image
from protopush.explain.render import draw_gallery, draw_panel

__all__ = ["ClassEvidence", "Explanation", "Match", "draw_gallery", "draw_panel", "explain_image"]
