"""The review app: a page on this computer where people view predictions and prototypes, and decide about these."""
