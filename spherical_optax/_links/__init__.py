"""The links and the optimizers, a file for each paper, and what they share."""
