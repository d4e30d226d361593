"""The Optax contract, for every link and optimizer of the library; one row each in `cases.py`.

Edges and what is not finite are in `test_edges.py`, whose programs XLA optimizes.
"""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so
from cases import (
    CASES,
    GRADS,
    LINKS,
    WITH_RADIUS,
    cases_apart,
    distinct_cases,
    every_case,
    make,
    run,
    run_alone,
    run_uncompiled,
    state_types,
    trajectory_end,
    with_params,
    without_optax,
)
from watched import AXES, CLOSE, PARAMS, random_tree, stack

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept_and_the_state_is_stable(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, grads = random_tree(0, dtype), random_tree(1, dtype)
        tx = make(name)
        state = tx.init(params)
        updates, after = jax.eval_shape(tx.update, grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        assert state_types(after) == state_types(state)
        assert jax.tree.structure(after) == jax.tree.structure(state)

        @jax.eval_shape  # raises where a branch or the carry changes type
        def branches():
            run(tx, params, [grads, grads])
            return jax.lax.cond(
                True, lambda: tx.update(grads, state, params), lambda: (grads, state)
            )


@pytest.mark.parametrize("name", ["adam_g", "adam_s", "adam_srt", "sgd_mrt", "trace_rt"])
def test_the_dtype_of_the_momentum(name):
    momentum, argument = ("mu", "mu_dtype") if "adam" in name else ("trace", "accumulator_dtype")
    tx = CASES[name].factory(channel_axes=AXES, **{argument: jnp.bfloat16})
    stored = optax.tree.get(tx.init(PARAMS), momentum)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(stored))
    # 2^-8 relative in the momentum
    chex.assert_trees_all_close(run_uncompiled(tx), run_alone(name), rtol=0.05, atol=0.02)


# Points and gradients of four seeds, of which the second are those of run_alone.
SEEDS = [
    stack([random_tree(i + 10 * seed) for seed in (1, 0, 2, 3)]) for i in range(1 + len(GRADS))
]


@cases_apart
def test_seeds_can_be_vmapped(name):
    tx = make(name)
    params, *grads = SEEDS
    ends = jax.vmap(partial(trajectory_end, tx), in_axes=(0, 1))(params, stack(grads))
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[1], ends), run_alone(name), **CLOSE)


@distinct_cases
def test_buffers_can_be_donated_and_nothing_is_compiled_twice(name):
    tx = make(name)

    @partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = jax.tree.map(jnp.copy, tx.init(params))
    for grads in GRADS:
        params, state = step(params, state, grads)
    chex.clear_trace_counter()
    chex.assert_trees_all_close(params, run_alone(name), **CLOSE)


