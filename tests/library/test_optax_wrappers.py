"""Every link and optimizer of the library inside Optax's wrappers; one row each in `cases.py`."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so
from cases import (
    GRADS,
    MATRICES,
    cases_apart,
    every_case,
    make,
    run,
    run_alone,
    run_uncompiled,
    state_types,
)
from watched import AXES, CLOSE, PARAMS, random_tree

pytestmark = pytest.mark.usefixtures("compiled_quickly")


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
    "adam_h": {"learning_rate": 0.1, "adam_weight_decay": 0.01},
    "adam_s": {"learning_rate": 0.1, "weight_decay": 0.01},
    "adam_srt": {"learning_rate": 0.1, "weight_decay": 0.01},
    "adamp": {"learning_rate": 0.1, "weight_decay": 0.01, "nesterov": True},
    "normalize_per_group": {},
    "project_to_tangent_space": {},
    "reproject_to_sphere": {},
    "scale_by_adam_g": {},
    "scale_by_adam_s": {},
    "scale_by_adam_srt": {},
    "sgd_mrt": {"learning_rate": 0.1, "weight_decay": 0.01},
    "sgdp": {"learning_rate": 0.1, "weight_decay": 0.01},
    "trace_rt": {"decay": 0.9},
}


def injected(name: str) -> optax.GradientTransformation:
    factory = getattr(so, name)
    static = {"channel_axes", "mu_dtype"} & set(factory.__code__.co_varnames)
    return optax.inject_hyperparams(factory, static_args=static, hyperparam_dtype=jnp.float32)(
        **HYPERPARAMETERS[name], channel_axes=AXES
    )


@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_injected_hyperparameters_give_the_same_trajectory(name):
    # 1 - b2 is taken in float32 where b2 is a float32 array: 1e-3 has 1e-5 relative error then.
    chex.assert_trees_all_close(
        run_uncompiled(injected(name)), run_alone(name), rtol=2e-4, atol=2e-5
    )


# Optax's own directions take the dtype of their hyper-parameters.
@pytest.mark.parametrize("name", sorted(HYPERPARAMETERS.keys() - {"adam_h", "adamp", "sgdp"}))
def test_injected_hyperparameters_keep_dtypes(name):
    params, grads = random_tree(0, "bfloat16"), random_tree(1, "bfloat16")
    # apply_if_finite selects between branches, which must have equal types.
    tx = optax.apply_if_finite(injected(name), max_consecutive_errors=3)
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
    assert state_types(after) == state_types(state)


@pytest.mark.parametrize("name", ["adam_g", "adam_s", "adam_srt", "sgd_mrt"])
def test_hyperparameters_in_float32_fit_narrower_parameters(name):
    params, grads = random_tree(0, "bfloat16"), random_tree(1, "bfloat16")
    tx = injected(name)
    with jax.numpy_dtype_promotion("strict"):
        updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = make(name).update(grads, make(name).init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=2**-7)  # bfloat16, rounded elsewhere


@pytest.mark.parametrize("name", ["sgdp", "muon_h"])
def test_hyperparameters_can_be_injected_where_all_is_compiled(name):
    static = {"channel_axes", "ns_steps"} & set(getattr(so, name).__code__.co_varnames)
    tx = optax.inject_hyperparams(getattr(so, name), static_args=static)(
        0.1, channel_axes=MATRICES if name == "muon_h" else AXES
    )
    assert jax.jit(tx.init)(PARAMS) is not None
    assert jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS) is not None


def test_an_injected_learning_rate_can_be_changed():
    tx = optax.inject_hyperparams(
        so.adam_srt, static_args=("channel_axes", "mu_dtype"), hyperparam_dtype=jnp.float32
    )(learning_rate=0.1, channel_axes=AXES)
    state = tx.init(PARAMS)
    full, _ = tx.update(GRADS[0], state, PARAMS)
    state.hyperparams["learning_rate"] = jnp.float32(0.05)
    half, _ = tx.update(GRADS[0], state, PARAMS)
    chex.assert_trees_all_close(half, jax.tree.map(lambda x: x / 2, full), rtol=1e-6)


@cases_apart
def test_accumulated_gradients_make_the_steps_of_their_means(name):
    # MultiSteps shows the parameters of the step, and returns zeros in between.
    multi = optax.MultiSteps(make(name), every_k_schedule=2).gradient_transformation()
    # Their means are exactly those of run_alone.
    pairs = [jax.tree.map(lambda x, k=k: k * x, g) for g in GRADS for k in (0.5, 1.5)]
    chex.assert_trees_all_close(run(multi, grads=pairs), run_alone(name), **CLOSE)


@cases_apart
def test_a_step_that_is_not_finite_is_skipped(name):
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    bad = jax.tree.map(lambda x: x * jnp.nan, GRADS[0])
    grads = [GRADS[0], bad, *GRADS[1:]]
    chex.assert_trees_all_close(run(tx, grads=grads), run_alone(name), **CLOSE)


@every_case
def test_masked(name):
    # What masked hides keeps its raw gradient; the rest is as alone.
    tx = optax.masked(make(name), so.path_mask(AXES))
    out, alone = run_uncompiled(tx), run_alone(name)
    for leaf in ("conv", "layers"):
        chex.assert_trees_all_close(out[leaf], alone[leaf], **CLOSE)
    raw = PARAMS["bias"] + sum(grad["bias"] for grad in GRADS)
    chex.assert_trees_all_close(out["bias"], raw, **CLOSE)


@every_case
def test_partition_by_path_labels(name):
    parts = {"spherical": make(name), "classic": optax.set_to_zero()}
    tx = optax.partition(parts, so.path_labels(AXES))
    out, alone = run_uncompiled(tx), run_alone(name)
    for leaf in ("conv", "layers"):
        chex.assert_trees_all_close(out[leaf], alone[leaf], **CLOSE)
    chex.assert_trees_all_equal(out["bias"], PARAMS["bias"])
