"""What `optimizer_step.py` times, and its report."""
