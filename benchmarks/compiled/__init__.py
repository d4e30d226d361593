"""What `compiled_for_gpu.py` compiles and counts, and its report."""
