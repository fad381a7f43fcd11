"""Predictions for any number of images: a table that grows row by row, and goes on where it was cut off."""
