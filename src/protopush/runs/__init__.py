"""A run is a folder: open, save, verify, review, export."""
