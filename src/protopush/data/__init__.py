"""Samples, sources, transforms and cached features."""
