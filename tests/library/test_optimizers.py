"""The optimizers against the oracle, Adam and SGD, and the public links that they are chains of."""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized

import oracle
import spherical_optax as so
from invariant import ROUNDING, assert_close
from published import OPTIMIZERS, random_arrays
from replay import replay


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def as_rows(trajectory, axes):
    return np.stack([oracle.rows(np.asarray(x), axes) for x in trajectory])


LAYOUTS = [((3, 3, 4, 5), -1), ((6, 5), ()), ((2, 7, 5), (0, -1)), ((4, 6, 2), (-2, -1))]


@pytest.mark.parametrize("shape, axes", LAYOUTS)
@pytest.mark.parametrize("transport", ["none", "rescale"])
def test_adam_s_and_adam_srt_are_the_oracle(shape, axes, transport):
    weight_decay = 0.02  # without it, as published
    x, grads = random_arrays(0, *shape, steps=30)
    factory = {"none": so.adam_s, "rescale": so.adam_srt}[transport]
    tx = factory(0.05, 0.8, 0.95, 1e-3, weight_decay=weight_decay, channel_axes=axes)
    actual = replay(tx, jnp.asarray(x), jnp.asarray(grads))
    expected = oracle.adam(
        oracle.rows(x, axes),
        [oracle.rows(grad, axes) for grad in grads],
        *(0.05, 0.8, 0.95, 1e-3, weight_decay, transport),
    )
    assert_close(as_rows(actual, axes), list(expected))


@pytest.mark.parametrize("shape, axes", LAYOUTS)
def test_sgd_mrt_is_the_oracle(shape, axes):
    weight_decay, dampening = 0.02, 0.3  # without them, as published
    x, grads = random_arrays(1, *shape, steps=30)
    tx = so.sgd_mrt(0.02, 0.9, dampening=dampening, weight_decay=weight_decay, channel_axes=axes)
    actual = replay(tx, jnp.asarray(x), jnp.asarray(grads))
    expected = oracle.sgd_mrt(
        oracle.rows(x, axes),
        [oracle.rows(grad, axes) for grad in grads],
        *(0.02, 0.9, dampening, weight_decay),
    )
    assert_close(as_rows(actual, axes), list(expected))


@pytest.mark.parametrize("shape, axes", LAYOUTS)
def test_adam_g_is_the_oracle_for_tangent_gradients(shape, axes):
    x, directions = random_arrays(2, *shape, steps=12)
    tx = so.adam_g(0.03, 0.8, 0.95, 1e-3, channel_axes=axes)

    # Gradients of radially invariant functions: tangent, and longer at a smaller radius.
    @jax.jit
    def gradient(x, v):
        v = v / so.group_norm(x, channel_axes=axes)
        return so.project_to_tangent(x, v, channel_axes=axes)

    grads = [partial(gradient, v=v) for v in jnp.asarray(directions)]
    actual = replay(tx, jnp.asarray(x), grads)

    def tangent_gradients():
        point = oracle.rows(x, axes)
        for i, v in enumerate(directions):
            v = oracle.rows(v, axes) / np.sqrt(oracle.dot(point, point))
            yield v - oracle.dot(v, point) / oracle.dot(point, point) * point
            point = expected[i]

    expected = []
    for point in oracle.adam_g(oracle.rows(x, axes), tangent_gradients(), 0.03, 0.8, 0.95, 1e-3):
        expected.append(point)
    assert_close(as_rows(actual, axes), expected)


@pytest.mark.parametrize(
    "axes", [axes for n in range(4) for axes in itertools.combinations(range(3), n)]
)
def test_adam_srt_is_the_oracle_for_any_axes(axes):
    shape = (2, 1, 3)  # an axis of one element too
    x, grads = random_arrays(3, *shape, steps=6)
    rng = np.random.default_rng(axes)
    learning_rate, b1, b2 = rng.uniform([1e-4, 0, 0.1], [0.3, 0.99, 0.999]).tolist()
    tx = so.adam_srt(learning_rate, b1, b2, 1e-3, channel_axes=axes)
    actual = replay(tx, jnp.asarray(x), jnp.asarray(grads))
    expected = oracle.adam(
        oracle.rows(x, axes),
        [oracle.rows(grad, axes) for grad in grads],
        *(learning_rate, b1, b2, 1e-3, 0.0, "rescale"),
    )
    # A long step may come near the origin, where RT divides by a small |x|².
    assert_close(as_rows(actual, axes), list(expected), 1e-9)


class LimitsTest(chex.TestCase):
    """Groups of one element, and leaves that are left out, are Adam and SGD bit for bit."""

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.product(
        ({"axes": None, "dtype": "float32"}, {"axes": (1, 0), "dtype": "float64"}),
        name=["adam_s", "adam_srt", "adam_g", "sgd_mrt"],
    )
    def test_one_element_per_group_is_the_classic_optimizer(self, name, axes, dtype):
        b2 = 0.99 if name == "adam_g" else 0.999
        classic = optax.sgd(0.01, 0.9) if name == "sgd_mrt" else optax.adam(0.01, 0.9, b2)
        x, grads = (a.astype(dtype) for a in random_arrays(4, 6, 5, steps=10))
        for x64 in {dtype == "float64", True}:
            with jax.enable_x64(x64):
                args = jnp.asarray(x), jnp.asarray(grads)
                ours = replay(getattr(so, name)(0.01, channel_axes=axes), *args, self.variant)
                theirs = replay(classic, *args, self.variant)
            np.testing.assert_array_equal(np.stack(ours), np.stack(theirs))


