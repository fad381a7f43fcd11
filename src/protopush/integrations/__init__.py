"""Integrations in other training code; each imports its framework only when it is itself imported."""
