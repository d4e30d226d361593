"""Rotational optimizers: a fixed angle per step on average, and the angles of equilibrium."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.groups import zeros_per_group
from spherical_optax._ground.hyperparams import (
    check_decays,
    check_elements,
    check_not_negative,
    check_optimizer,
    check_rates,
    check_shares,
)
from spherical_optax._ground.leaves import check_trees, map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, map_selected
from spherical_optax._ground.sums import inners, nonzero
from spherical_optax._links.moments import average, bias_correction
from spherical_optax._links.radii import radius_at_init


class RotationalState(NamedTuple):
    """State of `rotational`."""

    inner_state: optax.OptState  # the direction's own
    count: jax.Array  # int32 []: steps so far
    radius: optax.Params  # float32 at least, one number per group; a scalar 0 for classic leaves
    square: optax.Params  # moving average of |u|², likewise


def rotational(
    direction: optax.GradientTransformation,
    angle: optax.ScalarOrSchedule,
    *,
    channel_axes: ChannelAxes,
    update_norm_decay: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    zero_mean: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Rotational optimizer: turns each group by an angle that is fixed on average over steps.

    With u the direction, R the radius at init, and per group:

        u <- u - mean(u)                                        with zero_mean
        u <- P_x(u)
        s <- update_norm_decay s + (1 - update_norm_decay) |u|²
        y = x - angle R u / (sqrt(s/(1 - update_norm_decay^t)) + eps)
        x <- R y/|y|

    The angle takes the place of learning rate and weight decay: `equilibrium_angle` says which one
    AdamW comes to by itself, so that training there starts in equilibrium. A schedule of AdamW's
    learning rate enters it as a square root. Single steps differ in length as their directions do,
    unlike `hyperball`'s. Classic leaves take x - angle u; for a learning rate of their own put this
    into `optax.partition`.

    |P_x(u)|² is taken by Pythagoras, which saves a round of sums: where a share p of u is tangent,
    it is exact to eps/p², eps being the rounding of the sums, and y is off the sphere by angle²/2
    times that, until the next step. What is radial but for rounding moves nothing. A group that is
    zero at init, or that init could not look at, takes classic steps until it has a norm, which is
    its radius from then on.

    Args:
      direction: an optimizer without learning rate, sign and decay, such as
        `optax.scale_by_adam()`.
      angle: radians per step, a number or a schedule.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      update_norm_decay: of the average of |u|², in [0, 1).
      eps: added to its root.
      zero_mean: whether directions lose their mean, for weights whose inputs have one. The
        published constructor also takes it from the weights at the start; here they stay as they
        are.

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Kosson et al., *Rotational Equilibrium* (arXiv 2305.17212), algorithm 1.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.rotational(optax.identity(), 0.25, channel_axes=())
    >>> x, g = jnp.array([3.0, 4.0]), jnp.array([8.0, -1.0])
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> jnp.tan(so.angle_per_step(x, updates, channel_axes=())).round(5)
    Array([0.25], dtype=float32)
    """
    check_optimizer(direction=direction)
    check_rates(angle=angle)
    check_decays(update_norm_decay=update_norm_decay)
    check_not_negative(eps=eps)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> RotationalState:
        square = map_selected(
            lambda leaf: (
                zeros_per_group(leaf.value, leaf.groups)
                if leaf.spherical
                else jnp.zeros([], jnp.float32)
            ),
            channel_axes,
            params,
        )
        radii = map_selected(radius_at_init, channel_axes, params)
        return RotationalState(direction.init(params), jnp.zeros([], jnp.int32), radii, square)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RotationalState]:
        params = need_params(params, "rotational")
        check_trees(channel_axes, updates, params)
        directions, inner_state = direction.update(updates, state.inner_state, params, **extra_args)
        theta = angle(state.count) if callable(angle) else angle
        count = jnp.asarray(optax.safe_increment(state.count))
        correction = bias_correction(update_norm_decay, count)

        def leaf(
            axes: tuple[int, ...], u: jax.Array, r: jax.Array, s: jax.Array, x: jax.Array
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            eta = jnp.asarray(theta, u.dtype)
            if not axes:
                return -eta * u, r, s
            if zero_mean:
                u = u - jnp.mean(u, axes, keepdims=True)
            # One round of sums: |P_x(u)|² and |y|² by Pythagoras. Of a radial direction rounding is
            # left, which would be made a step.
            xx, xu, uu = inners(axes, (x, x), (x, u), (u, u))
            share = xu / nonzero(xx)
            vv = uu - share * xu
            still = vv <= 8 * jnp.finfo(u.dtype).eps * uu
            vv = jax.lax.select(still, jnp.zeros_like(vv), vv)
            s = average(vv, s, update_norm_decay)
            length = jnp.sqrt(s / correction.astype(s.dtype)) + jnp.asarray(eps, s.dtype)
            # A group that was zero at init has the first norm that it came to; until then it takes
            # the classic step.
            r = jax.lax.select(r == 0, jnp.sqrt(xx), r)
            free = r == 0
            length = jax.lax.select(still, jnp.full_like(length, jnp.inf), length)
            step = jnp.where(free, eta, eta * r / length)
            square = jnp.maximum(xx + step**2 * vv, jnp.finfo(u.dtype).tiny)
            scale = jnp.where(free, 1, r / jnp.sqrt(square))
            of_x = scale * (1 + step * share) - 1
            return of_x * x - scale * step * u, r, s

        steps, radii, square = map_leaves(
            leaf, channel_axes, directions, state.radius, state.square, params=params
        )
        updates = optax.tree.cast_like(steps, updates)  # a direction may be wider
        return updates, RotationalState(inner_state, count, radii, square)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def equilibrium_angle(
    learning_rate: ArrayLike, weight_decay: ArrayLike, *, b1: ArrayLike = 0.9
) -> jax.Array:
    """Angle per step at which AdamW's decay and steps keep a group's radius in balance.

        sqrt(2 learning_rate weight_decay (1 - b1)/(1 + b1))

    For gradients that are independent from step to step. It takes some 1/(2 learning_rate
    weight_decay) steps to come near it.

    Args:
      learning_rate: AdamW's, from 0, of any shape.
      weight_decay: from 0, decoupled: a step shortens x by learning_rate weight_decay x.
      b1: decay of the first moment, in [0, 1).

    Returns:
      Radians.

    Raises:
      ValueError: a number is out of range.

    Source: Kosson et al., *Rotational Equilibrium* (arXiv 2305.17212), table 1.

    >>> import spherical_optax as so
    >>> so.equilibrium_angle(1e-3, 0.1, b1=0.9).round(5)
    Array(0.00324, dtype=float32, weak_type=True)
    """
    check_elements(check_not_negative, learning_rate=learning_rate, weight_decay=weight_decay)
    check_elements(check_decays, b1=b1)
    share = (1 - jnp.asarray(b1)) / (1 + jnp.asarray(b1))
    return jnp.sqrt(2 * jnp.asarray(learning_rate) * weight_decay * share)


def equilibrium_angle_of_sgd(
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
    *,
    momentum: ArrayLike = 0.9,
) -> jax.Array:
    """Angle per step at which the L2 and steps of SGD with momentum keep a radius in balance.

        sqrt(2 learning_rate weight_decay / (1 + momentum))

    For gradients that are independent from step to step.

    Args:
      learning_rate: SGD's, from 0, of any shape.
      weight_decay: from 0, coupled: added to the gradient as weight_decay x.
      momentum: decay of the buffer, in [0, 1), whose gradients come in undampened.

    Returns:
      Radians.

    Raises:
      ValueError: a number is out of range.

    Source: Kosson et al., *Rotational Equilibrium* (arXiv 2305.17212), table 1.

    >>> import spherical_optax as so
    >>> so.equilibrium_angle_of_sgd(0.1, 5e-4, momentum=0.0).round(5)
    Array(0.01, dtype=float32, weak_type=True)
    """
    check_elements(check_not_negative, learning_rate=learning_rate, weight_decay=weight_decay)
    check_elements(check_decays, momentum=momentum)
    return jnp.sqrt(2 * jnp.asarray(learning_rate) * weight_decay / (1 + jnp.asarray(momentum)))


def equilibrium_angle_of_sgd_mrt(
    learning_rate: ArrayLike, weight_decay: ArrayLike, *, dampening: ArrayLike = 0.0
) -> jax.Array:
    """Angle per step at which the L2 and steps of `sgd_mrt` keep a radius in balance.

        sqrt(2 learning_rate weight_decay (1 - dampening))

    For any gradients and any momentum: the transport takes the decay's radial part out of the
    buffer at each step, and leaves tangents only.

    Args:
      learning_rate: SGD-MRT's, from 0, of any shape.
      weight_decay: from 0, coupled: added to the gradient as weight_decay x.
      dampening: share of each gradient that is left out.

    Returns:
      Radians.

    Raises:
      ValueError: a number is out of range.

    Source: the balance of 2 η λ r² against |step|², derived here.

    >>> import spherical_optax as so
    >>> so.equilibrium_angle_of_sgd_mrt(0.1, 5e-4).round(5)
    Array(0.01, dtype=float32, weak_type=True)
    """
    check_elements(check_not_negative, learning_rate=learning_rate, weight_decay=weight_decay)
    check_elements(check_shares, dampening=dampening)
    share = 1 - jnp.asarray(dampening)
    return jnp.sqrt(2 * jnp.asarray(learning_rate) * weight_decay * share)


def equilibrium_angle_of_lion(
    learning_rate: ArrayLike,
    weight_decay: ArrayLike,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
) -> jax.Array:
    """Angle per step at which Lion's decay and steps keep a group's radius in balance.

        sqrt(π learning_rate weight_decay ((1 - b1)² + b1² (1 - b2)/(1 + b2)))

    For gradients that are normal and independent from step to step.

    Args:
      learning_rate: Lion's, from 0, of any shape.
      weight_decay: from 0, decoupled.
      b1: share of the momentum in the step, in [0, 1].
      b2: decay of the momentum, in [0, 1].

    Returns:
      Radians.

    Raises:
      ValueError: a number is out of range.

    Source: Kosson et al., *Rotational Equilibrium* (arXiv 2305.17212), table 1.

    >>> import spherical_optax as so
    >>> so.equilibrium_angle_of_lion(1e-4, 1.0, b1=0.9, b2=0.99).round(5)
    Array(0.0021, dtype=float32, weak_type=True)
    """
    check_elements(check_not_negative, learning_rate=learning_rate, weight_decay=weight_decay)
    check_elements(check_shares, b1=b1, b2=b2)
    b1, b2 = jnp.asarray(b1), jnp.asarray(b2)
    share = (1 - b1) ** 2 + b1**2 * (1 - b2) / (1 + b2)
    return jnp.sqrt(jnp.pi * jnp.asarray(learning_rate) * weight_decay * share)