def test_adam_srt_without_transport_is_adam_s():
    x, grads = map(jnp.asarray, random_arrays(12, 6, 4, steps=10))
    srt = optax.chain(so.scale_by_adam_srt(channel_axes=-1, transport="none"), optax.scale(-0.1))
    s = optax.chain(so.scale_by_adam_s(channel_axes=-1), optax.scale(-0.1))
    np.testing.assert_array_equal(replay(srt, x, grads), replay(s, x, grads))


def test_isometric_adam_srt_behind_a_reprojection_is_the_published_formula():
    # On a sphere of fixed radius RT is the parallel transport, and nu keeps its value.
    x, grads = random_arrays(13, 6, 4, steps=10)
    x /= np.linalg.norm(x, axis=0)
    tx = optax.chain(
        so.scale_by_adam_srt(0.8, 0.95, 1e-3, channel_axes=-1, transport="isometric"),
        optax.scale_by_learning_rate(0.1),
        so.reproject_to_sphere(channel_axes=-1),
    )
    gradients = [
        lambda x, v=v: so.project_to_tangent(x, v, channel_axes=-1) for v in jnp.asarray(grads)
    ]
    actual = replay(tx, jnp.asarray(x), gradients)

    point, m, v = x.T, np.zeros((4, 6)), np.zeros((4, 1))
    for t, (grad, ours) in enumerate(zip(grads, actual, strict=True), start=1):
        g = grad.T - oracle.dot(grad.T, point) * point
        m = 0.8 * m + 0.2 * g
        v = 0.95 * v + 0.05 * oracle.dot(g, g) / 6
        step = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3 / np.sqrt(6))
        y = point - 0.1 * step
        y /= np.sqrt(oracle.dot(y, y))
        m = oracle.rescale_and_transport(m, point, y)
        point = y
        assert_close(np.asarray(ours).T, point)


def test_adam_g_decays_classic_leaves_only():
    params = {"conv": jnp.ones((9, 4)), "bias": jnp.ones(4)}
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = so.adam_g(0.1, weight_decay=0.5, channel_axes=-1)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert_close(np.asarray(params["conv"] + updates["conv"]), np.full((9, 4), 1 / 3))
    assert np.all(np.asarray(updates["bias"]) < -0.09)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_what_the_mask_marks_decays(name):
    x, grads = random_arrays(19, 6, 4, steps=3)
    params = {"a": jnp.asarray(x), "b": jnp.asarray(x)}
    grads = [{"a": jnp.asarray(grad), "b": jnp.asarray(grad)} for grad in grads]
    axes = so.by_path({"a": -1}, require_match=False) if name != "adam_g" else None

    def after(weight_decay, mask=None):
        tx = OPTIMIZERS[name](weight_decay=weight_decay, weight_decay_mask=mask, channel_axes=axes)
        return replay(tx, params, grads, lambda update: update)[-1]

    decayed, plain = after(0.1), after(0.0)
    for leaf in params:
        assert np.min(np.abs(decayed[leaf] - plain[leaf])) > 1e-6
        mask = {other: other == leaf for other in params}
        expected = plain | {leaf: decayed[leaf]}
        for form in (mask, lambda _, mask=mask: mask):
            chex.assert_trees_all_close(after(0.1, form), expected, rtol=ROUNDING)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_may_be_a_prefix_or_of_other_containers(name):
    kernel, bias = jnp.asarray([[3.0, 4.0], [1.0, 2.0]]), jnp.asarray([1.0, 2.0])
    params = {"a": {"kernel": kernel, "bias": bias}, "b": [kernel, bias]}
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(mask):
        tx = OPTIMIZERS[name](
            weight_decay=0.1, weight_decay_mask=mask, channel_axes=so.by_path({"kernel": -1})
        )
        return tx.update(grads, tx.init(params), params)[0]

    whole = {"a": {"kernel": True, "bias": True}, "b": [False, False]}
    assert_same = partial(jax.tree.map, np.testing.assert_array_equal)
    assert_same(updates({"a": True, "b": False}), updates(whole))
    assert_same(updates(whole | {"b": (False, False)}), updates(whole))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_with_a_mask_can_be_shaped_and_mapped(name):
    params = {"conv": jnp.ones((3, 2)), "head": jnp.ones(3)}
    mask = {"conv": True, "head": False}
    tx = OPTIMIZERS[name](weight_decay=0.1, weight_decay_mask=mask, channel_axes=-1)
    chex.assert_trees_all_equal_shapes(jax.eval_shape(tx.init, params), tx.init(params))
    chex.assert_trees_all_equal_shapes(tx.init(jax.eval_shape(lambda: params)), tx.init(params))
    assert optax.tree.map_params(tx, lambda x: x, tx.init(params)) is not None


