"""Points and vectors on spheres, as plain functions on arrays.

Each group of an array x is a point on the sphere of radius |x| around 0; a vector at x has the
shape of x. Sums run in float32 at least; results have the dtype of the vector, or of the point,
that they move. A group of zeros has no direction, and a group of one element is a sign without
tangents: both are treated as flat space, so nothing here makes a NaN. A NaN or an infinity that
goes in comes out, in its group. Norms are squared on the way: in float32 they should lie between
1e-19 and 1e19, where results are exact to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from spherical_optax._ground.groups import Axes, in_view
from spherical_optax._ground.sums import (
    divide_or,
    inner,
    nonzero,
    norm,
    squared_norm,
    zero_where,
)

#: How a momentum follows the point; `scale_by_adam_srt` and `scale_by_adam_g` name the modes.
Transport = Literal["rescale", "isometric", "none"]


def tangent(x: jax.Array, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`v - (<v, x> / |x|²) x` on widened arrays; `v` itself without reduction axes."""
    if not axes:
        return v
    return v - radial_share(v, x, axes) * x


def radial_share(v: jax.Array, x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`<v, x> / |x|²` on widened arrays, 0 where x is zero."""
    return inner(v, x, axes) / nonzero(squared_norm(x, axes))


def check_transport(transport: str) -> None:
    """Raises `ValueError` for an unknown mode."""
    if transport not in get_args(Transport):
        modes = ", ".join(map(repr, get_args(Transport)))
        raise ValueError(f"transport={transport!r} is not one of {modes}")


def transport_pairs(
    x: jax.Array, momentum: jax.Array, transport: Transport
) -> list[tuple[jax.Array, jax.Array]]:
    """The pairs whose inner products `transport_numbers` takes."""
    pairs = [(momentum, x), (momentum, momentum)]
    return pairs[: {"none": 0, "rescale": 1, "isometric": 2}[transport]]


def transport_numbers(sq_norm: jax.Array, products: Sequence[jax.Array]) -> list[jax.Array]:
    """What `transport_momentum` needs of each group.

    For "none" nothing, for "rescale" the momentum's share along x, and for "isometric" the stretch
    too. `sq_norm` is |x|², infinite where x is zero; `products` are those of `transport_pairs`.
    """
    if not products:
        return []
    along, *before = products
    share = along / sq_norm
    return [share, *(isometric_stretch(square, square - share * along) for square in before)]


def transport_momentum(
    x: jax.Array, momentum: jax.Array, numbers: Sequence[jax.Array]
) -> jax.Array:
    """Brings a momentum that was built before the last step to the point `x` that it led to.

    The step was collinear with the momentum, so `P_x` is the published rescaling and transport
    ("rescale"), and `P_x` at unchanged length is the parallel transport of a tangent momentum
    ("isometric"); neither needs the previous point.
    """
    if not numbers:
        return momentum
    share, *stretch = numbers
    projected = momentum - share * x
    return projected * stretch[0] if stretch else projected


def isometric_stretch(before: jax.Array, after: jax.Array) -> jax.Array:
    """What gives a projected momentum its length again; `before` is |m|², `after` |P_x(m)|²."""
    # For a tangent momentum the stretch is 1/cos of the angle travelled. Above 2 it was radial
    # rather than tangent, and stretching would make steps of the rest, which is rounding. Below 2,
    # |P_x(m)|² by Pythagoras does not cancel, and saves a pass over the elements.
    squared = jax.lax.select(4 * after > before, before / nonzero(after), jnp.ones_like(before))
    return jnp.sqrt(squared)


def project_to_tangent(x: jax.Array, v: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Removes from `v` its radial part at `x`.

        P_x(v) = v - (<v, x> / |x|²) x

    Args:
      x: points.
      v: vectors of the same shape.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group.

    Returns:
      The tangent vectors, in the dtype of `v`.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x = jnp.array([[3.0, 1.0], [4.0, 0.0]])
    >>> v = so.project_to_tangent(x, jnp.ones((2, 2)), channel_axes=-1)
    >>> abs(so.group_inner(v, x, channel_axes=-1)).max() < 1e-6
    Array(True, dtype=bool)
    """
    return in_view(tangent, channel_axes, x, v).astype(v.dtype)


def retract(x: jax.Array, v: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Steps from `x` by `v` and returns to the sphere along the radius.

        R_x(v) = |x| (x + v) / |x + v|

    Args:
      x: points.
      v: vectors of the same shape, tangent or not.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group.

    Returns:
      Points of the same norms as `x`, in its dtype. Where x or x + v is zero, x + v.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> so.retract(jnp.array([3.0, 0.0]), jnp.array([0.0, 3.0]), channel_axes=()).round(4)
    Array([2.1213, 2.1213], dtype=float32)
    """

    def moved(x: jax.Array, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        return to_radius(x + v, norm(x, axes), axes)

    return in_view(moved, channel_axes, x, v).astype(x.dtype)


def to_radius(y: jax.Array, radius: jax.Array | float, axes: tuple[int, ...]) -> jax.Array:
    """`radius y / |y|` on widened arrays; `y` itself where it or its radius is zero."""
    if not axes:
        return y
    radius = jnp.asarray(radius, y.dtype)
    return y * jnp.where(radius == 0, 1.0, divide_or(radius, norm(y, axes), 1.0))


def exp_map(x: jax.Array, v: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Follows the great circle from `x` in the direction of `v` for the length `|v|`.

        t = |v| / |x|        exp_x(v) = cos(t) x + (sin(t) / t) v

    Args:
      x: points.
      v: tangent vectors at `x` (see `project_to_tangent`); the angle travelled is |v|/|x| radians.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group.

    Returns:
      Points of the same norms as `x`, in its dtype. Where x is zero, x + v.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, v = jnp.array([2.0, 0.0]), jnp.array([0.0, jnp.pi])  # a quarter of a turn
    >>> abs(so.exp_map(x, v, channel_axes=()) - jnp.array([0.0, 2.0])).max() < 1e-6
    Array(True, dtype=bool)
    """
    return in_view(great_circle, channel_axes, x, v).astype(x.dtype)


def great_circle(x: jax.Array, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`exp_map` on widened arrays."""
    if not axes:
        return x + v
    t = norm(v, axes) / nonzero(norm(x, axes))
    # Not jnp.sinc, which jax 0.12 cannot trace inside shard_map.
    sinc = jnp.where(t == 0, 1, jnp.sin(t) / jnp.where(t == 0, 1, t))
    return jnp.cos(t) * x + sinc * v


def parallel_transport(
    x: jax.Array, y: jax.Array, v: jax.Array, *, channel_axes: Axes
) -> jax.Array:
    """Carries the tangent vector `v` at `x` along the shortest great circle to the ray of `y`.

        u = x/|x|        w = y/|y|        v - (<v, w> / (1 + <u, w>)) (u + w)

    Lengths and angles between vectors stay as they are.

    Args:
      x: points where the vectors are.
      y: points of the same shape where they go; their norms don't matter.
      v: tangent vectors at `x`.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group.

    Returns:
      Tangent vectors at `y`, in the dtype of `v`. To the antipode -x, to which no shortest way
      leads, and from or to a zero group `v` itself.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x, y, v = jnp.array([1.0, 0, 0]), jnp.array([0, 1.0, 0]), jnp.array([0, 3.0, 4.0])
    >>> so.parallel_transport(x, y, v, channel_axes=())
    Array([-3.,  0.,  4.], dtype=float32)
    """

    def moved(x: jax.Array, y: jax.Array, v: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        if not axes:
            return v
        x_norm = norm(x, axes)
        u = x / nonzero(x_norm)
        w = y / nonzero(norm(y, axes))
        # 1 + <u, w> = |u + w|²/2, which does not cancel near the antipode.
        middle = u + w
        factor = 2 * inner(v, w, axes) / nonzero(squared_norm(middle, axes))
        return v - zero_where(x_norm == 0, factor) * middle

    return in_view(moved, channel_axes, x, y, v).astype(v.dtype)


def angle(x: jax.Array, y: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Angle between `x` and `y`, accurate for small ones too.

        u = x/|x|        w = y/|y|        2 atan2(|u - w|, |u + w|)

    An arccos of the cosine loses all digits below 3e-4 radians in float32.

    Args:
      x: points.
      y: points of the same shape.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group.

    Returns:
      Angles in radians, in [0, π], with the summed axes kept at size 1; 0 where x or y is zero.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> so.angle(jnp.array([1.0, 0.0]), jnp.array([5.0, 5e-3]), channel_axes=())
    Array([0.001], dtype=float32)
    """
    return in_view(angle_between, channel_axes, x, y)


def angle_between(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`angle` on widened arrays."""
    x_norm, y_norm = norm(x, axes), norm(y, axes)
    u, w = x / nonzero(x_norm), y / nonzero(y_norm)
    theta = 2 * jnp.arctan2(norm(u - w, axes), norm(u + w, axes))
    return zero_where((x_norm == 0) | (y_norm == 0), theta)
