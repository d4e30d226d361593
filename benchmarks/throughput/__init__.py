"""What `training_throughput.py` times, and its report."""
