"""Groups: the weights that share one sphere, and sums over them.

`channel_axes` names the axes that *index* groups. This module alone turns it into the axes that a
sum runs over (its *reduction axes*); everything below works on those. An empty tuple of reduction
axes means that every element is alone: the classic, element-wise optimizer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Axes = int | Sequence[int] | None


def reduction_axes(shape: Sequence[int], channel_axes: Axes) -> tuple[int, ...]:
    """Returns the axes that a group spans, in ascending order; `()` if it is one element.

    Args:
      shape: shape of the array.
      channel_axes: axes that index groups, negative ones counted from the end; `()` makes the
        whole array one group; `None` makes every element its own group. A scalar has no axes to
        choose from and accepts any.

    Raises:
      TypeError: `channel_axes` is neither an integer, nor a sequence of integers, nor `None`.
      ValueError: an axis is out of range or named twice.
    """
    rank = len(shape)
    if channel_axes is None:
        return ()
    named = channel_axes if isinstance(channel_axes, Sequence) else (channel_axes,)
    try:
        named = tuple(operator.index(axis) for axis in named)
    except TypeError:
        raise TypeError(
            f"channel_axes={channel_axes!r} is not an int, a tuple of ints, None, or a callable "
            "(path, leaf) -> one of these, such as so.by_path({'conv': -1})"
        ) from None
    if rank == 0:
        return ()
    for axis in named:
        if not -rank <= axis < rank:
            raise ValueError(
                f"channel_axes={channel_axes!r} is out of range for shape {tuple(shape)}; use axes "
                f"in [{-rank}, {rank - 1}], or None for the classic treatment"
            )
    kept = {axis % rank for axis in named}
    if len(kept) != len(named):
        raise ValueError(f"channel_axes={channel_axes!r} names an axis of {tuple(shape)} twice")
    axes = tuple(axis for axis in range(rank) if axis not in kept)
    return axes if math.prod(shape) > 0 and group_size(shape, axes) > 1 else ()


def group_size(shape: Sequence[int], axes: tuple[int, ...]) -> int:
    """Number of elements of one group, d; `axes` are reduction axes."""
    return math.prod(shape[axis] for axis in axes)


def widen(x: ArrayLike) -> jax.Array:
    """Returns `x` in the dtype for arithmetic: float32, or its own dtype if that is wider."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits >= 32:
        return x
    return x if jnp.issubdtype(x.dtype, jnp.complexfloating) else x.astype(jnp.float32)


def inner(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Inner product over reduction axes, which stay with size 1; `x` and `y` are widened."""
    product = x * y
    if not axes:
        return product
    total = jnp.sum(product, axis=axes, keepdims=True)
    # Changes nothing. But XLA on a CPU draws into a sum's kernel what follows it, broadcasts to all
    # elements too, and then takes up to seven times as long; not so across a select.
    return jnp.where(jnp.isnan(total), jnp.nan, total)


def squared_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Real `inner(x, x)`, also of complex arrays (which only the classic treatment meets)."""
    if jnp.iscomplexobj(x):
        return inner(x.real, x.real, axes) + inner(x.imag, x.imag, axes)
    return inner(x, x, axes)


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Norm over reduction axes; its derivative at 0 is 0 and not NaN."""
    square = squared_norm(x, axes)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def divide_or(numerator: jax.Array, denominator: jax.Array, otherwise: ArrayLike) -> jax.Array:
    """Returns `numerator / denominator`, and `otherwise` where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, otherwise, numerator / jnp.where(zero, 1, denominator))


def group_inner(x: jax.Array, y: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Inner product `<x, y>` of each group.

    Args:
      x: array of any shape.
      y: array of the same shape.
      channel_axes: axes that index groups; `()` for one group, `None` for one group per element.

    Returns:
      The inner products, summed in float32 at least, with the summed axes kept at size 1.

    Raises:
      ValueError: an axis is out of range or named twice.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x = jnp.ones((3, 3, 16, 32))
    >>> products = so.group_inner(x, 2 * x, channel_axes=-1)
    >>> products.shape, float(products[0, 0, 0, 5])
    ((1, 1, 1, 32), 288.0)
    """
    return inner(widen(x), widen(y), reduction_axes(x.shape, channel_axes))


def group_norm(x: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Euclidean norm `|x|` of each group.

    Args:
      x: array of any shape.
      channel_axes: axes that index groups; `()` for one group, `None` for one group per element.

    Returns:
      The norms, summed in float32 at least, with the summed axes kept at size 1. The gradient at a
      group of zeros is zero.

    Raises:
      ValueError: an axis is out of range or named twice.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> so.group_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]), channel_axes=-1)
    Array([[5., 0.]], dtype=float32)
    """
    return norm(widen(x), reduction_axes(x.shape, channel_axes))
