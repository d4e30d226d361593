"""AdamSRT: AdamS whose moments follow the point over its sphere."""

from __future__ import annotations

import math

import jax
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
from spherical_optax._ground.groups import group_size
from spherical_optax._ground.hyperparams import check_weight_decay
from spherical_optax._ground.leaves import map_leaves, need_params
from spherical_optax._ground.selection import ChannelAxes
from spherical_optax._ground.sums import nonzero, once_per_group
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
      factor. With `reproject_to_sphere` use "isometric", which is then exact for gradients that
      are tangent: without coupled decay, of a loss that depends on directions only.

    Args:
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, divided by sqrt(d).
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.
      transport: "rescale" projects mu on the tangent space at x and divides the second moment by
        the growth of |x|²; "isometric" projects mu, keeps its length (after steps of up to 60
        degrees), and leaves the second moment; "none" is `scale_by_adam_s`.
      mu_dtype: dtype of the stored first moment; by default that of the parameters.

    Returns:
      A gradient transformation whose state is an `optax.ScaleByAdamState`. Its nu, in float32 at
      least, has one number per group, the second moment of the gradients times |x|² with "rescale".

    Raises:
      ValueError: `transport` is unknown, a number is out of range, or `update` is called without
        the parameters.
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
    return _scale_by_adam_srt(None, None, b1, b2, eps, channel_axes, transport, mu_dtype)


def _scale_by_adam_srt(
    weight_decay: optax.ScalarOrSchedule | None,
    mask: DecayMask,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    channel_axes: ChannelAxes,
    transport: Transport,
    mu_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    check_moments(b1, b2, eps, mu_dtype)
    check_weight_decay(0.0 if weight_decay is None else weight_decay)

    def init_fn(params):
        mu, nu = zero_moments(params, channel_axes, mu_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), mu, nu)

    def update_fn(updates, state, params=None):
        link = "scale_by_adam_srt" if weight_decay is None else "adam_srt"
        params = need_params(params, link)
        decay = decay_at(state.count, weight_decay)
        count = optax.safe_increment(state.count)

        correction1, correction2 = bias_correction(b1, count), bias_correction(b2, count)

        def leaf(axes, g, mu, nu, x, decays=True):
            follows = bool(axes) and transport != "none"
            pairs = [(x, x), *transport_pairs(x, mu, transport)] if follows else []
            g, nu, (square, *products) = decay_gradient(
                g, x, decay if decays else None, nu, axes, *pairs
            )
            size = group_size(g.shape, axes)
            square = square / size
            eps_d = eps / math.sqrt(size)
            if not follows:
                mu, nu = average(g, mu, b1), average(square, nu, b2)
                return adam_step(mu, nu, correction1, correction2, eps_d, axes), mu, nu
            sq_norm, *products = products
            divisor = nonzero(sq_norm)
            # In the kernel that makes nu, which reads the sums anyway.
            numbers = [once_per_group(n) for n in transport_numbers(divisor, products)]
            mu = average(g, transport_momentum(x, mu, numbers), b1)
            if transport == "rescale":
                # nu is of |x| g, which stays as it is from one radius to the next. A group of zeros
                # has none: its gradient counts for this step alone, as if all had been like it. So
                # does that of a group too small for |x|² |g|².
                nu = average(sq_norm * square, nu, b2)
                here = nu / divisor
                alone = correction2.astype(here.dtype) * square
                here = jax.lax.select(here == 0, alone, here)
            else:
                nu = here = average(square, nu, b2)
            return adam_step(mu, here, correction1, correction2, eps_d, axes), mu, nu

        flags = decay_flags(mask, params)
        updates, mu, nu = map_leaves(
            leaf, channel_axes, updates, state.mu, state.nu, params=params, flags=flags
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adam_srt(
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
    """AdamSRT: AdamS whose moments are rescaled and transported to each new point.

    A step of `adam_s` leads from x to y; the moments then become

        mu <- (<x, y> mu - <mu, y> x) / |y|²
        nu <- nu |x|²/|y|²

    As y = x - s mu with one number s per group, the first line is mu - (<mu, y>/|y|²) y, the
    projection of mu on the tangent space at y. It needs neither x nor s, and so it waits: mu is
    stored as it is and projected when the next update shows y. The second line leaves nu |x|² as it
    is, and that is what is stored, as a moving average of |x|² |g|²/d: of the gradients on the unit
    sphere. The state has mu, and one number per group: half of Adam's. Classic leaves have Adam's
    nu, in float32 at least, which for narrower parameters is more than Adam's.

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
      A gradient transformation.

    Raises:
      ValueError: a number is out of range, or `update` is called without the parameters.
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
        _scale_by_adam_srt(
            weight_decay, weight_decay_mask, b1, b2, eps, channel_axes, "rescale", mu_dtype
        ),
        scale_by_learning_rate(learning_rate),
    )
