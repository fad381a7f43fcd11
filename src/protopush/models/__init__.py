"""The model, its folder and its card."""
