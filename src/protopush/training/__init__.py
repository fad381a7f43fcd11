"""Training: configuration, loop, schedules and run folders."""
