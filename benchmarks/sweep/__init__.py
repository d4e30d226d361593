"""The runs of `lm_sweep.py`, and their report."""
