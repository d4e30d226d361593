"""What is the same in another way, of any tree, selection and chain: vmap, scan, stacks, jit, shards.

Values are compared in float64. Rounding, even where a link magnifies it as `normalize_per_group`
does that of a small remainder, stays far from what a mistake would make. How the examples are made
is said in `test_properties.py`; those that are compiled are few, as each takes a second.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so
from numpy_programs import traced
from random_programs import SEEDS, chained, examples, in_its_dtypes, programs, stepper
from random_trees import WIDE, random_values, select
from watched import stack

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def assert_close(found: Any, expected: Any) -> None:
    """To 1e-6 of the largest element: ten digits that rounding may take, and six that it leaves."""
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.max(abs(b), initial=1e-6))


def trajectory(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> Any:
    init, step = stepper(tx)
    state = init(params)
    for g in grads:
        _, state, params = step(g, state, params)
    return params, state


def scanned(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]


@examples(0.08)
@given(programs(WIDE, most=2), SEEDS)
def test_vmap_and_scan_are_a_loop(program, seed):
    with in_its_dtypes(program.tree):
        points, *grads = (
            stack_np([random_values(program.tree, [seed, i, run]) for run in range(3)])
            for i in range(4)
        )
        together = traced(jax.vmap(lambda x, g: scanned(program.tx, x, g), in_axes=(0, 1)))
        found = together(points, stack_np(grads))
        for run in range(3):
            x, *g = jax.tree.map(lambda leaf, run=run: leaf[run], [points, *grads])
            expected = trajectory(program.tx, x, g)
            assert_close(jax.tree.map(lambda leaf, run=run: leaf[run], found), expected)
