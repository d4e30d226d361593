"""Language models over bytes of text: data, networks and recipes for `train_lm.py`."""
