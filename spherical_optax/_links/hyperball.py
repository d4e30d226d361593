"""Hyperball: any direction as a step of fixed relative length on spheres, and AdamH."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.groups import wide_dtype, zeros_per_group
from spherical_optax._ground.hyperparams import check_not_negative, check_optimizer, check_rates
from spherical_optax._ground.leaves import check_trees, map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, Leaf, map_selected
from spherical_optax._ground.sums import inners, nonzero, squared_norm
from spherical_optax._links.moments import check_moments
from spherical_optax._links.radii import check_radius, radius_at_init
from spherical_optax._links.ready import DecayMask, decay_flags

Radius = float | Callable[[str, Any], ArrayLike] | None
Retraction = Literal["normalize", "exp"]
Zero = Literal["error", "skip", "fill"]


class HyperballState(NamedTuple):
    """State of `hyperball`."""

    inner_state: optax.OptState  # the direction's own
    count: jax.Array  # int32 []: steps so far, for schedules
    # float32 at least, one number per group; 0 for a group of zeros, and a scalar 0 for classic
    # leaves.
    radius: optax.Params


def hyperball(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    channel_axes: ChannelAxes,
    radius: Radius = None,
    retraction: Retraction = "normalize",
    zero: Zero = "error",
) -> optax.GradientTransformationExtraArgs:
    """Hyperball: steps of a length that is fixed relative to the radius, back onto the sphere.

    With u the direction, R the radius, and N(v) = v/|v|, per group:

        x <- R N(x - learning_rate R N(u))                      retraction "normalize"
        x <- R (cos(learning_rate) N(x) - sin(learning_rate) N(P_x(u)))             "exp"

    Classic leaves take x - learning_rate u. R is stored at init: the current norm would drift, by
    0.5 % in 3,000 steps of bfloat16. A start off the sphere comes onto it with its first step. A
    group whose direction is zero does not move, and none does at learning rate 0.

    The learning rate is an angle: with "normalize" the sine of the largest one that a step can
    travel, and nearly the step's angle where u is tangent; with "exp" the angle itself, in radians.
    Coming from AdamW, sqrt(learning_rate · weight_decay) is a start: on the authors' own figures it
    is within a factor of 1.4. There is no weight decay here, as a sphere has none: what people call
    so is an addition of x to u before it is normalised, which makes the step a little longer or
    shorter, or a shrinking of x, which the retraction undoes.

    Args:
      direction: an optimizer without learning rate and sign, such as `optax.scale_by_adam()`.
        Clipping, averaging of gradients and the like come before it.
      learning_rate: a number or a schedule, in [0, 1) with "normalize", and below π with "exp".
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      radius: of the spheres: `None` takes each group's norm at init, a number is that of all, and a
        callable `(path, leaf) -> radius` gives a number for a leaf or one for each of its groups.
      retraction: "normalize", the published one, or "exp", along the great circle.
      zero: what becomes of a group that is zero at init if `radius` is None. "error" refuses it;
        "skip" moves it as a classic leaf, and gives it the radius to which that leads; "fill" gives
        it the root mean square of its leaf's other radii. Where init cannot look at values, under
        `jax.jit` or with shapes, "error" acts as "skip".

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: an unknown `retraction` or `zero`; a number that is out of range; at
        init, a group of zeros (see `zero`); `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Wen et al., *Hyperball optimization* (2025); "exp" is the exponential map.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.hyperball(optax.identity(), 0.25, channel_axes=(), retraction="exp")
    >>> x, g = jnp.array([3.0, 4.0]), jnp.array([8.0, -1.0])
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> y = optax.apply_updates(x, updates)
    >>> so.group_norm(y, channel_axes=()).round(5), so.angle(x, y, channel_axes=()).round(5)
    (Array([5.], dtype=float32), Array([0.25], dtype=float32))
    """
    return on_hyperballs(
        direction,
        learning_rate,
        channel_axes=channel_axes,
        radius=radius,
        retraction=retraction,
        zero=zero,
    )


def adam_h(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    channel_axes: ChannelAxes,
    radius: Radius = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_weight_decay: ArrayLike = 0.0,
    adam_weight_decay_mask: DecayMask = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamH: Adam's direction on hyperballs, and AdamW elsewhere.

        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) g²
        u = mu/(1 - b1^t) / (sqrt(nu/(1 - b2^t)) + eps)
        x <- R N(x - learning_rate R N(u))                              spherical leaves
        x <- x - adam_learning_rate (u + adam_weight_decay x)           classic leaves

    See `hyperball` for R, N and the learning rate. As u is normalised, eps matters only beside
    small gradients: 1e-15 makes the steps independent of the loss's scale.

    Args:
      learning_rate: of the spherical leaves, a number or a schedule: 0.01 to 0.02 is usual.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      radius: of the spheres, see `hyperball`.
      adam_learning_rate: of the classic leaves, a number or a schedule; by default the same.
      adam_weight_decay: decoupled decay of the classic leaves, not negative.
      adam_weight_decay_mask: those that decay: a tree of booleans, or a prefix of one, or a
        callable from the parameters to one; by default all, gains and biases too.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: as for `hyperball`, with `zero="error"`.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Wen et al., *Hyperball optimization* (2025), AdamH.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.adam_h(0.02, channel_axes=-1)
    >>> x, g = jnp.array([[3.0, 0.0], [4.0, 1.0]]), jnp.array([[1.0, 2.0], [1.0, 3.0]])
    >>> updates, _ = tx.update(g, tx.init(x), x)
    >>> so.group_norm(optax.apply_updates(x, updates), channel_axes=-1).round(5)
    Array([[5., 1.]], dtype=float32)
    """
    check_moments(b1, b2, eps, mu_dtype)
    return on_hyperballs(
        optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype),
        learning_rate,
        channel_axes=channel_axes,
        radius=radius,
        classic_learning_rate=adam_learning_rate,
        classic_weight_decay=adam_weight_decay,
        classic_weight_decay_mask=adam_weight_decay_mask,
        name="adam_h",
    )


def on_hyperballs(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    channel_axes: ChannelAxes,
    radius: Radius,
    retraction: Retraction = "normalize",
    zero: Zero = "error",
    classic_learning_rate: optax.ScalarOrSchedule | None = None,
    classic_weight_decay: ArrayLike = 0.0,
    classic_weight_decay_mask: DecayMask = None,
    name: str = "hyperball",
) -> optax.GradientTransformationExtraArgs:
    """`hyperball`, with a learning rate and a decoupled decay of their own for classic leaves."""
    for option, value, known in (("retraction", retraction, Retraction), ("zero", zero, Zero)):
        if value not in get_args(known):
            modes = ", ".join(map(repr, get_args(known)))
            raise ValueError(f"{option}={value!r} is not one of {modes}")
    if radius is not None and not callable(radius):
        check_radius(radius)
    if classic_learning_rate is None:
        classic_learning_rate = learning_rate
    check_optimizer(direction=direction)
    check_rates(1 if retraction == "normalize" else math.pi, learning_rate=learning_rate)
    check_rates(adam_learning_rate=classic_learning_rate)
    check_not_negative(adam_weight_decay=classic_weight_decay)
    direction = optax.with_extra_args_support(direction)

    def init_fn(params: optax.Params) -> HyperballState:
        radii = map_selected(lambda leaf: _radii(leaf, radius, zero), channel_axes, params)
        return HyperballState(direction.init(params), jnp.zeros([], jnp.int32), radii)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HyperballState]:
        params = need_params(params, name)
        check_trees(channel_axes, updates, params)
        directions, inner_state = direction.update(updates, state.inner_state, params, **extra_args)
        rates = (learning_rate, classic_learning_rate)
        eta, classic_eta = (rate(state.count) if callable(rate) else rate for rate in rates)

        def leaf(
            axes: tuple[int, ...], u: jax.Array, r: jax.Array, x: jax.Array, decays: bool = True
        ) -> tuple[jax.Array, jax.Array]:
            classic_rate = jnp.asarray(classic_eta, u.dtype)
            if not axes:
                if decays and (not isinstance(classic_weight_decay, float) or classic_weight_decay):
                    u = u + jnp.asarray(classic_weight_decay, u.dtype) * x
                return -classic_rate * u, r
            products = inners(axes, (x, x), (x, u), (u, u))
            # A group that was zero at init has the first norm that it came to.
            r = jax.lax.select(r == 0, jnp.sqrt(products[0]), r)
            rate = jnp.asarray(eta, u.dtype)
            if retraction == "normalize":
                return _normalized_step(rate, u, x, products, r, classic_rate), r
            return _geodesic_step(rate, u, x, products, r, axes, classic_rate), r

        flags = decay_flags(classic_weight_decay_mask, params)
        steps, radii = map_leaves(
            leaf, channel_axes, directions, state.radius, params=params, flags=flags
        )
        # A direction may be wider, such as that of Optax's Adam with a wider mu_dtype.
        updates = optax.tree.cast_like(steps, updates)
        count = jnp.asarray(optax.safe_increment(state.count))
        return updates, HyperballState(inner_state, count, radii)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _normalized_step(
    eta: jax.Array,
    u: jax.Array,
    x: jax.Array,
    products: Sequence[jax.Array],
    r: jax.Array,
    classic_eta: jax.Array,
) -> jax.Array:
    """`r N(x - eta r N(u)) - x`; the norm of the sum follows from sums of what is there before."""
    xx, xu, uu = products
    step = eta * r / nonzero(jnp.sqrt(uu))
    square = jnp.maximum(xx + step * (step * uu - 2 * xu), 0)
    return _combine(x, u, r / nonzero(jnp.sqrt(square)), step, classic_eta, r)


def _geodesic_step(
    eta: jax.Array,
    u: jax.Array,
    x: jax.Array,
    products: Sequence[jax.Array],
    r: jax.Array,
    axes: tuple[int, ...],
    classic_eta: jax.Array,
) -> jax.Array:
    """`r (cos(eta) N(x) - sin(eta) N(P_x(u))) - x`."""
    xx, xu, uu = products
    v = u - xu / nonzero(xx) * x
    vv = squared_norm(v, axes)
    # Of a radial direction rounding is left, which would be made a step. A group of zeros goes
    # straight to its sphere.
    noise = (8 * jnp.finfo(u.dtype).eps) ** 2 * uu
    length = jnp.sqrt(jnp.where(vv > noise, vv, 0 * vv))
    scale = jnp.where(xx == 0, 1, jnp.cos(eta) * r / nonzero(jnp.sqrt(xx)))
    turn = jnp.where((xx == 0) & (eta != 0), r, jnp.sin(eta) * r) / nonzero(length)
    return _combine(x, v, scale, turn / nonzero(scale), classic_eta, r)


def _combine(
    x: jax.Array,
    u: jax.Array,
    scale: jax.Array,
    step: jax.Array,
    classic_eta: jax.Array,
    r: jax.Array,
) -> jax.Array:
    """`scale (x - step u) - x`; 0 where the step is; a classic step where there is no radius."""
    idle = step == 0
    of_x = jnp.where(idle, 0 * scale, scale - 1)
    of_u = jnp.where(r == 0, classic_eta, scale * step)
    return of_x * x - of_u * u


def _radii(leaf: Leaf, radius: Radius, zero: Zero) -> jax.Array:
    if not leaf.spherical:
        return jnp.zeros([], jnp.float32)
    value, counts = leaf.value, leaf.groups.counts
    if radius is not None:
        given = radius(leaf.path, value) if callable(radius) else radius
        given = jnp.asarray(given, wide_dtype(value.dtype))
        if given.shape not in ((), counts):
            raise ValueError(
                f"{leaf.path}: radius has the shape {given.shape} and is neither a number nor one "
                f"for each group, {counts}"
            )
        if not isinstance(given, jax.core.Tracer):
            known = jax.device_get(given)  # inside `jax.jit` a comparison would be traced
            if not ((known > 0) & (known < math.inf)).all():
                raise ValueError(f"{leaf.path}: radius={known} is not positive and finite")
        return zeros_per_group(value, leaf.groups) + given
    radii = radius_at_init(leaf)
    if isinstance(value, jax.ShapeDtypeStruct):
        return radii
    if zero == "fill":
        known = (radii > 0) & (radii < math.inf)
        total = jnp.sum(jnp.where(known, radii, 0) ** 2)
        others = jnp.sqrt(total / jnp.maximum(jnp.sum(known), 1))
        radii = jnp.where(radii == 0, others.astype(radii.dtype), radii)
    if zero != "skip" and not isinstance(radii, jax.core.Tracer) and jnp.any(radii == 0):
        raise ValueError(
            f"{leaf.path}: {int(jnp.sum(radii == 0))} of its {radii.size} groups are zero at init "
            "and have no radius; pass radius=, or to so.hyperball zero='skip' or zero='fill', or "
            "give this path channel_axes None"
        )
    return radii
