"""AdamS, AdamSRT and AdamG: Adam with one second moment per group.

Each link stands right above its ready optimizer, and the mathematics is in the optimizer's
docstring. A leaf without reduction axes runs through the same lines and comes out as in Adam.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._constraints import reproject_to_sphere
from spherical_optax._geometry import Transport, check_transport, transport_momentum
from spherical_optax._groups import divide_or, group_size, norm, squared_norm, widen
from spherical_optax._selection import (
    ChannelAxes,
    map_leaves,
    map_selected,
    need_params,
    path_mask,
)


class ScaleByAdamSState(NamedTuple):
    """State of `scale_by_adam_s`."""

    count: ArrayLike  # int32 []
    mu: optax.Updates  # as the parameters, or in mu_dtype
    nu: optax.Updates  # float32 at least, one number per group: the summed axes have size 1


def scale_by_adam_s(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Divides the momentum by one root mean square per group; see `adam_s`.

    Place it where `optax.scale_by_adam` would stand, after coupled weight decay and before the
    learning rate. It does not need the parameters.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, divided by sqrt(d).
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation.

    Raises:
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.scale_by_adam_s(channel_axes=())
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> so.group_inner(updates, updates, channel_axes=()).round(3)  # d, the first time
    Array([2.], dtype=float32)
    """

    def init_fn(params):
        mu, nu = _zero_moments(params, channel_axes, mu_dtype)
        return ScaleByAdamSState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        del params
        count = optax.safe_increment(state.count)

        def leaf(axes, g, mu, nu):
            step, wide_mu, nu = _adam_step(widen(g), widen(mu), nu, count, b1, b2, eps, axes)
            return step.astype(g.dtype), wide_mu.astype(mu.dtype), nu

        updates, mu, nu = map_leaves(leaf, channel_axes, updates, state.mu, state.nu)
        return updates, ScaleByAdamSState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_s(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamS: Adam whose division is one number per group, so that it keeps directions.

    With t from 1, and d the number of elements of a group:

        g <- g + weight_decay x
        mu <- b1 mu + (1 - b1) g
        nu <- b2 nu + (1 - b2) |g|²/d                           one number per group
        x <- x - learning_rate · mu/(1 - b1^t) / (sqrt(nu/(1 - b2^t)) + eps/sqrt(d))

    With d = 1 this is Adam, and so are the leaves that the selection leaves out. Sums run in
    float32 at least. A group without gradient does not move.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, divided by sqrt(d).
      weight_decay: coupled L2, on every leaf: a number or a schedule, not negative.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation; its state has one first moment per element and one second moment
      per group.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Roburin et al., *Spherical Perspective on Learning with Normalization Layers*
    (arXiv 2006.13382).

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.adam_s(0.1, channel_axes=())
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(grads, tx.init(grads), jnp.array([1.0, 0.0]))
    >>> so.angle(updates, -grads, channel_axes=())  # the division does not turn the gradient
    Array([0.], dtype=float32)
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_adam_s(b1, b2, eps, channel_axes=channel_axes, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


class ScaleByAdamSRTState(NamedTuple):
    """State of `scale_by_adam_srt`."""

    count: ArrayLike  # int32 []
    mu: optax.Updates  # as the parameters, or in mu_dtype
    nu: optax.Updates  # float32 at least, one number per group: the summed axes have size 1
    sq_norm: optax.Updates  # like nu: |x|² at the last update; a scalar 0 for classic leaves


def scale_by_adam_srt(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    channel_axes: ChannelAxes,
    transport: Transport = "rescale",
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """`scale_by_adam_s` with moments that follow the point over its sphere; see `adam_srt`.

    Place it where `optax.scale_by_adam` would stand. The moments are brought to the parameters
    that `update` is given, so learning rates, schedules, `optax.MultiSteps` and whatever follows
    in the chain need no care. Two limits of "rescale":

    * after a step that is not collinear with the momentum in each group (element-wise clipping
      behind this link, say) the projected momentum is tangent, and approximates the published
      formula to the order of that formula's own error;
    * after a link that rescales the point (decoupled decay, `reproject_to_sphere`) mu lacks this
      factor. Behind `reproject_to_sphere` use "isometric", which is then exact.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, divided by sqrt(d).
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      transport: "rescale" projects mu on the tangent space at x and multiplies nu by the ratio of
        the squared norms; "isometric" projects mu, keeps its length, and leaves nu; "none" is
        `scale_by_adam_s`.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: `transport` is unknown, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.scale_by_adam_srt(channel_axes=())
    >>> x, g = jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0])
    >>> _, state = tx.update(g, tx.init(x), x)
    >>> updates, _ = tx.update(jnp.zeros(2), state, x)  # without a gradient, mu alone moves x
    >>> abs(so.group_inner(updates, x, channel_axes=()))[0] < 1e-6
    Array(True, dtype=bool)
    """
    check_transport(transport)

    def init_fn(params):
        mu, nu = _zero_moments(params, channel_axes, mu_dtype)
        sq_norm = map_selected(
            lambda leaf: (
                squared_norm(widen(leaf.value), leaf.axes)
                if leaf.axes
                else jnp.zeros([], jnp.float32)
            ),
            channel_axes,
            params,
        )
        return ScaleByAdamSRTState(jnp.zeros([], jnp.int32), mu, nu, sq_norm)

    def update_fn(updates, state, params=None):
        params = need_params(params, "scale_by_adam_srt")
        count = optax.safe_increment(state.count)

        def leaf(axes, g, mu, nu, sq_norm, x):
            wide_mu = widen(mu)
            if axes:
                x = widen(x)
                now = squared_norm(x, axes)
                if transport == "rescale":
                    ratio = divide_or(sq_norm, now, 1.0)
                    nu = nu * jnp.where(ratio == 0, 1.0, ratio)
                wide_mu, sq_norm = transport_momentum(x, wide_mu, axes, transport), now
            step, wide_mu, nu = _adam_step(widen(g), wide_mu, nu, count, b1, b2, eps, axes)
            return step.astype(g.dtype), wide_mu.astype(mu.dtype), nu, sq_norm

        updates, mu, nu, sq_norm = map_leaves(
            leaf, channel_axes, updates, state.mu, state.nu, state.sq_norm, params=params
        )
        return updates, ScaleByAdamSRTState(count, mu, nu, sq_norm)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_srt(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamSRT: AdamS whose moments are rescaled and transported to each new point.

    A step of `adam_s` leads from x to y; the moments then become

        mu <- (<x, y> mu - <mu, y> x) / |y|²
        nu <- nu |x|²/|y|²

    As y = x - s mu with one number s per group, the first line is mu - (<mu, y>/|y|²) y, the
    projection of mu on the tangent space at y. It needs neither x nor s, and so it waits: mu is
    stored as it is and projected when the next update shows y. The state has mu, and one nu and
    one |x|² per group: half of Adam's.

    Args:
      learning_rate: a number or a schedule.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, divided by sqrt(d).
      weight_decay: coupled L2, on every leaf: a number or a schedule, not negative.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Roburin et al., *Spherical Perspective on Learning with Normalization Layers*
    (arXiv 2006.13382); the published code adds eps to |y|², which would break the
    equivariance under rescaling and is left out here.

    >>> import jax, jax.numpy as jnp, optax, spherical_optax as so
    >>> params = jnp.ones((3, 3, 64, 128))
    >>> nbytes = lambda tx: sum(s.nbytes for s in jax.tree.leaves(tx.init(params)))
    >>> round(nbytes(so.adam_srt(1e-3, channel_axes=-1)) / nbytes(optax.adam(1e-3)), 2)
    0.5
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        scale_by_adam_srt(b1, b2, eps, channel_axes=channel_axes, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


class ScaleByAdamGState(NamedTuple):
    """State of `scale_by_adam_g`."""

    count: ArrayLike  # int32 []
    mu: optax.Updates  # as the parameters, or in mu_dtype
    nu: optax.Updates  # float32 at least, one number per group: the summed axes have size 1


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
      A gradient transformation.

    Raises:
      ValueError: `transport` is unknown, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.scale_by_adam_g(channel_axes=())
    >>> x, g = jnp.array([2.0, 0.0]), jnp.array([0.0, 0.1])
    >>> tx.update(g, tx.init(x), x)[0].round(3)  # as long as x
    Array([0., 2.], dtype=float32)
    """
    check_transport(transport)

    def init_fn(params):
        mu, nu = _zero_moments(params, channel_axes, mu_dtype)
        return ScaleByAdamGState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        params = need_params(params, "scale_by_adam_g")
        count = optax.safe_increment(state.count)

        def leaf(axes, g, mu, nu, x):
            wide_g, wide_mu, radius = widen(g), widen(mu), None
            if axes:
                x = widen(x)
                radius = norm(x, axes)
                radius = jnp.where(radius == 0, 1.0, radius)
                wide_g = radius * wide_g
                wide_mu = transport_momentum(x, wide_mu, axes, transport)
            step, wide_mu, nu = _adam_step(
                wide_g, wide_mu, nu, count, b1, b2, eps, axes, mean=False
            )
            step = step if radius is None else radius * step
            return step.astype(g.dtype), wide_mu.astype(mu.dtype), nu

        updates, mu, nu = map_leaves(leaf, channel_axes, updates, state.mu, state.nu, params=params)
        return updates, ScaleByAdamGState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_g(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
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

    so that the trajectory from x is the one from x/|x|. Classic leaves take Adam.

    Args:
      learning_rate: a number or a schedule; about the angle of a step in radians.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment.
      weight_decay: coupled L2 on the classic leaves: a number or a schedule, not negative. The
        spherical ones, whose radius is fixed, take none.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation. Nothing that changes the updates may follow it.

    Raises:
      ValueError: `update` is called without the parameters.
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
        optax.add_decayed_weights(weight_decay, mask=path_mask(channel_axes, invert=True)),
        scale_by_adam_g(b1, b2, eps, channel_axes=channel_axes, mu_dtype=mu_dtype),
        optax.scale_by_learning_rate(learning_rate),
        reproject_to_sphere(1.0, channel_axes=channel_axes),
    )


def _zero_moments(
    params: optax.Params, channel_axes: ChannelAxes, mu_dtype: DTypeLike | None
) -> tuple[optax.Updates, optax.Updates]:
    # nu comes from an array of the parameters so that it inherits their devices.
    nu = map_selected(
        lambda leaf: jnp.zeros_like(squared_norm(widen(leaf.value), leaf.axes)),
        channel_axes,
        params,
    )
    return optax.tree.zeros_like(params, dtype=mu_dtype), nu


def _adam_step(
    g: jax.Array,
    mu: jax.Array,
    nu: jax.Array,
    count: ArrayLike,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    axes: tuple[int, ...],
    *,
    mean: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One Adam step on widened arrays, in the order of Optax's operations: step, mu, nu.

    `mean=False` takes the sum of squares of a group for its second moment.
    """
    size = group_size(g.shape, axes) if mean else 1
    square = squared_norm(g, axes)
    if size > 1:
        square, eps = square / size, eps / math.sqrt(size)
    mu = _average(g, mu, b1)
    nu = _average(square, nu, b2)
    denominator = jnp.sqrt(_debias(nu, b2, count)) + jnp.asarray(eps, nu.dtype)
    # With eps = 0 and no gradient so far: no step.
    denominator = jnp.where(denominator == 0, jnp.inf, denominator)
    return _debias(mu, b1, count) / denominator, mu, nu


def _average(new: jax.Array, old: jax.Array, decay: ArrayLike) -> jax.Array:
    # 1 - decay is taken before any rounding to the arrays' dtype.
    return jnp.asarray(1 - decay, new.dtype) * new + jnp.asarray(decay, new.dtype) * old


def _debias(moment: jax.Array, decay: ArrayLike, count: ArrayLike) -> jax.Array:
    dtype = jnp.result_type(float)  # float64 where float64 arrays are possible
    correction = 1 - jnp.asarray(decay, dtype) ** jnp.asarray(count, dtype)
    return moment / correction.astype(moment.dtype)
