"""Layouts of groups, and arrays in them, for the tests that compare with NumPy."""

import jax.numpy as jnp
import numpy as np

from oracle import rows

LAYOUTS = [((3, 3, 4, 5), -1), ((6, 5), ()), ((2, 7, 5), (0, -1)), ((2, 3, 4), (1,))]


def random_arrays(shape, count, dtype="float64"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def as_rows(x, axes):
    return rows(np.asarray(x, np.float64), axes)
