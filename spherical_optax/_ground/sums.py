"""Sums over groups, and what is made of them, zero-safe.

`axes` are the reduction axes of a view (see `groups`); without any, each element is alone. Arrays
are widened before. What XLA makes of the sums is different on a CPU and for CUDA, and so are they.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def inner(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Inner product over reduction axes, which stay with size 1; `x` and `y` are widened."""
    if not axes:
        return x * y
    total = jnp.sum(x * y, axis=axes, keepdims=True)
    # Changes nothing. But XLA on a CPU draws into a sum's kernel what follows it, broadcasts to all
    # elements too, and then takes up to seven times as long; not so across a select.
    return jax.lax.select(jnp.isnan(total), jnp.full_like(total, jnp.nan), total)


def inners(axes: tuple[int, ...], *pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    """`inner` of several pairs of arrays of one shape; for CUDA all at once.

    There must be reduction axes.
    """
    in_turn = partial(_inners_in_turn, axes)
    if not alike([array for pair in pairs for array in pair]):
        return in_turn(*pairs)
    at_once = partial(_inners_at_once, axes)
    return jax.lax.platform_dependent(*pairs, cuda=at_once, default=in_turn)


def alike(arrays: Sequence[jax.Array]) -> bool:
    """Whether arrays may be stacked: of one shape, dtype and, where types tell it, sharding."""
    return len({jax.typeof(array) for array in arrays}) == 1


def _inners_in_turn(axes: tuple[int, ...], *pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    return [inner(x, y, axes) for x, y in pairs]


def _inners_at_once(axes: tuple[int, ...], *pairs: tuple[jax.Array, jax.Array]) -> list[jax.Array]:
    # XLA for CUDA takes several sums in several kernels, each of which reads its arrays anew. One
    # sum of stacked products it takes in one, which reads them once, if its results are many enough
    # to occupy the device: so sums of columns go over one axis first. On a CPU it would write the
    # stack to memory.
    products = jnp.stack([x * y for x, y in pairs])
    axes = tuple(axis + 1 for axis in axes)
    if axes[-1] < products.ndim - 1:
        products = jnp.sum(products, axis=axes[-1], keepdims=True)
        products = jax.lax.optimization_barrier(products)
        axes = axes[:-1]
    return list(jnp.sum(products, axis=axes, keepdims=True))


def sums(axes: tuple[int, ...], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Sums of several arrays of one shape, with the summed axes kept; for CUDA all at once."""

    def in_turn(*arrays: jax.Array) -> list[jax.Array]:
        return [jnp.sum(array, axes, keepdims=True) for array in arrays]

    def at_once(*arrays: jax.Array) -> list[jax.Array]:
        of_stack = tuple(axis + 1 for axis in axes)
        return list(jnp.sum(jnp.stack(arrays), of_stack, keepdims=True))

    if not alike(arrays):
        return in_turn(*arrays)
    return jax.lax.platform_dependent(*arrays, cuda=at_once, default=in_turn)


def once_per_group(numbers: jax.Array) -> jax.Array:
    """The same numbers; kernels of CUDA read them, and do not make them anew for each element."""
    return jax.lax.platform_dependent(
        numbers, cuda=jax.lax.optimization_barrier, default=lambda numbers: numbers
    )


def squared_norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Real `inner(x, x)`, also of complex arrays (which only the classic treatment meets)."""
    if jnp.iscomplexobj(x):
        return inner(x.real, x.real, axes) + inner(x.imag, x.imag, axes)
    return inner(x, x, axes)


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Norm over reduction axes; its derivative at 0 is 0 and not NaN."""
    square = squared_norm(x, axes)
    zero = square == 0  # and not `square > 0`, which would take a NaN for zero
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


def divide_or(numerator: jax.Array, denominator: jax.Array, otherwise: ArrayLike) -> jax.Array:
    """Returns `numerator / denominator`, and `otherwise` where the denominator is 0."""
    zero = denominator == 0
    return jnp.where(zero, otherwise, numerator / jnp.where(zero, 1, denominator))


def nonzero(denominator: jax.Array) -> jax.Array:
    """Infinity in place of 0: what is divided by it is 0 then."""
    # Not `divide_or`, whose last choice XLA would make anew for each element.
    return jax.lax.select(denominator == 0, jnp.full_like(denominator, jnp.inf), denominator)


def zero_where(condition: jax.Array, x: jax.Array) -> jax.Array:
    """Zero in place of a finite x; what is not finite stays a NaN."""
    return jnp.where(condition, 0 * x, x)
