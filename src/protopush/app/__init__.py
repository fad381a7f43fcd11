"""The review app: a page on this computer where people look at predictions and prototypes, and decide about these."""
