"""Trees and trajectories for the tests of the wrapper that watches an optimizer."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

import spherical_optax as so

AXES = so.by_path({"conv": -1, "stack": so.blocks(-1, 4, channel_axes=0)})
CLOSE = {"rtol": 2e-5, "atol": 1e-6}  # float32 sums in another order


def random_tree(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (8,), "conv": (3, 3, 4, 8), "layers": {"stack": (2, 4, 8)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, GRADS = random_tree(0), [random_tree(seed) for seed in range(1, 6)]


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def watch(tx, **kwargs):
    return so.with_geometry(tx, **{"channel_axes": AXES} | kwargs)


def history(tx, params=PARAMS, grads=GRADS):
    """Points, gradients, updates and states after them, each stacked over the steps."""
    return scan(tx, params, stack(grads))[0]


def figures(tx, params=PARAMS, grads=GRADS):
    """What `geometry` reads after each step; arrays over the steps."""
    return jax.device_get(scan(tx, params, stack(grads))[1])


@partial(jax.jit, static_argnums=0)
def scan(tx, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        seen = (params, g, updates, state), so.geometry(state)
        return (optax.apply_updates(params, updates), state), seen

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]
