"""Edges of every link and optimizer: zeros, empty leaves, and what is not finite."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from cases import APART, CASES, DISTINCT, GRADS, make, run
from watched import PARAMS


@pytest.mark.parametrize("name", [name for name in DISTINCT if name != "adamp"])  # one test a layer
def test_what_is_not_finite_stays_in_its_group_and_shows(name):
    tx = make(name)
    clean = run(tx)  # as the others are compiled: to the last bit
    for bad in (jnp.nan, jnp.inf):
        for params, grads in [
            (PARAMS, [GRADS[0], spoil(GRADS[1], bad), *GRADS[2:]]),
            (spoil(PARAMS, bad), GRADS),
        ]:
            out = run(tx, params, grads)
            chex.assert_trees_all_equal(out["bias"], clean["bias"])
            group = jnp.arange(8) == 3
            assert not jnp.isfinite(out["conv"][..., 3]).all()
            chex.assert_trees_all_equal(out["conv"][..., ~group], clean["conv"][..., ~group])
            block = out["layers"]["stack"].at[1, :, 2:4].set(0)  # the second of four blocks
            assert not jnp.isfinite(out["layers"]["stack"][1, :, 2:4]).all()
            expected = clean["layers"]["stack"].at[1, :, 2:4].set(0)
            chex.assert_trees_all_equal(block, expected)


def spoil(tree: Any, bad: float) -> Any:
    """The tree with one bad number in a group of each spherical leaf."""
    layers = {"stack": tree["layers"]["stack"].at[1, 2, 3].set(bad)}
    return tree | {"conv": tree["conv"].at[0, 1, 2, 3].set(bad), "layers": layers}


def edge_trees(dtype):
    """Zero groups, groups of one element, empty arrays, holes and scalars, all spherical."""
    x = np.random.default_rng(0).normal(size=(3, 4))
    params = {
        "zero_group": x * [1, 0, 1, 0],
        "one_element": x[:1],
        "all_zero": 0 * x,
        "empty": x[:0],
        "scalar": x[0, 0],
        "vector": x[0],
        "tiny": x * 1e-30,
    }
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return params | {"none": None, "masked": optax.MaskedNode()}


# Arithmetic is in float32 in any case, and bfloat16 has its range.
@pytest.mark.parametrize(
    "name, dtype",
    [
        (name, dtype)
        for dtype, names in (("float32", DISTINCT), ("float16", APART))
        for name in names
        if not CASES[name].of_optax
    ],
)
def test_edges_are_neither_errors_nor_nans(name, dtype):
    start = edge_trees(dtype)
    tx = make(name, -1)
    update = jax.jit(tx.update)
    for gradient in (0, 0.5):
        params, state = start, tx.init(start)
        grads = jax.tree.map(partial(jnp.full_like, fill_value=gradient), start)
        for _ in range(3):
            updates, state = update(grads, state, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
            params = optax.apply_updates(params, updates)
        for leaf in jax.tree.leaves((params, state)):
            assert jnp.all(jnp.isfinite(leaf)), leaf


@pytest.mark.parametrize("name", ["adam_s", "adam_srt"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_without_gradient_and_eps_nothing_moves(name, dtype):
    params = jax.tree.map(lambda x: x + 1, edge_trees(dtype))
    tx = getattr(so, name)(0.1, eps=0.0, channel_axes=-1)
    after = run(tx, params, [jax.tree.map(jnp.zeros_like, params)] * 3)
    chex.assert_trees_all_equal(after, params)
