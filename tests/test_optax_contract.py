"""The Optax contract, for every link and optimizer of the library; one row each in CASES."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so
from watched import AXES, CLOSE, GRADS, PARAMS, random_tree, stack


class Case(NamedTuple):
    """A factory that takes `channel_axes`, and whether its update needs the parameters."""

    factory: Callable[..., optax.GradientTransformation]
    needs_params: bool = True


def watched_adam_srt(*, channel_axes: Any) -> optax.GradientTransformation:
    tx = so.adam_srt(0.1, weight_decay=0.01, channel_axes=channel_axes)
    return so.with_geometry(tx, channel_axes=channel_axes, every=2)


CASES = {
    "adam_g": Case(partial(so.adam_g, 0.1)),
    "adam_s": Case(partial(so.adam_s, 0.1, weight_decay=0.01)),
    "adam_srt": Case(partial(so.adam_srt, 0.1, weight_decay=0.01)),
    "normalize_per_group": Case(so.normalize_per_group, needs_params=False),
    "project_to_tangent_space": Case(so.project_to_tangent_space),
    "reproject_to_sphere": Case(so.reproject_to_sphere),
    "reproject_to_sphere_of_radius": Case(partial(so.reproject_to_sphere, 2.0)),
    "scale_by_adam_g": Case(so.scale_by_adam_g),
    "scale_by_adam_s": Case(so.scale_by_adam_s, needs_params=False),
    "scale_by_adam_srt": Case(so.scale_by_adam_srt),
    "scale_by_adam_srt_isometric": Case(partial(so.scale_by_adam_srt, transport="isometric")),
    "sgd_mrt": Case(partial(so.sgd_mrt, 0.1, weight_decay=0.01)),
    "trace_rt": Case(partial(so.trace_rt, 0.9)),
    "with_geometry": Case(watched_adam_srt),
}
READY = ("adam_g", "adam_s", "adam_srt", "sgd_mrt", "with_geometry")
LINKS = [name for name in CASES if name not in READY]

every_case = pytest.mark.parametrize("name", CASES)
with_params = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.needs_params])


@cache  # so that each is compiled once for trees of the same shapes
def make(name: str, axes: Any = AXES) -> optax.GradientTransformation:
    return CASES[name].factory(channel_axes=axes)


@partial(jax.jit, static_argnums=0)
def trajectory_end(tx: optax.GradientTransformation, params: Any, grads: Any) -> Any:
    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


def run(tx: optax.GradientTransformation, params: Any = PARAMS, grads: Any = GRADS) -> Any:
    """The parameters after the gradients, in one compiled scan."""
    return trajectory_end(tx, params, stack(grads))


@cache
def run_alone(name: str) -> Any:
    return run(make(name))


def scale_by_value() -> optax.GradientTransformationExtraArgs:
    """A link that needs an extra argument."""

    def update_fn(updates, state, params=None, *, value):
        return jax.tree.map(lambda update: value * update, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update_fn)


@every_case
def test_extra_arguments_pass_through_a_chain(name):
    tx, alone = optax.chain(make(name), scale_by_value()), make(name)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=2.0)
    expected, _ = alone.update(GRADS[0], alone.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda x: 2.0 * x, expected))


HYPERPARAMETERS = {
    "adam_g": {"learning_rate": 0.1},
    "adam_s": {"learning_rate": 0.1, "weight_decay": 0.01},
    "adam_srt": {"learning_rate": 0.1, "weight_decay": 0.01},
    "normalize_per_group": {},
    "project_to_tangent_space": {},
    "reproject_to_sphere": {},
    "scale_by_adam_g": {},
    "scale_by_adam_s": {},
    "scale_by_adam_srt": {},
    "sgd_mrt": {"learning_rate": 0.1, "weight_decay": 0.01},
    "trace_rt": {"decay": 0.9},
}


@pytest.mark.parametrize("name", HYPERPARAMETERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_injected_hyperparameters_give_the_same_trajectory(name, dtype):
    factory = getattr(so, name)
    hyperparameters = HYPERPARAMETERS[name] | {"channel_axes": AXES}
    static = {"channel_axes", "mu_dtype"} & set(factory.__code__.co_varnames)
    injected = optax.inject_hyperparams(factory, static_args=static, hyperparam_dtype=jnp.float32)(
        **hyperparameters
    )
    params = random_tree(0, dtype)
    grads = [random_tree(seed, dtype) for seed in range(1, 5)]
    plain = run(factory(**hyperparameters), params, grads)
    # 1 - b2 is taken in float32 where b2 is a float32 array: 1e-3 has 1e-5 relative error then.
    tolerance = {"rtol": 2e-4, "atol": 2e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 1e-2}
    # apply_if_finite selects between branches, which must have equal types.
    finite = optax.apply_if_finite(injected, max_consecutive_errors=3)
    chex.assert_trees_all_close(run(finite, params, grads), plain, **tolerance)
    updates, _ = jax.eval_shape(lambda: injected.update(grads[0], injected.init(params), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}


def test_an_injected_learning_rate_can_be_changed():
    tx = optax.inject_hyperparams(
        so.adam_srt, static_args=("channel_axes", "mu_dtype"), hyperparam_dtype=jnp.float32
    )(learning_rate=0.1, channel_axes=AXES)
    state = tx.init(PARAMS)
    full, _ = tx.update(GRADS[0], state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.05)
    half, _ = tx.update(GRADS[0], state, PARAMS)
    chex.assert_trees_all_close(half, jax.tree.map(lambda x: x / 2, full), rtol=1e-6)


@every_case
def test_accumulated_gradients_make_the_steps_of_their_means(name):
    # MultiSteps shows the parameters of the step, and returns zeros in between.
    multi = optax.MultiSteps(make(name), every_k_schedule=2).gradient_transformation()
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[:2]),
        jax.tree.map(lambda a, b: (a + b) / 2, *GRADS[2:4]),
    ]
    chex.assert_trees_all_close(run(multi), run(make(name), PARAMS, means), **CLOSE)


@every_case
def test_a_step_that_is_not_finite_is_skipped(name):
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    bad = jax.tree.map(lambda x: x * jnp.nan, GRADS[0])
    grads = [GRADS[0], bad, GRADS[1]]
    chex.assert_trees_all_close(run(tx, PARAMS, grads), run(make(name), PARAMS, GRADS[:2]), **CLOSE)


@every_case
def test_masked(name):
    # What masked hides keeps its raw gradient; the rest is as alone.
    tx = optax.masked(make(name), so.path_mask(AXES))
    out = run(tx)
    alone = run_alone(name)
    for leaf in ("conv", "layers"):
        chex.assert_trees_all_close(out[leaf], alone[leaf], **CLOSE)
    raw = PARAMS["bias"] + sum(grad["bias"] for grad in GRADS)
    chex.assert_trees_all_close(out["bias"], raw, **CLOSE)


@every_case
@pytest.mark.parametrize("combine", [optax.partition, optax.multi_transform])
def test_partition_by_path_labels(name, combine):
    tx = combine({"spherical": make(name), "classic": optax.set_to_zero()}, so.path_labels(AXES))
    out, alone = run(tx), run_alone(name)
    for leaf in ("conv", "layers"):
        chex.assert_trees_all_close(out[leaf], alone[leaf], **CLOSE)
    chex.assert_trees_all_equal(out["bias"], PARAMS["bias"])


def state_types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_are_kept_and_the_state_is_stable(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        params, grads = random_tree(0, dtype), random_tree(1, dtype)
        tx = make(name)
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(grads, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        assert state_types(after) == state_types(state)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates))

        @jax.eval_shape  # raises where a branch or the carry changes type
        def branches():
            run(tx, params, [grads, grads])
            return jax.lax.cond(
                True, lambda: tx.update(grads, state, params), lambda: (grads, state)
            )


@pytest.mark.parametrize("name", ["adam_g", "adam_s", "adam_srt"])
def test_mu_dtype(name):
    tx = getattr(so, name)(0.1, channel_axes=AXES, mu_dtype=jnp.bfloat16)
    mu = optax.tree.get(tx.init(PARAMS), "mu")
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(mu))
    wide = run(getattr(so, name)(0.1, channel_axes=AXES))
    chex.assert_trees_all_close(run(tx), wide, rtol=0.05, atol=0.02)  # 2^-8 relative in mu


@every_case
def test_seeds_can_be_vmapped(name):
    tx = make(name)
    seeds = [[random_tree(10 * seed + i) for i in range(3)] for seed in range(3)]
    params, *grads = (
        jax.tree.map(lambda *x: jnp.stack(x), *trees) for trees in zip(*seeds, strict=True)
    )
    state, update = jax.vmap(tx.init)(params), jax.jit(jax.vmap(tx.update))
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    alone = [run(tx, trees[0], trees[1:]) for trees in seeds]
    chex.assert_trees_all_close(params, jax.tree.map(lambda *x: jnp.stack(x), *alone), **CLOSE)


@every_case
def test_buffers_can_be_donated(name):
    tx = make(name)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, PARAMS)
    state = jax.tree.map(jnp.copy, tx.init(params))
    for grads in GRADS:
        params, state = step(params, state, grads)
    chex.assert_trees_all_close(params, run_alone(name), **CLOSE)


@every_case
def test_the_state_can_be_shaped_without_computing(name):
    tx = make(name)
    shapes = jax.eval_shape(tx.init, PARAMS)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    of_shapes = tx.init(jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(of_shapes, state)
    if name != "reproject_to_sphere":  # whose radius needs values
        chex.assert_trees_all_equal(of_shapes, state)


@every_case
def test_what_is_not_finite_stays_in_its_group_and_shows(name):
    tx, clean = make(name), run_alone(name)
    for bad in (jnp.nan, jnp.inf):
        for params, grads in [
            (PARAMS, [*GRADS[:2], spoil(GRADS[2], bad), *GRADS[3:]]),
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


@every_case
def test_it_runs_inside_shard_map_and_scan(name):
    """Each device has parameters of its own, and the state varies with them from init on."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    seeds = [[random_tree(10 * seed + i) for i in range(3)] for seed in range(4)]
    params, *grads = (stack(trees) for trees in zip(*seeds, strict=True))
    tx = make(name)

    @partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data")
    )
    def each(params, grads):
        out = trajectory_end(tx, *jax.tree.map(lambda x: x[0], (params, grads)))
        return jax.tree.map(lambda x: x[None], out)

    out = jax.jit(each)(params, jax.tree.map(lambda *x: jnp.stack(x, 1), *grads))
    alone = run(tx, seeds[2][0], seeds[2][1:])
    chex.assert_trees_all_close(jax.tree.map(lambda x: x[2], jax.device_get(out)), alone, **CLOSE)


@every_case
def test_nothing_is_compiled_twice(name):
    tx = make(name)
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(PARAMS)
    for grads in GRADS:
        _, state = step(grads, state, PARAMS)
    chex.clear_trace_counter()


@every_case
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
        assert of_shape.sharding == leaf.sharding or name.startswith("reproject")
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


@every_case
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
        _, after = tx.update(random_tree(2, "float64"), state, single)
        assert state_types(after) == state_types(state)


@every_case
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
        tx, lambda _, name: name, state, names, transform_non_params=lambda _: "whole"
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


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
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
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_without_gradient_and_eps_nothing_moves(name, dtype):
    params = jax.tree.map(lambda x: x + 1, edge_trees(dtype))
    tx = getattr(so, name)(0.1, eps=0.0, channel_axes=-1)
    after = run(tx, params, [jax.tree.map(jnp.zeros_like, params)] * 3)
    chex.assert_trees_all_equal(after, params)


@every_case
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
