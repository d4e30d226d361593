"""A run's life, for any example: options, loop, checkpoints, files, several processes."""
