"""Doors to other people's training code; each imports its framework only when it is itself imported."""
