"""What the model saw in a picture, as data and as pictures: this part looks like that part of a training image."""

from protopush.explain.explanation import ClassEvidence, Explanation, Match, WhyNot, explain_batch, explain_image
from protopush.explain.gallery import draw_gallery
from protopush.explain.panel import draw_panel, draw_why_not

__all__ = [
    "ClassEvidence",
    "Explanation",
    "Match",
    "WhyNot",
    "draw_gallery",
    "draw_panel",
    "draw_why_not",
    "explain_batch",
    "explain_image",
]
