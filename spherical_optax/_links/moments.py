"""Moments, coupled decay and bias correction: what the Adams here share.

An array without reduction axes comes out as in Adam.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.groups import zeros_per_group
from spherical_optax._ground.hyperparams import check_decays, check_dtype, check_not_negative
from spherical_optax._ground.selection import ChannelAxes, map_selected
from spherical_optax._ground.sums import inners, once_per_group, squared_norm


def check_moments(b1: ArrayLike, b2: ArrayLike, eps: ArrayLike, mu_dtype: Any = None) -> None:
    """Raises `ValueError` or `TypeError` unless an Adam can have these."""
    check_decays(b1=b1, b2=b2)
    check_not_negative(eps=eps)
    check_dtype(mu_dtype=mu_dtype)


def zero_moments(
    params: optax.Params, channel_axes: ChannelAxes, mu_dtype: DTypeLike | None
) -> tuple[optax.Updates, optax.Updates]:
    """The first moments and the groups' second moments at init."""
    nu = map_selected(lambda leaf: zeros_per_group(leaf.value, leaf.groups), channel_axes, params)
    return optax.tree.zeros_like(params, dtype=mu_dtype), nu


def decay_at(count: ArrayLike, weight_decay: optax.ScalarOrSchedule | None) -> ArrayLike | None:
    """The weight decay of a step, counted from 0; None where there is none to add."""
    if weight_decay is None or isinstance(weight_decay, int | float) and weight_decay == 0:
        return None
    return weight_decay(count) if callable(weight_decay) else weight_decay


def decay_gradient(
    g: jax.Array,
    x: jax.Array | None,
    decay: ArrayLike | None,
    nu: jax.Array,
    axes: tuple[int, ...],
    *pairs: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
    """Adds coupled decay: the gradient, nu as it was, and inner products.

    The first of these is the gradient's squared norm; the others, of spheres, those of `pairs`.
    """
    if not axes:
        g = g if decay is None or x is None else g + jnp.asarray(decay, g.dtype) * x
        return g, nu, [squared_norm(g, ())]
    if decay is None or x is None:
        return g, nu, inners(axes, (g, g), *pairs)

    def at_once(g, x, rate, nu, *pairs):
        g = g + rate * x
        return g, nu, inners(axes, (g, g), *pairs)

    def in_turn(g, x, rate, nu, *pairs):
        # On a CPU XLA would write the decayed gradient to memory, as the sum and the update both
        # read it. Behind barriers each has one of its own, which is fused; nu makes the barriers of
        # different leaves differ. The update's waits for the sum, so that a leaf's sums come
        # together.
        own_rate, nu = jax.lax.optimization_barrier((rate, nu))
        own = g + own_rate * x
        square, *products = inners(axes, (own, own), *pairs)
        rate, square = jax.lax.optimization_barrier((rate, square))
        return g + rate * x, nu, [square, *products]

    rate = jnp.asarray(decay, g.dtype)
    return jax.lax.platform_dependent(g, x, rate, nu, *pairs, cpu=in_turn, default=at_once)


def average(new: jax.Array, old: jax.Array, decay: ArrayLike) -> jax.Array:
    """The moving average `(1 - decay) new + decay old`."""
    # 1 - decay is taken before any rounding to the arrays' dtype.
    return jnp.asarray(1 - decay, new.dtype) * new + jnp.asarray(decay, new.dtype) * old


def bias_correction(decay: ArrayLike, count: ArrayLike) -> jax.Array:
    """`1 - decay^t`, which an average of equal values from 0 on has reached after t steps."""
    wide = jnp.result_type(float)  # float64 where float64 arrays are possible
    return 1 - jnp.asarray(decay, wide) ** jnp.asarray(count, wide)


def adam_step(
    mu: jax.Array,
    nu: jax.Array,
    correction1: jax.Array,
    correction2: jax.Array,
    eps: ArrayLike,
    axes: tuple[int, ...],
) -> jax.Array:
    """`mu/(1 - b1^t) / (sqrt(nu/(1 - b2^t)) + eps)`, in the order of Optax's operations."""
    if not axes:
        return mu / correction1.astype(mu.dtype) / root_mean_square(nu, correction2, eps)
    return mu * once_per_group(step_per_momentum(nu, correction1, correction2, eps))


def step_per_momentum(
    nu: jax.Array, correction1: jax.Array, correction2: jax.Array, eps: ArrayLike
) -> jax.Array:
    """What `adam_step` multiplies the momentum by: one division per group, not per element."""
    return 1 / (correction1.astype(nu.dtype) * root_mean_square(nu, correction2, eps))


def root_mean_square(nu: jax.Array, correction2: jax.Array, eps: ArrayLike) -> jax.Array:
    """`sqrt(nu/(1 - b2^t)) + eps`, kept from 0, so that without a gradient nothing moves."""
    root = jnp.sqrt(nu / correction2.astype(nu.dtype)) + jnp.asarray(eps, nu.dtype)
    return jnp.maximum(root, jnp.asarray(math.sqrt(jnp.finfo(nu.dtype).tiny), nu.dtype))
