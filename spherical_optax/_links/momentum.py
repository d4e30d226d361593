"""SGD-MRT: momentum that follows the point over its sphere."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.geometry import (
    Transport,
    check_transport,
    transport_momentum,
    transport_numbers,
    transport_pairs,
)
from spherical_optax._ground.hyperparams import check_decays, check_dtype, check_shares
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes, select
from spherical_optax._ground.sums import inners, nonzero
from spherical_optax._links.ready import DecayMask, add_coupled_decay, scale_by_learning_rate


def trace_rt(
    decay: ArrayLike,
    *,
    dampening: ArrayLike = 0.0,
    channel_axes: ChannelAxes,
    transport: Transport = "rescale",
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """`optax.trace` whose buffer is rescaled and transported to each new point; see `sgd_mrt`.

    Place it where `optax.trace` would stand. What `scale_by_adam_srt` says of steps that are not
    collinear with the momentum, and of links that rescale the point, holds here as well.

    Args:
      decay: decay of the buffer, in [0, 1).
      dampening: share of each gradient that is left out, in [0, 1]; the first one's too.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      transport: "rescale" projects the buffer on the tangent space at x; "isometric" also keeps
        its length; "none" leaves it.
      accumulator_dtype: dtype of the stored buffer; by default that of the parameters.

    Returns:
      A gradient transformation whose state is an `optax.TraceState`.

    Raises:
      ValueError: `transport` is unknown, a number is out of range, or `update` is called without
        the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.trace_rt(0.5, channel_axes=())
    >>> x = jnp.array([2.0, 0.0])
    >>> _, state = tx.update(jnp.array([6.0, 4.0]), tx.init(x), x)
    >>> tx.update(jnp.zeros(2), state, x)[0]  # the radial part of the buffer is gone
    Array([0., 2.], dtype=float32)
    """
    check_transport(transport)
    check_decays(decay=decay)
    check_shares(dampening=dampening)
    check_dtype(accumulator_dtype=accumulator_dtype)

    def init_fn(params):
        select(params, channel_axes)  # raises if it does not fit
        return optax.TraceState(optax.tree.zeros_like(params, dtype=accumulator_dtype))

    def update_fn(updates, state, params=None):
        params = need_params(params, "trace_rt")

        def leaf(axes, g, trace, x):
            if axes and transport != "none":
                square, *products = inners(axes, (x, x), *transport_pairs(x, trace, transport))
                trace = transport_momentum(x, trace, transport_numbers(nonzero(square), products))
            trace = jnp.asarray(1 - dampening, g.dtype) * g + jnp.asarray(decay, g.dtype) * trace
            return trace, trace

        updates, trace = map_leaves(leaf, channel_axes, updates, state.trace, params=params)
        return updates, optax.TraceState(trace)

    return optax.GradientTransformation(init_fn, update_fn)


def sgd_mrt(
    learning_rate: optax.ScalarOrSchedule,
    momentum: ArrayLike = 0.9,
    *,
    dampening: ArrayLike = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: DecayMask = None,
    channel_axes: ChannelAxes,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """SGD-MRT: SGD whose momentum is rescaled and transported to each new point.

        g <- g + weight_decay x
        m <- momentum m + (1 - dampening) g
        y = x - learning_rate m
        m <- (<x, y> m - <m, y> x) / |y|²                       per group
        x <- y

    The fourth line is the projection of m on the tangent space at y, and is taken when the next
    update shows y (see `adam_srt`). Classic leaves take `optax.sgd`.

    Args:
      learning_rate: a number or a schedule.
      momentum: decay of the buffer, in [0, 1).
      dampening: share of each gradient that is left out, in [0, 1]; the first one's too.
      weight_decay: coupled L2: a number or a schedule, not negative.
      weight_decay_mask: the leaves that decay: a tree of booleans, or a prefix of one, or a
        callable from the parameters to one, such as `path_mask(axes, invert=True)` for the classic
        ones; by default all.
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      accumulator_dtype: dtype of the stored buffer; by default that of the parameters.

    Returns:
      A gradient transformation.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    Source: Roburin et al., *Spherical Perspective on Learning with Normalization Layers*
    (arXiv 2006.13382).

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.sgd_mrt(0.1, channel_axes=())
    >>> x = jnp.array([2.0, 0.0])
    >>> tx.update(jnp.array([0.0, 1.0]), tx.init(x), x)[0]
    Array([-0. , -0.1], dtype=float32)
    """
    check_decays(momentum=momentum)
    return optax.chain(
        add_coupled_decay(weight_decay, "sgd_mrt", mask=weight_decay_mask),
        trace_rt(
            momentum,
            dampening=dampening,
            channel_axes=channel_axes,
            accumulator_dtype=accumulator_dtype,
        ),
        scale_by_learning_rate(learning_rate),
    )
