"""AdamS: Adam with one second moment per group."""

from __future__ import annotations

import math

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.groups import group_size
from spherical_optax._ground.hyperparams import check_weight_decay
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes
from spherical_optax._links.moments import (
    adam_step,
    average,
    bias_correction,
    check_moments,
    decay_at,
    decay_gradient,
    zero_moments,
)
from spherical_optax._links.ready import DecayMask, decay_flags, scale_by_learning_rate


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
      A gradient transformation whose state is an `optax.ScaleByAdamState`. Its nu, in float32 at
      least, has one number per group.

    Raises:
      ValueError: a number is out of range.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.scale_by_adam_s(channel_axes=())
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(grads, tx.init(grads))
    >>> so.group_inner(updates, updates, channel_axes=()).round(3)  # d, the first time
    Array([2.], dtype=float32)
    """
    return _scale_by_adam_s(None, None, b1, b2, eps, channel_axes, mu_dtype)


def _scale_by_adam_s(
    weight_decay: optax.ScalarOrSchedule | None,
    mask: DecayMask,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    channel_axes: ChannelAxes,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    check_moments(b1, b2, eps, mu_dtype)
    check_weight_decay(0.0 if weight_decay is None else weight_decay)

    def init_fn(params):
        mu, nu = zero_moments(params, channel_axes, mu_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        params = None if weight_decay is None else need_params(params, "adam_s")
        decay = decay_at(state.count, weight_decay)
        count = optax.safe_increment(state.count)
        corrections = bias_correction(b1, count), bias_correction(b2, count)

        def leaf(axes, g, mu, nu, x=None, decays=True):
            g, nu, (square,) = decay_gradient(g, x, decay if decays else None, nu, axes)
            size = group_size(g.shape, axes)
            mu = average(g, mu, b1)
            nu = average(square / size, nu, b2)
            return adam_step(mu, nu, *corrections, eps / math.sqrt(size), axes), mu, nu

        flags = decay_flags(mask, params)
        updates, mu, nu = map_leaves(
            leaf, channel_axes, updates, state.mu, state.nu, params=params, flags=flags
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_s(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: DecayMask = None,
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
      weight_decay: coupled L2: a number or a schedule, not negative.
      weight_decay_mask: the leaves that decay: a tree of booleans, or a prefix of one, or a
        callable from the parameters to one, such as `path_mask(axes, invert=True)` for the classic
        ones; by default all.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation; its state has one first moment per element and one second moment
      per group.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Roburin et al., *Spherical Perspective on Learning with Normalization Layers*
    (arXiv 2006.13382).

    >>> import jax.numpy as jnp, optax, spherical_optax as so
    >>> tx = so.adam_s(0.1, channel_axes=())
    >>> grads = jnp.array([3.0, 4.0])
    >>> updates, _ = tx.update(grads, tx.init(grads), jnp.array([1.0, 0.0]))
    >>> so.angle(updates, -grads, channel_axes=()) < 1e-6  # the division turns nothing
    Array([ True], dtype=bool)
    """
    return optax.chain(
        _scale_by_adam_s(weight_decay, weight_decay_mask, b1, b2, eps, channel_axes, mu_dtype),
        scale_by_learning_rate(learning_rate),
    )
