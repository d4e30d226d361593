"""What a step does on the sphere: plain functions of parameters, gradients and steps.

Each takes trees (an array is a tree too), and gives a tree with one number per group, the summed
axes kept at size 1, and `None` where a leaf is not spherical. `updates` are what an optimizer
returns, to be added to the parameters.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.geometry import angle_between, radial_share, tangent
from spherical_optax._ground.leaves import map_groups
from spherical_optax._ground.selection import ChannelAxes
from spherical_optax._ground.sums import inner, nonzero, norm, squared_norm, zero_where


def radius(params: optax.Params, *, channel_axes: ChannelAxes) -> Any:
    """Radius of the sphere that each group is on, `r = |x|`.

    Args:
      params: parameters.
      channel_axes: the selection, as everywhere.

    Returns:
      A tree of radii, `None` where a leaf is not spherical.

    Raises:
      ValueError: as for any selection.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> so.radius({"conv": 2 * jnp.ones((9, 2)), "bias": jnp.ones(2)}, channel_axes=-1)
    {'bias': None, 'conv': Array([[6., 6.]], dtype=float32)}
    """
    return map_groups(lambda axes, x: norm(x, axes), channel_axes, params)


def angle_per_step(
    params: optax.Params, updates: optax.Updates, *, channel_axes: ChannelAxes
) -> Any:
    """Angle that a step travels on the sphere, from x to x + s.

        s_r = <s, x>/|x|        s_t = P_x(s)        θ = atan2(|s_t|, |x| + s_r)

    Args:
      params: parameters before the step.
      updates: the step.
      channel_axes: the selection.

    Returns:
      A tree of angles in radians, in [0, π]; 0 where x is zero. `None` where a leaf is not
      spherical.

    Raises:
      ValueError: the trees differ.

    Source: Roburin et al., Neurocomputing 2022 (arXiv 2006.13382), the step's image on the sphere.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, s = jnp.array([2.0, 0.0]), jnp.array([0.0, 2.0])
    >>> so.angle_per_step(x, s, channel_axes=()) - jnp.pi / 4
    Array([0.], dtype=float32)
    """
    return map_groups(turned, channel_axes, params, updates=updates)


def radial_fraction(
    params: optax.Params, vectors: optax.Params, *, channel_axes: ChannelAxes
) -> Any:
    """Share of a vector that points along the radius, and does not turn x.

        |<v, x>| / (|v| |x|)

    Gradients of radially invariant weights have 0; a decayed step, and a momentum that is not
    transported, have more.

    Args:
      params: parameters.
      vectors: updates, momenta or gradients at `params`.
      channel_axes: the selection.

    Returns:
      A tree of shares in [0, 1], 0 where x or v is zero. `None` where a leaf is not spherical.

    Raises:
      ValueError: the trees differ.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, v = jnp.array([2.0, 0.0]), jnp.array([-3.0, 4.0])
    >>> so.radial_fraction(x, v, channel_axes=()).round(6)
    Array([0.6], dtype=float32)
    """
    return map_groups(radial_part, channel_axes, params, vectors=vectors)


def deformation(
    params: optax.Params,
    updates: optax.Updates,
    grads: optax.Updates,
    *,
    channel_axes: ChannelAxes,
) -> Any:
    """Angle on the sphere between a step and the steepest descent.

        ∠( P_x(s), -P_x(g) )

    Of a preconditioned gradient, `s = -g ⊘ sqrt(v)`, it is how far the division turns it; a
    division by one number per group leaves 0. Of an optimizer's whole step it has the momentum's
    part too.

    Args:
      params: parameters before the step.
      updates: the step s.
      grads: gradients g of the loss at `params`.
      channel_axes: the selection.

    Returns:
      A tree of angles in radians, in [0, π], 0 where one of the two is zero. `None` where a leaf is
      not spherical.

    Raises:
      ValueError: the trees differ.

    Source: Roburin et al., Neurocomputing 2022 (arXiv 2006.13382), the deformation of Adam's
    gradients.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, g = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 3.0, 4.0])
    >>> so.deformation(x, -0.1 * g, g, channel_axes=())
    Array([0.], dtype=float32)
    >>> so.deformation(x, -0.1 * jnp.sign(g), g, channel_axes=()).round(4)
    Array([0.1419], dtype=float32)
    """
    return map_groups(deformed, channel_axes, params, updates=updates, grads=grads)


def effective_learning_rate(
    learning_rate: ArrayLike,
    params: optax.Params,
    momentum: optax.Params,
    division: optax.Params,
    *,
    channel_axes: ChannelAxes,
) -> Any:
    """Learning rate of the gradient descent on the unit sphere that a step is.

    For a step x - η a ⊘ b of a group of d elements, with u = x/r:

        ν = r |b| / sqrt(d)
        c = r a ⊘ (b / (|b| / sqrt(d)))
        η_e = η / (r ν) / (1 - η <c, u> / (r ν))

    The step turns x by θ with tan θ = η_e |P_x(c)|, and for SGD without momentum P_x(c) is the
    gradient at u. So SGD has η/r², and with L2 η/(r²(1 - ηλ)).

    Args:
      learning_rate: η.
      params: x, before the step.
      momentum: a, of which the step is made: the gradient, decayed as the optimizer decays it, or
        a momentum, with its bias correction if there is one.
      division: b, what the optimizer divides by: 1 for SGD, sqrt(v) + eps for Adam, or one number
        per group. It broadcasts; a number stands for all leaves.
      channel_axes: the selection.

    Returns:
      A tree of rates, `None` where a leaf is not spherical. Infinite where the step goes just as
      far back as the sphere's centre, negative beyond; 0 where x or b is zero.

    Raises:
      ValueError: the trees differ.

    Source: Roburin et al., Neurocomputing 2022 (arXiv 2006.13382), the table of effective learning
    rates and directions.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, g = jnp.array([2.0, 0.0]), jnp.array([0.0, 3.0])
    >>> rate = so.effective_learning_rate(0.1, x, g, 1.0, channel_axes=())
    >>> rate, jnp.tan(so.angle_per_step(x, -0.1 * g, channel_axes=())) / (2 * 3)
    (Array([0.025], dtype=float32), Array([0.025], dtype=float32))
    """

    def rate(axes: tuple[int, ...], x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        eta = jnp.asarray(learning_rate, x.dtype)
        square = squared_norm(x, axes)
        root_mean_square = jnp.sqrt(jnp.mean(b * b, axis=axes, keepdims=True))
        share = inner(a / nonzero(b), x, axes) / nonzero(square)
        infinite = 0 * (share + root_mean_square)  # a NaN if one is infinite, else nothing
        return eta / nonzero(square * root_mean_square) / (1 - eta * share) + infinite

    if jax.tree_util.all_leaves([division]) and not getattr(division, "shape", ()):
        division = jax.tree.map(lambda _: division, params)
    return map_groups(
        rate, channel_axes, params, broadcast="division", momentum=momentum, division=division
    )


# The same on the widened arrays of one leaf: x, the point; s, the step; g, the gradient.


def turned(axes: tuple[int, ...], x: jax.Array, s: jax.Array) -> jax.Array:
    """Angle between x and x + s."""
    ahead = norm(x, axes) * (1 + radial_share(s, x, axes))
    theta = jnp.arctan2(norm(tangent(x, s, axes), axes), ahead)
    return zero_where(norm(x, axes) == 0, theta)


def radial_part(axes: tuple[int, ...], x: jax.Array, v: jax.Array) -> jax.Array:
    """`|<v, x>| / (|v| |x|)`."""
    share = abs(inner(v, x, axes)) / nonzero(norm(v, axes) * norm(x, axes))
    return jnp.minimum(share, 1.0)  # rounding may exceed it


def deformed(axes: tuple[int, ...], x: jax.Array, s: jax.Array, g: jax.Array) -> jax.Array:
    """Angle between the tangent parts of s and -g."""
    return angle_between(tangent(x, s, axes), -tangent(x, g, axes), axes)
