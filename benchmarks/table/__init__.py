"""The cells and runs of `reproduce_table.py`, and the table beside the paper's."""
