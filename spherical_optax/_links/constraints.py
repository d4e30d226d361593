"""Links that turn updates into what belongs at a point of a sphere.

They concern spherical leaves only: updates of classic leaves, groups of one element included, and
of groups of zeros pass unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from spherical_optax._ground.geometry import great_circle, tangent
from spherical_optax._ground.selection import ChannelAxes
from spherical_optax._ground.sums import nonzero, norm
from spherical_optax._links.ready import stateless_link


def project_to_tangent_space(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Removes from each group of the updates its radial part at the parameters.

        u <- u - (<u, x>/|x|²) x

    Place it behind a preconditioner whose radial part changes the radius but not the loss, or
    first in a chain to project the gradients. The step still leaves the sphere at second order:
    `reproject_to_sphere` removes that.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.project_to_tangent_space(channel_axes=())
    >>> x = jnp.array([2.0, 0.0])
    >>> tx.update(jnp.array([5.0, 1.0]), tx.init(x), x)[0]
    Array([0., 1.], dtype=float32)
    """

    def leaf(axes: tuple[int, ...], u: jax.Array, x: jax.Array) -> jax.Array:
        return tangent(x, u, axes)

    return stateless_link(leaf, channel_axes, needs_params="project_to_tangent_space")


def follow_great_circle(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Steps along the sphere: each group travels the angle |P_x(u)|/|x| on its great circle.

        u <- exp_x(P_x(u)) - x

    Place it last in a chain, after the learning rate, where `reproject_to_sphere` would stand: that
    one steps off the sphere and back, to the same point up to third order. Rounding makes the
    radius drift, as the one that each step starts from is kept.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state.

    Raises:
      ValueError: `update` is called without the parameters.
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.follow_great_circle(channel_axes=())
    >>> x, u = jnp.array([2.0, 0.0]), jnp.array([7.0, jnp.pi])  # a quarter of a turn
    >>> updates, _ = tx.update(u, tx.init(x), x)
    >>> (x + updates).round(5)
    Array([0., 2.], dtype=float32)
    """

    def leaf(axes: tuple[int, ...], u: jax.Array, x: jax.Array) -> jax.Array:
        return great_circle(x, tangent(x, u, axes), axes) - x if axes else u

    return stateless_link(leaf, channel_axes, needs_params="follow_great_circle")


def centralize_per_group(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Takes its mean from each group of the updates.

        u <- u - mean(u)

    For spheres of weights whose sum stays zero, if it is at the start. `optax.centralize` is this
    with the first axis as the one that indexes groups.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state, which does not need the parameters.

    Raises:
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.centralize_per_group(channel_axes=-1)
    >>> grads = jnp.array([[3.0, 0.0], [4.0, 1.0]])
    >>> tx.update(grads, tx.init(grads))[0]
    Array([[-0.5, -0.5],
           [ 0.5,  0.5]], dtype=float32)
    """

    def leaf(axes: tuple[int, ...], u: jax.Array) -> jax.Array:
        return u - jnp.mean(u, axes, keepdims=True) if axes else u

    return stateless_link(leaf, channel_axes)


def normalize_per_group(*, channel_axes: ChannelAxes) -> optax.GradientTransformation:
    """Gives each group of the updates norm 1.

        u <- u/|u|

    A group of zeros stays zero, and so does one whose norm is below 1e-19, where float32 has no
    square. Noise gets norm 1 like everything else: coupled weight decay before a projection leaves
    rounding errors of a group without gradient, which this link would turn into steps.

    Args:
      channel_axes: the selection: axes that index groups, or a callable such as `by_path`'s.

    Returns:
      A gradient transformation without state, which does not need the parameters.

    Raises:
      ValueError, TypeError: at init, when the selection does not fit the parameters.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> tx = so.normalize_per_group(channel_axes=-1)
    >>> grads = jnp.array([[3.0, 0.0], [4.0, 0.0]])
    >>> tx.update(grads, tx.init(grads))[0]
    Array([[0.6, 0. ],
           [0.8, 0. ]], dtype=float32)
    """

    def leaf(axes: tuple[int, ...], u: jax.Array) -> jax.Array:
        return u / nonzero(norm(u, axes)) if axes else u

    return stateless_link(leaf, channel_axes)
