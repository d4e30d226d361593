"""A radially invariant function, its gradient, and comparisons, for the tests of the theory."""

import jax
import jax.numpy as jnp
import numpy as np

# Rounding of some tens of float64 operations, times the steps.
ROUNDING = 1e-12
D, GROUPS = 7, 3
SHAPE = (D, GROUPS)
FORM, LINE = (np.random.default_rng(0).normal(size=shape) for shape in ((GROUPS, D, D), SHAPE))


def random_arrays(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def quadratic(x):
    """The sum over the columns of <u, A u> + <b, u> with u = x/|x|."""
    u = x / jnp.linalg.norm(x, axis=0)
    return jnp.einsum("ig,gij,jg->", u, FORM, u) + jnp.sum(LINE * u)


gradient = jax.jit(jax.grad(quadratic))


def assert_close(actual, expected, tolerance=ROUNDING):
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.max(np.abs(actual - expected)) <= tolerance * np.max(np.abs(expected))
