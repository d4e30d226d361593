"""What `geometry` reads of a watched optimizer: the plain measures, wherever the optimizer is."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so
from watched import AXES, CLOSE, GRADS, PARAMS, figures, history, random_tree, scan, stack, watch

pytestmark = pytest.mark.usefixtures("compiled_quickly")

SGD = optax.sgd(0.1, 0.9)
WATCHED, EVERY_THIRD = watch(SGD), watch(SGD, every=3)  # once, as each is compiled


def by_path(tree):
    return {"conv": tree["conv"], "layers/stack": tree["layers"]["stack"]}


@jax.jit
@jax.vmap
def expected_figures(x, g, s, momentum):
    """The same figures by the plain functions, in float32 at least."""
    x, g, s, momentum = jax.tree.map(lambda a: a + jnp.zeros((), "float32"), (x, g, s, momentum))
    of = {"channel_axes": AXES}
    measures = {
        "angle": so.angle_per_step(x, s, **of),
        "radius": so.radius(x, **of),
        "radial_fraction": so.radial_fraction(x, s, **of),
        "deformation": so.deformation(x, s, g, **of),
        "momentum_radial_fraction": so.radial_fraction(x, momentum, **of),
    }
    measures = {name: by_path(tree) for name, tree in measures.items()}
    # tan θ per length of the gradient on the unit sphere.
    points, grads = by_path(x), by_path(g)
    measures["turn_per_gradient"] = {
        path: jnp.tan(measures["angle"][path])
        / measures["radius"][path]
        / so.group_norm(
            so.project_to_tangent(points[path], grads[path], channel_axes=axes), channel_axes=axes
        )
        for path, axes in (("conv", -1), ("layers/stack", so.blocks(-1, 4, channel_axes=0)))
    }
    return {
        f"{path}/{measure}/{statistic}": getattr(jnp, statistic)(values)
        for measure, paths in measures.items()
        for path, values in paths.items()
        for statistic in ("mean", "min", "max")
    }


# An optimizer, and the name of its momentum.
OPTIMIZERS = {
    "adamw": (optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.1), "mu"),
    "sgd": (optax.chain(optax.add_decayed_weights(0.1), SGD), "trace"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_figures_are_the_plain_functions_over_the_groups(name):
    check_figures(*OPTIMIZERS[name], "float32")


def test_half_precision_is_measured_in_float32():
    check_figures(so.adam_srt(0.1, weight_decay=0.1, channel_axes=AXES), "mu", "bfloat16")


def check_figures(tx, momentum, dtype):
    tx, (params, *grads) = watch(tx), [random_tree(seed, dtype) for seed in range(6)]
    x, g, s, state = history(tx, params, grads)
    expected = expected_figures(x, g, s, optax.tree.get(state, momentum))
    measured = figures(tx, params, grads)
    assert measured.keys() == expected.keys()
    for name, figure in measured.items():
        assert figure.shape == (5,) and figure.dtype == "float32"
        assert np.any(figure > 0)
        # Angles of two rounded directions have float32's absolute error, and the rate is of a
        # tangent, which is steep where a step turns by some 90 degrees.
        rtol = 1e-3 if "turn" in name else 2e-5
        np.testing.assert_allclose(figure, expected[name], rtol=rtol, atol=2e-5, err_msg=name)


def test_the_rate_of_sgd_is_that_of_the_table():
    decay = 0.5
    tx = watch(optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.1)))

    @jax.jit
    @jax.vmap
    def expected_rates(x, g):
        decayed = jax.tree.map(lambda g, x: g + decay * x, g, x)
        return so.effective_learning_rate(0.1, x, decayed, 1.0, channel_axes=AXES)

    with jax.enable_x64(True):
        params, *grads = (random_tree(seed, "float64") for seed in range(3))
        x, g, *_ = history(tx, params, grads)
        measured = figures(tx, params, grads)
        for path, rates in by_path(expected_rates(x, g)).items():
            for statistic in ("mean", "min", "max"):
                figure = measured[f"{path}/turn_per_gradient/{statistic}"]
                assert figure.dtype == "float64"
                expected = getattr(np, statistic)(rates.reshape(2, -1), axis=1)
                np.testing.assert_allclose(figure, expected, rtol=1e-11)


def test_the_figures_are_zero_at_first_and_stay_between_the_measured_updates():
    each_step, tx = figures(WATCHED), EVERY_THIRD
    before = so.geometry(tx.init(PARAMS))
    assert before.keys() == each_step.keys() and not any(map(np.any, before.values()))
    for name, measured in figures(tx).items():
        expected = each_step[name][[0, 0, 0, 3, 3]]
        np.testing.assert_allclose(measured, expected, **CLOSE)
    # They do differ from step to step, by more than rounding.
    assert np.all(np.diff(each_step["conv/radius/mean"]) > 1e-3)


def test_vmapped_seeds_have_figures_of_their_own():
    seeds = [[random_tree(i + 10 * seed) for i in range(6)] for seed in (1, 0, 2)]
    params, *grads = (stack(trees) for trees in zip(*seeds, strict=True))
    measured = jax.vmap(partial(scan, EVERY_THIRD), in_axes=(0, 1))(params, stack(grads))[1]
    for name, alone in figures(EVERY_THIRD).items():
        assert measured[name].shape == (3, 5)
        np.testing.assert_allclose(measured[name][1], alone, **CLOSE)
        assert np.any(measured[name][0] != measured[name][1])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_have_the_same_figures(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {
        "bias": PartitionSpec("model"),
        "conv": PartitionSpec(None, None, "data", "model"),
        "layers": {"stack": PartitionSpec("model", None, "data")},
    }

    def shard(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    tx = WATCHED
    params = shard(PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for g in GRADS[:2]:
        updates, state = update(shard(g), state, params)
        params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda figure: figure[1], figures(tx))
    chex.assert_trees_all_close(jax.device_get(so.geometry(state)), expected, **CLOSE)


@partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
def injected(learning_rate):
    return watch(optax.sgd(learning_rate, 0.9))


COMPOSED = {
    "chain": optax.chain(optax.clip_by_global_norm(1e9), WATCHED),
    "masked": optax.masked(WATCHED, so.path_mask(AXES)),
    "partition": optax.partition(
        {"spherical": WATCHED, "classic": optax.sgd(0.1)}, so.path_labels(AXES)
    ),
    "inject_hyperparams": injected(learning_rate=0.1),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_inside_other_transformations_the_figures_are_the_same(name):
    tx, params = COMPOSED[name], PARAMS
    state, expected = tx.init(params), figures(WATCHED)
    for i in range(2):
        updates, state = tx.update(GRADS[i], state, params)
        params = optax.apply_updates(params, updates)
        now = jax.tree.map(lambda figure, i=i: figure[i], expected)
        chex.assert_trees_all_close(so.geometry(state), now, **CLOSE)


def test_accumulated_gradients_are_measured_once_per_step():
    multi = optax.MultiSteps(WATCHED, every_k_schedule=2).gradient_transformation()
    pairs = [jax.tree.map(lambda x, k=k: k * x, g) for g in GRADS for k in (0.5, 1.5)]
    alone = figures(WATCHED)  # of their means
    for name, after in figures(multi, grads=pairs).items():
        np.testing.assert_allclose(after, np.repeat([0, *alone[name]], 2)[1:-1], **CLOSE)


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 0.3, 3.1])
@pytest.mark.parametrize("radial", [0.0, 1.0, 100.0])
def test_small_angles_are_accurate_whatever_is_radial(turn, radial):
    x, a, b = np.random.default_rng(0).normal(size=(3, 50, 4))
    a, b = ((v - (v * x).sum(0) / (x * x).sum(0) * x) for v in (a, b))
    b = b - (b * a).sum(0) / (a * a).sum(0) * a
    u, v = a / np.linalg.norm(a, axis=0), b / np.linalg.norm(b, axis=0)
    g = -(np.cos(turn) * u + np.sin(turn) * v)
    s = 0.01 * u + radial * 0.01 * x / np.linalg.norm(x, axis=0)
    tx = watch(optax.stateless(lambda updates, params: jnp.asarray(s, "float32")), channel_axes=-1)
    x, g = jnp.asarray(x, "float32"), jnp.asarray(g, "float32")
    figures = so.geometry(tx.update(g, tx.init(x), x)[1])
    # A tangent that is 1/100 of its step has 100 times the step's rounding.
    tolerance = 3e-7 * max(1, radial)
    for statistic in ("min", "max"):
        np.testing.assert_allclose(figures[f"deformation/{statistic}"], turn, atol=tolerance)


def test_a_step_to_the_centre_has_no_nan():
    params = {"conv": jnp.ones((4, 3))}
    tx = watch(optax.sgd(1.0), channel_axes=-1)
    _, state = tx.update(params, tx.init(params), params)
    assert all(jnp.isfinite(figure) for figure in so.geometry(state).values())


def test_edges_of_the_groups_of_a_leaf():
    x, g = jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 500)), "float32")
    g = so.project_to_tangent(x, g, channel_axes=-1)

    def measured(s):
        tx = watch(optax.stateless(lambda updates, params: s), channel_axes=-1)
        return so.geometry(tx.update(g, tx.init(x), x)[1])

    # A step of zero, of some groups, is not turned away from the gradient; the others are not.
    assert measured((-g).at[:, ::2].set(0))["deformation/max"] < 1e-6
    # The share of the tangent in |s|² is less than float32's eps, and its direction is still there.
    sideways = 1e-5 * g / so.group_norm(g, channel_axes=-1) * so.group_norm(x, channel_axes=-1)
    seen = measured(0.1 * x - sideways)
    for statistic in ("min", "max"):  # rounding of s is 1e-3 of what is tangent
        np.testing.assert_allclose(seen[f"angle/{statistic}"], 1e-5 / 1.1, rtol=1e-2)


def test_shares_do_not_exceed_one():
    # In float32 rounding makes some cosines of parallel vectors larger than 1.
    params = jnp.asarray(np.random.default_rng(0).normal(size=(7, 500)), "float32")
    tx = watch(optax.sgd(0.1, 0.9), channel_axes=-1)
    seen = so.geometry(tx.update(params, tx.init(params), params)[1])
    for name in ("radial_fraction", "momentum_radial_fraction"):
        assert 1 - 1e-6 < seen[f"{name}/min"] and seen[f"{name}/max"] <= 1


def test_a_momentum_of_another_shape_is_left_out():
    params = jnp.ones((4, 3)) + jnp.arange(12.0).reshape(4, 3)
    tx = watch(optax.flatten(optax.adam(0.1)), channel_axes=-1)
    _, state = jax.jit(tx.update)(jnp.sin(params), tx.init(params), params)
    assert so.geometry(state)["angle/mean"] > 0
    assert not any("momentum" in name for name in so.geometry(state))
