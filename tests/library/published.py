"""The paper's optimizers with options that show, and random points and gradients for them."""

from functools import partial

import numpy as np

import spherical_optax as so

OPTIMIZERS = {
    "adam_s": partial(so.adam_s, 0.05, 0.8, 0.95),
    "adam_srt": partial(so.adam_srt, 0.05, 0.8, 0.95),
    "adam_g": partial(so.adam_g, 0.05, 0.8, 0.95),
    "sgd_mrt": partial(so.sgd_mrt, 0.02),
}


def random_arrays(seed, *shape, steps):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=(steps, *shape))
