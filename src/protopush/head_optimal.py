"""The prototype head at its contract's import path."""

from protopush.nn.head import HasFeatures, HeadOptimal, HeadOutput, classify

__all__ = ["HasFeatures", "HeadOptimal", "HeadOutput", "classify"]
