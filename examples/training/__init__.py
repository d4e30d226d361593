"""A run's life: options, loop, checkpoints, files, several processes."""
