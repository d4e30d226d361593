"""Layouts of groups, and arrays in them, for the tests that compare with NumPy."""

import jax.numpy as jnp
import numpy as np

import spherical_optax as so
from oracle import rows

# A shape, and `channel_axes`.
LAYOUTS = [
    ((3, 3, 4, 5), -1),
    ((6, 5), ()),
    ((2, 7, 5), (0, -1)),
    ((2, 3, 4), (1,)),
    ((5, 6), so.blocks(-1, 2)),
    ((6, 2, 3), so.blocks(0, 3, channel_axes=-1)),
]
# How many groups lie along each axis.
COUNTS = dict(
    zip(LAYOUTS, [(1, 1, 1, 5), (1, 1), (2, 1, 5), (1, 3, 1), (1, 2), (3, 1, 3)], strict=True)
)


def random_arrays(shape, count, dtype="float64"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


def as_rows(x, axes):
    return rows(np.asarray(x, np.float64), axes)


def from_rows(x, shape, axes):
    """The array of this shape whose groups are these rows."""
    out = np.empty(x.size)
    out[rows(np.arange(x.size).reshape(shape), axes).ravel()] = x.ravel()
    return jnp.asarray(out.reshape(shape))
