"""What is the same in another way, of any tree, selection and chain: by vmap, scan, jit, shards.

Values are compared in float64. Rounding, even where a link magnifies it as `normalize_per_group`
does that of a small remainder, stays far from what a mistake would make. How the examples are made
is said in `test_properties.py`; those that are compiled are few, as each takes a second.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so
from numpy_programs import traced
from random_programs import chained, examples, in_its_dtypes, programs, stepper
from random_trees import select

pytestmark = pytest.mark.usefixtures("compiled_quickly")
# Of numbers along the point or of zeros, rounding is left, and links make steps of it.
EASY = ["normal", "sparse"]


def stack_trees(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


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


@examples(0.06)
@given(programs(dtypes=["float64"], kinds=EASY))
def test_vmap_and_scan_are_a_loop(program):
    with in_its_dtypes(program.tree):
        tx, runs = program.tx, [program.numbers(run) for run in range(3)]
        points = stack_trees([params for params, _ in runs])
        grads = stack_trees([stack_trees(grads) for _, grads in runs])
        found = traced(jax.vmap(partial(scanned, tx)))(points, grads)
        assert_close(found, stack_trees([trajectory(tx, *run) for run in runs]))


def stack_axes(shape: tuple[int, ...], axes: Any) -> Any:
    """`channel_axes` of layers that are stacked along a new first axis."""

    def shift(axis: int) -> int:
        return axis + 1 if axis >= 0 else axis

    if axes is None:
        return None
    if not shape:  # where any axes mean none
        return 0
    if isinstance(axes, so.Blocks):
        others = (0, *map(shift, axes.channel_axes))
        return so.blocks(shift(axes.axis), axes.count, channel_axes=others)
    return (0, *map(shift, (axes,) if isinstance(axes, int) else axes))


@examples(0.06)
@given(programs(dtypes=["float64"], kinds=EASY, reaches=["group"]))
def test_stacked_layers_are_layers(program):
    """The same groups are made, where no link looks at a whole leaf."""
    with in_its_dtypes(program.tree):
        leaves = jax.tree.leaves(program.tree)
        axes = [stack_axes(leaf.shape, a) for leaf, a in zip(leaves, program.axes, strict=True)]
        layers = [program.numbers(layer) for layer in range(3)]
        points, grads = (stack_trees(trees) for trees in zip(*layers, strict=True))
        selection = select(points, axes)
        found, _ = trajectory(chained(program.chain, selection), points, grads)
        ends = [trajectory(program.tx, *layer)[0] for layer in layers]
        assert_close(found, stack_trees(ends))


# Compiled, and of groups that are not zero, which some optimizers refuse where they see numbers.


@examples(0.01)
@given(programs(dtypes=["float64"], kinds=["normal"], shapes=[(), (3, 4), (2, 3, 4)], most_links=1))
def test_compiled_steps_are_those_of_single_operations(program):
    """Of few shapes, so that single operations are compiled once for many examples."""
    with in_its_dtypes(program.tree):
        params, grads = program.numbers()
        expected = trajectory(program.tx, params, grads[:2])
        tx, compiled = program.tx, jax.jit(program.tx.update)
        for update in (compiled, tx.update):
            point, state = jax.tree.map(jnp.asarray, params), tx.init(params)
            for g in grads[:2]:
                updates, state = update(jax.tree.map(jnp.asarray, g), state, point)
                point = optax.apply_updates(point, updates)
            assert_close((point, state), expected)


@examples(0.01)
@given(
    programs(dtypes=["float64"], kinds=["normal"], shapes=[(8,), (4, 8), (8, 2, 4), (2, 4, 1, 4)])
)
def test_sharded_steps_are_those_of_whole_arrays(program):
    rng = np.random.default_rng(program.seed)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def spec(shape: tuple[int, ...]) -> PartitionSpec:
        """Each axis of the mesh along one of the array's that it divides, or along none."""
        names: list[Any] = [None] * len(shape)
        for name, size in mesh.shape.items():
            axis = rng.integers(len(shape))
            if names[axis] is None and shape[axis] % size == 0:
                names[axis] = name
        return PartitionSpec(*names)

    with in_its_dtypes(program.tree):
        params, grads = program.numbers()
        expected = trajectory(program.tx, params, grads[:2])
        specs = jax.tree.map(lambda x: NamedSharding(mesh, spec(x.shape)), params)
        point, *grads = (jax.device_put(tree, specs) for tree in (params, *grads[:2]))
        state, update = program.tx.init(point), jax.jit(program.tx.update)
        for g in grads:
            updates, state = update(g, state, point)
            point = optax.apply_updates(point, updates)
        assert_close(jax.device_get((point, state)), expected)
