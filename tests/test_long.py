"""Long runs, numbers at the ends of their range, and gradients that are not finite.

The runs of 100,000 steps are by `pytest -m slow tests/test_long.py`, the same ones of 1,000 by
default.
"""

from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

pytestmark = pytest.mark.usefixtures("compiled_quickly")

AXES = so.by_path({"conv": -1})
SHAPES = {"bias": (5,), "conv": (3, 4, 5)}
RATE = 0.01


def reprojected(*links: Any) -> Any:
    def factory(*, channel_axes: Any) -> optax.GradientTransformation:
        made = [link(channel_axes=channel_axes) for link in links]
        return optax.chain(*made, optax.scale(-RATE), so.reproject_to_sphere(channel_axes=AXES))

    return factory


class Walker(NamedTuple):
    factory: Any
    keeps: str = ""  # the radius "at init", or "one"
    momentum: str = ""  # the field of the state that is tangent at the point of the last gradient
    axes: Any = AXES


WALKERS = {
    "adam_g": Walker(partial(so.adam_g, RATE), "one", "mu"),
    "adam_h": Walker(partial(so.adam_h, RATE), "at init"),
    "adam_s": Walker(partial(so.adam_s, RATE, weight_decay=0.01)),
    "adam_srt": Walker(partial(so.adam_srt, RATE), momentum="mu"),
    "adam_srt, decayed": Walker(partial(so.adam_srt, RATE, weight_decay=0.01)),
    "adamp": Walker(partial(so.adamp, RATE, weight_decay=0.01)),
    "hyperball": Walker(partial(so.hyperball, optax.trace(0.9), RATE, retraction="exp"), "at init"),
    "isometric": Walker(
        reprojected(partial(so.scale_by_adam_srt, transport="isometric")), "at init", "mu"
    ),
    "muon_h": Walker(
        partial(so.muon_h, RATE, ns_steps=2), "at init", axes=so.by_path({"conv": -1})
    ),
    "rotational": Walker(partial(so.rotational, optax.scale_by_adam(), RATE), "at init"),
    "sgd_mrt": Walker(partial(so.sgd_mrt, RATE), momentum="trace"),
    "sgd_mrt, decayed": Walker(partial(so.sgd_mrt, RATE, weight_decay=0.01)),
    "sgdp": Walker(partial(so.sgdp, RATE, weight_decay=0.01)),
}
every_walker = pytest.mark.parametrize("name", WALKERS)


def random_params(seed: int, dtype: Any = "float32") -> Any:
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


@cache
def make(name: str) -> optax.GradientTransformation:
    return WALKERS[name].factory(channel_axes=WALKERS[name].axes)


@partial(jax.jit, static_argnums=0)
def one_step(tx: optax.GradientTransformation, params: Any, state: Any, grads: Any) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


# Long runs.


def norms(x: jax.Array) -> jax.Array:
    """Of the groups of "conv", in float32."""
    return jnp.sqrt(products(x, x))


def products(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), (0, 1))


def gradient(key: jax.Array, params: Any) -> Any:
    """A random one of a loss that sees directions of "conv" only; "bias" is pulled to 0."""
    keys = dict(zip(params, jax.random.split(key), strict=True))
    noise = {name: jax.random.normal(keys[name], x.shape) for name, x in params.items()}
    x = params["conv"].astype(jnp.float32)
    tangent = so.project_to_tangent(x, noise["conv"], channel_axes=-1) / norms(x)
    grads = {"bias": noise["bias"] + params["bias"], "conv": tangent}
    return {name: grads[name].astype(params[name].dtype) for name in params}


class Seen(NamedTuple):
    """The worst of a walk."""

    radius: jax.Array  # | |x| / what it should be - 1 |
    radial: jax.Array  # |<m, x>| / ((|m| + |g|) |x|)
    least: jax.Array  # of second moments
    finite: jax.Array  # whether all numbers were


@partial(jax.jit, static_argnums=(0, 2))
def walk(name: str, params: Any, steps: int) -> tuple[Any, Seen]:
    walker, tx = WALKERS[name], make(name)
    radius = norms(params["conv"]) if walker.keeps == "at init" else jnp.ones(5)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state, seen = carry
        g, x = gradient(key, params), params["conv"]
        params, state = one_step(tx, params, state, g)
        radial = jnp.zeros(5)
        if walker.momentum:
            m = optax.tree.get(state, walker.momentum)["conv"]
            radial = abs(products(m, x)) / ((norms(m) + norms(g["conv"])) * norms(x))
        second = [x for _, x in optax.tree.get_all_with_path(state, "nu")]
        least = [jnp.min(x) for x in jax.tree.leaves(second)]
        numbers = jax.tree.leaves((params, state))
        now = Seen(
            jnp.max(abs(norms(params["conv"]) / radius - 1)),
            jnp.max(radial),
            jnp.min(jnp.stack([jnp.zeros(()), *least])),
            jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in numbers])),
        )
        worst = [
            f(a, b)
            for f, a, b in zip(
                (jnp.maximum, jnp.maximum, jnp.minimum, jnp.logical_and), seen, now, strict=True
            )
        ]
        return (params, state, Seen(*worst)), None

    seen = Seen(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), jnp.array(True))
    keys = jax.random.split(jax.random.key(0), steps)
    (params, _, seen), _ = jax.lax.scan(step, (params, tx.init(params), seen), keys)
    return params, seen


