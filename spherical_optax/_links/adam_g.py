"""AdamG: Adam on the unit sphere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.geometry import (
    Transport,
    check_transport,
    isometric_stretch,
    transport_momentum,
    transport_numbers,
    transport_pairs,
)
from spherical_optax._ground.hyperparams import check_rates
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes
from spherical_optax._ground.sums import inners, nonzero, squared_norm
from spherical_optax._links.moments import (
    adam_step,
    average,
    bias_correction,
    check_moments,
    step_per_momentum,
    zero_moments,
)
from spherical_optax._links.ready import DecayMask, add_coupled_decay


def scale_by_adam_g(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    channel_axes: ChannelAxes,
    transport: Transport = "isometric",
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Makes steps in units of the radius, with one second moment per group; see `adam_g`.

    Place it before the learning rate, and `reproject_to_sphere` last in the chain.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      transport: how mu follows the point: "isometric" projects it on the tangent space at x and
        keeps its length, the parallel transport of a tangent momentum; "rescale" lets the
        projection shorten it; "none" leaves it.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation whose state is an `optax.ScaleByAdamState`. Its nu, in float32 at
      least, has one number per group.

    Raises:
      ValueError: `transport` is unknown, a number is out of range, or `update` is called without
        the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.scale_by_adam_g(channel_axes=())
    >>> x, g = jnp.array([2.0, 0.0]), jnp.array([0.0, 0.1])
    >>> tx.update(g, tx.init(x), x)[0].round(3)  # as long as x
    Array([0., 2.], dtype=float32)
    """
    check_transport(transport)
    check_moments(b1, b2, eps, mu_dtype)

    def init_fn(params):
        mu, nu = zero_moments(params, channel_axes, mu_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        params = need_params(params, "scale_by_adam_g")
        count = optax.safe_increment(state.count)
        corrections = bias_correction(b1, count), bias_correction(b2, count)

        def leaf(axes, g, mu, nu, x):
            if not axes:
                return classic_step(g, mu, nu, b1, b2, eps, *corrections)
            sq_norm, square, *products = inners(
                axes, (x, x), (g, g), *transport_pairs(x, mu, transport)
            )
            radius = radius_or_1(sq_norm)
            mu = transport_momentum(x, mu, transport_numbers(nonzero(sq_norm), products))
            mu = average(radius * g, mu, b1)
            nu = average(radius**2 * square, nu, b2)
            return mu * (radius * step_per_momentum(nu, *corrections, eps)), mu, nu

        updates, mu, nu = map_leaves(leaf, channel_axes, updates, state.mu, state.nu, params=params)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_g(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: DecayMask = None,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamG: Adam on the unit sphere, with parallel transport of its momentum.

    With t from 1, in each spherical group:

        g <- |x| g                                         the gradient at x/|x|
        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) |g|²                        one number per group
        y = x - learning_rate |x| · mu/(1 - b1^t) / (sqrt(nu/(1 - b2^t)) + eps)
        x <- y/|y|                                         also at the first step
        mu <- mu transported from the old x to the new one

    so that the trajectory from x is the one from x/|x|. Classic leaves take Adam. The first update
    is rounded at the size of x: let parameters narrower than float32 start near the unit sphere.

    Args:
      learning_rate: a number or a schedule: the angle of a step, in radians, where gradients
        agree with each other. Where they are noise, steps are shorter, about a quarter at b1 = 0.9.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: coupled L2 on the classic leaves: a number or a schedule, not negative. The
        spherical ones, whose radius is fixed, take none.
      weight_decay_mask: the classic leaves that decay: a tree of booleans, or a prefix of one,
        or a callable from the parameters to one; by default all.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Cho & Lee, *Riemannian approach to batch normalization* (arXiv 1709.09603),
    Adam-G, with a retraction for its exponential map and without its clipping.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.adam_g(0.1, channel_axes=())
    >>> x, g = jnp.array([3.0, 4.0]), jnp.array([0.4, -0.3])
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> so.group_norm(optax.apply_updates(x, updates), channel_axes=()).round(6)
    Array([1.], dtype=float32)
    """
    return optax.chain(
        add_coupled_decay(
            weight_decay, "adam_g", mask=weight_decay_mask, except_spherical=channel_axes
        ),
        _adam_g(learning_rate, b1, b2, eps, channel_axes, mu_dtype),
    )


def _adam_g(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`scale_by_adam_g`, learning rate and `reproject_to_sphere(1.0)` in one.

    The norm of the point that a step leads to follows from products of what is there before it, so
    that all sums of all leaves can be taken at once.
    """
    check_rates(learning_rate=learning_rate)
    check_moments(b1, b2, eps, mu_dtype)

    def init_fn(params):
        mu, nu = zero_moments(params, channel_axes, mu_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        params = need_params(params, "adam_g")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        count = optax.safe_increment(state.count)
        corrections = bias_correction(b1, count), bias_correction(b2, count)

        def leaf(axes, g, mu, nu, x):
            eta = jnp.asarray(rate, g.dtype)
            if not axes:
                step, mu, nu = classic_step(g, mu, nu, b1, b2, eps, *corrections)
                return -eta * step, mu, nu
            xx, gg, mm, xg, xm, gm = inners(
                axes, (x, x), (g, g), (mu, mu), (x, g), (x, mu), (g, mu)
            )
            radius = radius_or_1(xx)
            share = xm / nonzero(xx)
            left = mm - share * xm
            # mu <- old (mu - share x) + new g, whose product with x is new xg.
            old = jnp.asarray(b1, g.dtype) * isometric_stretch(mm, left)
            new = jnp.asarray(1 - b1, g.dtype) * radius
            # Changes nothing. But on a CPU XLA copies a momentum that does not wait for its sums.
            new = jax.lax.select(jnp.isnan(gm), jnp.full_like(gm, jnp.nan), new)
            mu = old * (mu - share * x) + new * g
            gg, twice = radius**2 * gg, 2 * new
            mm = old * (old * left + twice * (gm - share * xg))
            mm = mm + jnp.asarray((1 - b1) ** 2, g.dtype) * gg
            nu = average(gg, nu, b2)
            step = eta * radius * step_per_momentum(nu, *corrections, eps)
            square = xx + step * (step * mm - twice * xg)  # of x - step mu
            scale = jax.lax.rsqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))
            return scale * (x - step * mu) - x, mu, nu

        updates, mu, nu = map_leaves(leaf, channel_axes, updates, state.mu, state.nu, params=params)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def radius_or_1(sq_norm: jax.Array) -> jax.Array:
    """The radius of a group; 1 of a group of zeros."""
    return jnp.sqrt(jax.lax.select(sq_norm == 0, jnp.ones_like(sq_norm), sq_norm))


def classic_step(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    correction1: jax.Array,
    correction2: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adam's step and moments."""
    mu, nu = average(g, mu, b1), average(squared_norm(g, ()), nu, b2)
    return adam_step(mu, nu, correction1, correction2, eps, ()), mu, nu
