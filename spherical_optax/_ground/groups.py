"""Groups: the weights that share one sphere, and how they lie in arrays.

`channel_axes` names the axes that *index* groups. This module alone turns it into a *layout*: a
view of the array, and the axes of the view that a sum over a group runs over (its *reduction
axes*). Everything else works on those. No reduction axes means that every element is alone: the
classic, element-wise optimizer.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from spherical_optax._ground.sums import inner, norm, squared_norm


@dataclass(frozen=True)  # and no tuple, which would be axes
class Blocks:
    """A value of `channel_axes`: blocks of one axis index groups; made by `blocks`."""

    axis: int
    count: int
    channel_axes: tuple[int, ...] = ()

    def __repr__(self) -> str:
        rest = f", channel_axes={self.channel_axes}" if self.channel_axes else ""
        return f"so.blocks({self.axis}, {self.count}{rest})"


Axes = int | Sequence[int] | Blocks | None


def blocks(axis: int, count: int, *, channel_axes: int | Sequence[int] = ()) -> Blocks:
    """Splits an axis into equal consecutive blocks, each of which is on a sphere of its own.

    A value of any `channel_axes`, for what is normalised by blocks of channels: a convolution
    before GroupNorm is `blocks(-1, num_groups)`, and the heads of a flat projection
    `(features, heads · head_dim)` with normalised queries and keys are `blocks(-1, heads)`.

    Args:
      axis: the axis to split, negative ones counted from the end.
      count: number of blocks, at least 1; it divides the axis.
      channel_axes: other axes that index groups, such as 0 for layers stacked by a scan.

    Returns:
      A hashable value. Each block, together with each index of `channel_axes`, is one group.

    Raises:
      TypeError: an argument is not an integer.
      ValueError: `count` is below 1. Where it is used: an axis is out of range or named twice, or
        `count` does not divide it.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> query = jnp.ones((9, 2 * 4))  # two heads of four
    >>> so.group_norm(query, channel_axes=so.blocks(-1, 2))
    Array([[6., 6.]], dtype=float32)
    """
    others = channel_axes if isinstance(channel_axes, Sequence) else (channel_axes,)
    what = f"so.blocks({axis!r}, {count!r})"
    axis, count, *rest = (_integer(value, what) for value in (axis, count, *others))
    if count < 1:
        raise ValueError(f"blocks: count={count} is below 1")
    return Blocks(axis, count, tuple(rest))


class Layout(NamedTuple):
    """How the groups of an array lie in it."""

    shape: tuple[int, ...]  # of the array
    counts: tuple[int, ...]  # of groups along each of its axes: 1 where a group spans the axis

    @property
    def axes(self) -> tuple[int, ...]:
        """Reduction axes of the view, in ascending order; `()` if a group is one element."""
        return tuple(axis for axis, (_, summed) in enumerate(self._view) if summed)

    @property
    def size(self) -> int:
        """Number of elements of a group, d."""
        return group_size([n for n, _ in self._view], self.axes)

    def view(self, x: jax.Array) -> jax.Array:
        """The array, or one with a number per group or for all, in the shape to compute in."""
        if x.ndim == 0:
            return x
        whole = x.shape == self.shape
        return x.reshape([n if whole or not summed else 1 for n, summed in self._view])

    def unview(self, x: jax.Array) -> jax.Array:
        """Undoes `view`."""
        return x.reshape(self.shape if x.size == math.prod(self.shape) else self.counts)

    @property
    def _view(self) -> list[tuple[int, bool]]:
        """Size of each axis of the view, and whether a group spans it; blocks split an axis."""
        axes = []
        for n, count in zip(self.shape, self.counts, strict=True):
            if 1 < count < n:
                axes += [(count, False), (n // count, True)]
            else:
                axes.append((n, count < n))
        return axes


def layout(shape: Sequence[int], channel_axes: Axes) -> Layout:
    """Resolves `channel_axes` for an array.

    Args:
      shape: shape of the array.
      channel_axes: axes that index groups, negative ones counted from the end; `blocks` of an axis;
        `()` makes the whole array one group; `None` makes every element its own group. A scalar has
        no axes to choose from and accepts any.

    Raises:
      TypeError: `channel_axes` is neither an integer, nor a sequence of integers, nor `blocks`, nor
        `None`.
      ValueError: an axis is out of range or named twice, or blocks do not divide their axis.
    """
    shape = tuple(shape)
    rank, classic = len(shape), Layout(shape, shape)
    if channel_axes is None:
        return classic
    if isinstance(channel_axes, Blocks):
        axes: Sequence[Any] = (channel_axes.axis, *channel_axes.channel_axes)
    else:
        axes = channel_axes if isinstance(channel_axes, Sequence) else (channel_axes,)
    named = [_integer(axis, f"channel_axes={channel_axes!r}") for axis in axes]
    if rank == 0:
        return classic
    for axis in named:
        if not -rank <= axis < rank:
            raise ValueError(
                f"channel_axes={channel_axes!r} is out of range for shape {shape}; use axes "
                f"in [{-rank}, {rank - 1}], or None for the classic treatment"
            )
    kept = {axis % rank for axis in named}
    if len(kept) != len(named):
        raise ValueError(f"channel_axes={channel_axes!r} names an axis of {shape} twice")
    counts = [n if axis in kept else 1 for axis, n in enumerate(shape)]
    if isinstance(channel_axes, Blocks):
        length = shape[channel_axes.axis]
        if length % channel_axes.count:
            raise ValueError(
                f"channel_axes={channel_axes!r}: {channel_axes.count} blocks do not divide axis "
                f"{channel_axes.axis} of shape {shape}, which has {length} elements"
            )
        counts[channel_axes.axis] = channel_axes.count
    return Layout(shape, tuple(counts)) if math.prod(shape) > 0 else classic


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or getattr(value, "dtype", None) == jnp.bool_:
        raise TypeError(
            f"{what}: {value!r} is no axis; for a condition write "
            "lambda path, leaf: -1 if condition else None"
        )
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{what} holds an array, and axes are known before tracing; with "
            "optax.inject_hyperparams pass static_args='channel_axes'"
        )
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{what} is not an int, a tuple of ints, so.blocks(axis, count), None, or a callable "
            "(path, leaf) -> one of these, such as so.by_path({'conv': -1})"
        ) from None


def group_size(shape: Sequence[int], axes: tuple[int, ...]) -> int:
    """Number of elements of one group, d; `axes` are reduction axes."""
    return math.prod(shape[axis] for axis in axes)


def wide_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype for arithmetic: float32, or the given one if that is wider."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    is_wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    return dtype if is_wide else jnp.dtype("float32")


def widen(x: ArrayLike) -> jax.Array:
    """Returns `x` in the dtype for arithmetic."""
    x = jnp.asarray(x)
    return x.astype(wide_dtype(x.dtype))


def zeros_per_group(x: Any, groups: Layout) -> jax.Array:
    """A zero for each group, in the real dtype for arithmetic, where `x` or its shape says."""
    dtype = jnp.finfo(wide_dtype(jnp.result_type(x))).dtype
    if isinstance(x, jax.core.Tracer):
        # The sum is never computed, but has the sharding, and the mesh axes to vary over.
        return groups.unview(
            jnp.zeros_like(squared_norm(groups.view(widen(x)), groups.axes), dtype)
        )
    device, sharding = None, getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding):
        unnamed = [None] * (len(groups.shape) - len(sharding.spec))
        axes = zip([*sharding.spec, *unnamed], groups.counts, strict=True)
        spec = (names if _divides(sharding, names, count) else None for names, count in axes)
        device = NamedSharding(sharding.mesh, PartitionSpec(*spec))
    return jnp.zeros_like(x, dtype, groups.counts, device=device)


def _divides(sharding: NamedSharding, names: Any, n: int) -> bool:
    """Whether the mesh axes of one entry of a `PartitionSpec` divide an axis of n > 1 groups."""
    if names is None or n == 1:
        return False
    names = (names,) if isinstance(names, str) else names
    return n % math.prod(sharding.mesh.shape[name] for name in names) == 0


def in_view(fn: Callable[..., jax.Array], channel_axes: Axes, *arrays: jax.Array) -> jax.Array:
    """Calls `fn(*arrays, axes)` on the widened views of arrays of one shape."""
    for array in arrays:
        if array is None or isinstance(array, str | Mapping):
            raise TypeError(
                f"{type(array).__name__} is no array; for trees there are so.radius and "
                "so.angle_per_step"
            )
    shapes = [jnp.shape(array) for array in arrays]
    if len(set(shapes)) > 1:
        raise ValueError(f"the arrays have the shapes {', '.join(map(str, shapes))} and not one")
    groups = layout(shapes[0], channel_axes)
    if groups.axes and any(map(jnp.iscomplexobj, arrays)):
        raise TypeError("complex arrays have no spheres here; pass channel_axes=None")
    return groups.unview(fn(*(groups.view(widen(array)) for array in arrays), groups.axes))


def group_inner(x: jax.Array, y: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Inner product `<x, y>` of each group.

    Args:
      x: array of any shape.
      y: array of the same shape.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group, `None` for one
        group per element.

    Returns:
      The inner products, summed in float32 at least. The summed axes stay with size 1, and an axis
      of blocks with their number.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> x = jnp.ones((3, 3, 16, 32))
    >>> products = so.group_inner(x, 2 * x, channel_axes=-1)
    >>> products.shape, float(products[0, 0, 0, 5])
    ((1, 1, 1, 32), 288.0)
    """
    return in_view(inner, channel_axes, x, y)


def group_norm(x: jax.Array, *, channel_axes: Axes) -> jax.Array:
    """Euclidean norm `|x|` of each group.

    Args:
      x: array of any shape.
      channel_axes: axes that index groups, or `blocks` of one; `()` for one group, `None` for one
        group per element.

    Returns:
      The norms, summed in float32 at least. The summed axes stay with size 1, and an axis of blocks
      with their number. The gradient at a group of zeros is zero. Squares have the range of the
      sum's dtype: in float32, norms from 1e-19 to 1e19 are exact to rounding.

    Raises:
      ValueError: an axis is out of range or named twice, or blocks do not divide theirs.

    >>> import jax.numpy as jnp, spherical_optax as so
    >>> so.group_norm(jnp.array([[3.0, 0.0], [4.0, 0.0]]), channel_axes=-1)
    Array([[5., 0.]], dtype=float32)
    """
    return in_view(norm, channel_axes, x)