@jax.tree_util.register_dataclass
@dataclass
class Module:
    """As those of Equinox, which are functions and trees."""

    kernel: Any
    bias: Any

    def __call__(self, x):
        return x @ self.kernel + self.bias


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_that_is_a_module_is_a_tree(name):
    params, mask = Module(jnp.ones((3, 2)), jnp.ones(2)), Module(True, False)
    grads = jax.tree.map(jnp.ones_like, params)

    def updates(mask):
        tx = OPTIMIZERS[name](weight_decay=0.1, weight_decay_mask=mask, channel_axes=None)
        return tx.update(grads, tx.init(params), params)[0]

    chex.assert_trees_all_equal(updates(mask), updates(lambda _: mask))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_complex_numbers_take_the_classic_optimizer(name):
    real, imaginary = (random_arrays(seed, 6, 4, steps=3) for seed in (20, 21))
    x, grads = (jnp.asarray(a + 1j * b) for a, b in zip(real, imaginary, strict=True))
    classic = optax.sgd(0.02, 0.9) if name == "sgd_mrt" else optax.adam(0.05, 0.8, 0.95)
    trajectories = [
        np.stack(replay(tx, x, grads, lambda update: update))
        for tx in (OPTIMIZERS[name](channel_axes=None), classic)
    ]
    assert_close(*trajectories)


REBUILT = {
    "adam_s": lambda axes: optax.chain(
        optax.add_decayed_weights(0.01),
        so.scale_by_adam_s(0.8, 0.95, 1e-6, channel_axes=axes),
        optax.scale_by_learning_rate(0.05),
    ),
    "adam_srt": lambda axes: optax.chain(
        optax.add_decayed_weights(0.01),
        so.scale_by_adam_srt(0.8, 0.95, 1e-6, channel_axes=axes),
        optax.scale_by_learning_rate(0.05),
    ),
    "adam_g": lambda axes: optax.chain(
        optax.add_decayed_weights(0.01, mask=so.path_mask(axes, invert=True)),
        so.scale_by_adam_g(0.8, 0.95, 1e-6, channel_axes=axes),
        optax.scale_by_learning_rate(0.05),
        so.reproject_to_sphere(1.0, channel_axes=axes),
    ),
    "sgd_mrt": lambda axes: optax.chain(
        optax.add_decayed_weights(0.01),
        so.trace_rt(0.8, dampening=0.2, channel_axes=axes),
        optax.scale_by_learning_rate(0.05),
    ),
    "adamp": lambda axes: optax.chain(
        so.project_where_invariant(
            optax.scale_by_adam(0.8, 0.95, 1e-6), weight_decay=0.01, eps=1e-6, channel_axes=axes
        ),
        optax.scale_by_learning_rate(0.05),
    ),
    "sgdp": lambda axes: optax.chain(
        so.project_where_invariant(
            optax.chain(optax.scale(0.8), optax.trace(0.8)),
            weight_decay=0.01 / (1 - 0.8),
            channel_axes=axes,
        ),
        optax.scale_by_learning_rate(0.05),
    ),
}


@pytest.mark.parametrize("name", REBUILT)
def test_each_optimizer_is_a_chain_of_public_links(name):
    x, grads = random_arrays(15, 3, 3, 2, 4, steps=5)
    axes = so.by_path({"conv": -1})
    extra = {"dampening": 0.2} if "sgd" in name else {"b2": 0.95, "eps": 1e-6}
    ready = getattr(so, name)(0.05, 0.8, weight_decay=0.01, channel_axes=axes, **extra)
    params = {"conv": jnp.asarray(x), "head": jnp.asarray(x[0, 0])}
    grads = [{"conv": jnp.asarray(grad), "head": jnp.asarray(grad[0, 0])} for grad in grads]
    for ours, theirs in zip(
        replay(ready, params, grads), replay(REBUILT[name](axes), params, grads), strict=True
    ):
        # XLA may round the decay inside a link otherwise than in front of it.
        chex.assert_trees_all_close(ours, theirs, rtol=ROUNDING, atol=ROUNDING)


def test_a_schedule_is_followed_and_weight_decay_may_be_one():
    x, grads = map(jnp.asarray, random_arrays(16, 6, 4, steps=4))
    schedule = optax.piecewise_constant_schedule(0.1, {2: 0.1})
    tx = so.adam_srt(schedule, weight_decay=lambda step: 0.01 * step, channel_axes=-1)
    actual = replay(tx, x, grads)

    link, state = so.scale_by_adam_srt(channel_axes=-1), None
    for step, rate in enumerate([0.1, 0.1, 0.01, 0.01]):
        state = link.init(x) if state is None else state
        updates, state = link.update(grads[step] + 0.01 * step * x, state, x)
        x = x - rate * updates
        assert_close(np.asarray(actual[step]), np.asarray(x))
