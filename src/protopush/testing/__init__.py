"""Drawn images with known parts."""