@every_walker
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [1_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_nothing_drifts(name, dtype, steps):
    walker, start = WALKERS[name], random_params(0)
    if walker.keeps == "one":  # the first step of a narrow dtype would miss the sphere
        start = so.project_to_sphere(start, 1.0, channel_axes=AXES)
    params, seen = walk(name, jax.tree.map(lambda x: x.astype(dtype), start), steps)
    eps = float(jnp.finfo(dtype).eps)
    assert seen.finite and seen.least >= 0
    # The point's own rounding, half a unit by element, that of its update, which is small, and of
    # the sum of 12 squares. A drift would grow with the steps.
    if walker.keeps:
        assert seen.radius <= 0.6 * eps + 16 * jnp.finfo(jnp.float32).eps
    # Rounding of the momentum and of the gradient, half a unit by element each, and of sums.
    assert seen.radial <= 0.6 * eps + 16 * jnp.finfo(jnp.float32).eps
    assert np.all(np.isfinite(norms(params["conv"]))) and np.all(norms(params["conv"]) > 0)


# The ends of the range. Norms should lie between 1e-19 and 1e19; this is what happens beyond.

OF_LAYERS = ("adamp", "sgdp")  # one test for all groups of a layer, so that others see it
# Below, a group counts as one of zeros, and moves freely. Above, a square is infinite: the group
# comes out as NaN, but where
FINITE_WITH_HUGE_PARAMS = (
    "adam_s",  # which only adds 1 % of it to the gradient, and then divides by that
    "adamp",  # which does not project what it cannot measure
    "sgd_mrt",  # whose projection divides by it
    "sgdp",
)
FINITE_WITH_HUGE_GRADS = (
    "adam_h",
    "adam_s",
    "adam_srt",
    "adam_srt, decayed",
    "adamp",
    "isometric",
    "muon_h",
    "rotational",
    "sgdp",
)  # which divide by it, and do not move


def scaled(tree: Any, scale: float) -> Any:
    """The third group of "conv" at this length."""
    x = tree["conv"]
    return tree | {"conv": x.at[..., 2].set(x[..., 2] / norms(x)[2] * jnp.float32(scale))}


def three_steps(tx: optax.GradientTransformation, params: Any, grads: list[Any]) -> Any:
    state = jax.jit(tx.init)(params)  # which cannot refuse groups of zeros
    for g in grads:
        params, state = one_step(tx, params, state, g)
    return jax.device_get((params, state))


@every_walker
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_groups_out_of_range_harm_no_others(name, scale):
    tx, params, grads = make(name), random_params(0), [random_params(i) for i in (1, 2, 3)]
    clean, _ = three_steps(tx, params, grads)
    for of_params in (True, False):
        if of_params:
            found, state = three_steps(tx, scaled(params, scale), grads)
        else:
            found, state = three_steps(tx, params, [scaled(g, scale) for g in grads])
        others = [0, 1, 3, 4]
        np.testing.assert_array_equal(found["bias"], clean["bias"])
        if name in OF_LAYERS:
            assert np.all(np.isfinite(found["conv"][..., others]))
        else:
            np.testing.assert_array_equal(found["conv"][..., others], clean["conv"][..., others])
        if scale < 1:
            chex.assert_tree_all_finite((found, state))
        else:
            known = FINITE_WITH_HUGE_PARAMS if of_params else FINITE_WITH_HUGE_GRADS
            assert np.all(np.isfinite(found["conv"])) == (name in known)


def test_a_group_too_small_to_have_a_radius_is_refused_like_one_of_zeros():
    with pytest.raises(ValueError, match="^conv: 1 of its 5 groups are zero at init"):
        make("adam_h").init(scaled(random_params(0), 1e-30))


# Gradients that are not finite.


@every_walker
@pytest.mark.parametrize("leaf", SHAPES)
def test_apply_if_finite_loses_nothing_to_a_leaf_of_nans(name, leaf):
    tx = optax.apply_if_finite(make(name), max_consecutive_errors=3)
    params, grads = random_params(0), [random_params(i) for i in (1, 2, 3)]
    bad = grads[1] | {leaf: jnp.full_like(grads[1][leaf], jnp.nan)}
    state = tx.init(params)
    params, state = one_step(tx, params, state, grads[0])
    after_bad, spoiled = one_step(tx, params, state, bad)
    chex.assert_trees_all_equal(after_bad, params)
    chex.assert_trees_all_equal(spoiled.inner_state, state.inner_state)
    assert spoiled.total_notfinite == 1 and not spoiled.last_finite
    for g in grads[1:]:
        params, state = one_step(tx, params, state, g)
        after_bad, spoiled = one_step(tx, after_bad, spoiled, g)
        chex.assert_trees_all_equal(after_bad, params)
        chex.assert_trees_all_equal(spoiled.inner_state, state.inner_state)
    assert not np.array_equal(params["conv"], random_params(0)["conv"])
