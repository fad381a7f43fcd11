"""What people decide about a run's prototypes, and what comes of it."""
