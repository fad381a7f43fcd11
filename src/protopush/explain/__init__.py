"""What the model saw in a picture, as data and as pictures: this part looks like that part of a training image."""

from protopush.explain.explaining import explain_batch, explain_image
from protopush.explain.explanation import ClassEvidence, Explanation, Match, WhyNot
from protopush.explain.render import draw_gallery, draw_panel

__all__ = [
    "ClassEvidence",
    "Explanation",
    "Match",
    "WhyNot",
    "draw_gallery",
    "draw_panel",
    "explain_batch",
    "explain_image",
]
