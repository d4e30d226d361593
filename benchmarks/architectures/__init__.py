"""What `atlas.py` measures, and its report."""