@every_case
def test_the_state_can_be_shaped_without_computing(name):
    tx = make(name)
    shapes = jax.eval_shape(tx.init, PARAMS)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    of_shapes = tx.init(jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(of_shapes, state)
    if name not in WITH_RADIUS:  # which needs values
        chex.assert_trees_all_equal(of_shapes, state)


@cases_apart
def test_it_runs_inside_shard_map_and_scan(name):
    """Each device has parameters of its own, and the state varies with them from init on."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    params, *grads = SEEDS
    tx = make(name)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    def each(params, grads):
        out = trajectory_end(tx, *jax.tree.map(lambda x: x[0], (params, grads)))
        return jax.tree.map(lambda x: x[None], out)

    out = jax.jit(each)(params, jax.tree.map(lambda *x: jnp.stack(x, 1), *grads))
    second = jax.tree.map(lambda x: x[1], jax.device_get(out))
    chex.assert_trees_all_close(second, run_alone(name), **CLOSE)


@cases_apart
def test_sharded_parameters_give_the_same_trajectory(name):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    specs = {
        "bias": PartitionSpec("model"),
        "conv": PartitionSpec(None, None, "data", "model"),
        "layers": {"stack": PartitionSpec("model", "data", None)},
    }

    def shard(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    tx = make(name)
    params = shard(PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
    )
    for leaf, of_shape in zip(*map(jax.tree.leaves, (state, tx.init(shapes))), strict=True):
        assert of_shape.sharding == leaf.sharding or name in WITH_RADIUS
        if leaf.shape == (1, 1, 1, 8):  # a number per group is where the groups are
            spec = PartitionSpec(None, None, None, "model")
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
    for grads in GRADS:
        updates, state = update(shard(grads), state, params)
        params = optax.apply_updates(params, updates)
        for leaf, spec in zip(jax.tree.leaves(updates), jax.tree.leaves(specs), strict=True):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)
        for leaf in jax.tree.leaves(state):
            if leaf.shape == PARAMS["conv"].shape:
                sharding = NamedSharding(mesh, specs["conv"])
                assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(run_alone(name)), **CLOSE)


@without_optax
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_strict_dtype_promotion(name, dtype):
    with jax.numpy_dtype_promotion("strict"):
        params, grads = random_tree(0, dtype), random_tree(1, dtype)
        tx = make(name)
        jax.eval_shape(lambda: tx.update(grads, tx.init(params), params))


@pytest.mark.parametrize("name", ["adam_g", "adam_s", "adam_srt", "trace_rt"])
def test_strict_dtype_promotion_with_dtypes_that_differ(name):
    """Arithmetic runs in the dtype of the updates, and the state keeps its own."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        factory = CASES[name].factory
        narrow = {"trace_rt": "accumulator_dtype"}.get(name, "mu_dtype")
        tx = factory(channel_axes=AXES, **{narrow: jnp.float32})
        wide, single = random_tree(0, "float64"), random_tree(1, "float32")
        for params, grads in [(wide, wide), (single, single)]:
            state = tx.init(params)
            updates, after = jax.eval_shape(lambda: tx.update(grads, state, params))  # noqa: B023
            assert state_types(after) == state_types(state)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    with jax.enable_x64(True):  # float64 gradients of float32 parameters
        state = tx.init(single)
        _, after = jax.eval_shape(tx.update, random_tree(2, "float64"), state, single)
        assert state_types(after) == state_types(state)


# One of each kind of state.
@pytest.mark.parametrize("name", ["adam_srt", "reproject_to_sphere", "sgd_mrt", "with_geometry"])
def test_orbax_round_trip(name, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = make(name)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", {"opt": state, "step": 1})
    with ocp.StandardCheckpointer() as checkpointer:
        target = {"opt": jax.eval_shape(tx.init, PARAMS), "step": 0}
        restored = checkpointer.restore(tmp_path / "state", target)["opt"]
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(
        tx.update(GRADS[1], restored, PARAMS), tx.update(GRADS[1], state, PARAMS)
    )


@every_case
def test_params_in_the_state_can_be_mapped(name):
    tx = make(name)
    state = tx.init(PARAMS)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    names = jax.tree.map(lambda _: "spec", PARAMS)
    specs = optax.tree.map_params(
        tx,
        lambda _, name: name,
        state,
        names,
        transform_non_params=lambda _: "whole",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # in a partition's other parts
    )
    assert set(jax.tree.leaves(specs)) <= {"spec", "whole"}


@with_params
def test_missing_params_are_refused(name):
    tx = make(name)
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params\)"):
        tx.update(GRADS[0], tx.init(PARAMS))


@every_case
def test_another_structure_is_refused_with_the_path(name):
    tx = make(name)
    state = tx.init(PARAMS)
    fewer = {key: value for key, value in PARAMS.items() if key != "conv"}
    reshaped = PARAMS | {"bias": jnp.ones(4)}
    if CASES[name].needs_params:
        with pytest.raises(ValueError, match="^conv: in the updates but not .*the parameters"):
            tx.update(GRADS[0], state, fewer)
        with pytest.raises(ValueError, match=r"^bias: \(8,\) in the updates but \(4,\)"):
            tx.update(GRADS[0], state, reshaped)
        for shape in [(), (1,)]:  # nothing is broadcast
            with pytest.raises(ValueError, match=r"^bias: \(1?,?\) in the updates"):
                tx.update(GRADS[0] | {"bias": jnp.ones(shape)}, state, PARAMS)
    if jax.tree.leaves(state) and name in LINKS:
        other = tx.init(PARAMS | {"extra": jnp.ones(3)})
        with pytest.raises(ValueError, match="^extra: in the optimizer's state but not"):
            tx.update(GRADS[0], other, PARAMS)


@pytest.mark.parametrize("name", ["scale_by_adam_srt", "scale_by_adam_g", "trace_rt"])
def test_an_unknown_transport_is_refused(name):
    args = (0.9,) if name == "trace_rt" else ()
    with pytest.raises(ValueError, match="'rt' is not one of 'rescale', 'isometric', 'none'"):
        getattr(so, name)(*args, channel_axes=-1, transport="rt")


# `optax.trace` forgets what it has no update for, and `optax.partition` refuses it.
@pytest.mark.parametrize(
    "name",
    [
        n
        for n in CASES
        if n not in ("adam_h", "adamp", "hyperball_exp", "muon_h", "rotational", "sgdp")
    ],
)
def test_a_missing_update_leaves_its_state_alone(name):
    tx = make(name)
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    updates, after = tx.update(GRADS[1], state, PARAMS)
    partial_updates, partial_after = tx.update(GRADS[1] | {"conv": None}, state, PARAMS)
    assert partial_updates["conv"] is None
    chex.assert_trees_all_equal(partial_updates["bias"], updates["bias"])
    assert jax.tree.structure(partial_after) == jax.tree.structure(after)
    for (path, kept), old, new in zip(
        jax.tree_util.tree_leaves_with_path(partial_after),
        jax.tree.leaves(state),
        jax.tree.leaves(after),
        strict=True,
    ):
        expected = old if "conv" in jax.tree_util.keystr(path) else new
        np.testing.assert_array_equal(kept, expected)
