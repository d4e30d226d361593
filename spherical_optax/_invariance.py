"""Which weights of a model are radially invariant: measured, not guessed from their names."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._geometry import to_radius
from spherical_optax._groups import Axes, Blocks, Layout, inner, layout, nonzero, norm, widen
from spherical_optax._selection import (
    ChannelAxes,
    is_hole,
    named_leaves,
    refuse_schedule_call,
    select,
)

LossFn = Callable[[Any, Any], ArrayLike]
Named = int | tuple[int, ...] | Blocks  # channel_axes of a spherical leaf
# Per output channel, per input channel, per layer of a stack, per layer and channel, whole tensor.
_CANDIDATES = (-1, -2, 0, (0, -1), ())
_COPIES = 3


class Evidence(NamedTuple):
    """What was measured of one leaf, for its invariant groups or else its best candidate."""

    path: str
    axes: Named | None  # channel_axes of the invariant groups; None: there are none
    verdict: Literal["invariant", "not invariant", "undecided", "no candidate"]
    radial: float | None = None  # largest radial derivative of a group, at most 1
    rescaling: float | None = None  # R/D; None where the radial derivative decides

    def __str__(self) -> str:
        figures = {"radial": self.radial, "rescaling": self.rescaling}
        shown = [f"{name} {x:.0e}" for name, x in figures.items() if x is not None]
        return f"{self.verdict} ({', '.join(shown)})" if shown else self.verdict


class InvariantGroups(NamedTuple):
    """A selection by measurement; made by `find_invariant_groups`."""

    leaves: tuple[Evidence, ...]

    def __call__(self, path: str, leaf: Any = ...) -> Named | None:
        """The `channel_axes` of a leaf."""
        refuse_schedule_call(leaf)
        return self._of(path).axes

    def evidence(self, path: str) -> str:
        """The verdict on a leaf with its figures, for `describe`."""
        return str(self._of(path))

    def _of(self, path: str) -> Evidence:
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise ValueError(
            f"{path}: not measured; call find_invariant_groups with the parameters of the optimizer"
        )


def find_invariant_groups(
    loss_fn: LossFn,
    params: optax.Params,
    *batches: Any,
    candidates: Sequence[int | Sequence[int]] | None = None,
    tolerance: float = 1e-2,
) -> InvariantGroups:
    """Finds the weights whose length does not change the loss: f(a x) = f(x) for a > 0 per group.

    Of each leaf's candidates, the finest groups x such that, with gradients g,

        |<g, x>| <= tolerance |g| |x|        in each group
        R = max |f(a x) - f(x)|              a = 1/2 or 2, drawn for each group, and vice versa
        D = max |f(y) - f(x)|                y in random directions, |y| = |x| in each group
        R <= tolerance D

    over all batches and three random perturbations of the parameters. The first line costs one
    gradient for all leaves, but a large group hardly has a radial part anyway; R and D cost three
    values of the loss for each leaf that passes it. Perturbed, because at its start a network may
    hide what it depends on: BatchNorm's scale looks invariant while its bias is zero, and a last
    layer of zeros hides all layers before it. A leaf whose R and D are below the loss's rounding is
    undecided: such is a bias before BatchNorm, on which nothing depends.

    In ResNets and a VGG16, R/D is below 1e-3, for BatchNorm's eps, or above 0.1. Activations in
    bfloat16 round too much to tell: measure such a model in float32. In a whole tensor, one channel
    of many that is not normalised may be too little to be seen.

    Args:
      loss_fn: `(params, batch) -> loss`, a floating-point scalar, traced by `jax.jit`, with
        normalisation layers in training mode and a fixed key for what is random. In NNX, let it
        call `nnx.merge(graphdef, params, stats, copy=True)`.
      params: parameters. Leaves of real floating dtypes are measured, others left alone.
      *batches: at least one; 8 images are enough.
      candidates: `channel_axes` to try on each leaf that they fit; by default `-1`, `-2`, `0`,
        `(0, -1)` and `()`.
      tolerance: what counts as zero, in (0, 1).

    Returns:
      A hashable callable `(path, leaf) -> axes` for any `channel_axes` argument. `describe` shows
      its verdicts with the largest |<g, x>| / (|g| |x|) as "radial" and R/D as "rescaling".

    Raises:
      ValueError: no batch, a loss that is not a scalar or not finite, a gradient that is not
        finite, a candidate that fits no leaf, a tolerance out of range.
      TypeError: a candidate is neither an integer nor a sequence of integers.

    >>> import jax, jax.numpy as jnp, spherical_optax as so
    >>> def loss(params, x):  # each output channel is normalised over the batch
    ...     y = x @ params["kernel"]
    ...     y = (y - y.mean(0)) / y.std(0)
    ...     return jnp.mean((jnp.tanh(y) @ params["head"] - 1) ** 2)
    >>> kernel, head, x = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(3))
    >>> axes = so.find_invariant_groups(loss, {"kernel": kernel, "head": head}, x)
    >>> axes("kernel", kernel), axes("head", head)
    (-1, None)
    """
    tried = _CANDIDATES if candidates is None else _check_candidates(candidates, params)
    return _measure(loss_fn, params, batches, lambda path, leaf: tried, tolerance)


def check_selection(
    loss_fn: LossFn,
    params: optax.Params,
    *batches: Any,
    channel_axes: ChannelAxes,
    tolerance: float = 1e-2,
) -> InvariantGroups:
    """Warns of each spherical leaf of a selection whose length does change the loss.

    Measures as `find_invariant_groups` does, with the selection's groups as the only candidates.

    Args:
      loss_fn: `(params, batch) -> loss`, see `find_invariant_groups`.
      params: parameters.
      *batches: at least one.
      channel_axes: the selection.
      tolerance: what counts as zero, in (0, 1).

    Returns:
      What was measured; as a selection, the part of `channel_axes` that was found invariant.

    Raises:
      ValueError, TypeError: the selection does not fit the parameters, or as in
        `find_invariant_groups`.

    >>> import jax, jax.numpy as jnp, spherical_optax as so
    >>> def loss(params, x):
    ...     y = x @ params["kernel"]
    ...     return jnp.mean(jnp.tanh(y / jnp.linalg.norm(y)))
    >>> kernel, x = (jax.random.normal(jax.random.key(i), (8, 8)) for i in range(2))
    >>> print(so.check_selection(loss, {"kernel": kernel}, x, channel_axes=()).leaves[0].verdict)
    invariant
    """
    select(params, channel_axes)

    def tried(path: str, leaf: Any) -> tuple[Axes, ...]:
        return (channel_axes(path, leaf) if callable(channel_axes) else channel_axes,)

    found = _measure(loss_fn, params, batches, tried, tolerance)
    reasons = {
        "not invariant": "its length changes the loss",
        "undecided": "it changes the loss by less than rounding, so that nothing is decided",
    }
    for leaf in found.leaves:
        if leaf.verdict in reasons:
            warnings.warn(
                f"{leaf.path}: spherical in channel_axes, but {reasons[leaf.verdict]}: {leaf}",
                stacklevel=2,
            )
    return found


def _measure(
    loss_fn: LossFn,
    params: optax.Params,
    batches: tuple[Any, ...],
    tried: Callable[[str, Any], Sequence[Axes]],
    tolerance: float,
) -> InvariantGroups:
    if not batches:
        raise ValueError("no batch: pass at least one after the parameters")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance} is not in (0, 1)")
    named = named_leaves(params)
    structure = jax.tree.structure(params, is_leaf=is_hole)
    places = [i for i, (_, leaf) in enumerate(named) if _is_floating(leaf)]
    paths = [named[i][0] for i in places]
    given = [jnp.asarray(named[i][1]) for i in places]
    groups = [_distinct(x.shape, tried(path, x)) for path, x in zip(paths, given, strict=True)]

    def loss(arrays: list[jax.Array], batch: Any) -> jax.Array:
        leaves = [leaf for _, leaf in named]
        for i, x in zip(places, arrays, strict=True):
            leaves[i] = x
        # By default GPUs and TPUs round the factors of products, to as little as bfloat16.
        with jax.default_matmul_precision("float32"):
            return _scalar(loss_fn(jax.tree.unflatten(structure, leaves), batch))

    @jax.jit
    def screen(arrays: list[jax.Array], batch: Any) -> tuple[jax.Array, list[list[jax.Array]]]:
        value, grads = jax.value_and_grad(loss)(arrays, batch)
        least = _rounding(value) / tolerance
        leaves = zip(arrays, grads, groups, strict=True)
        return value, [[_radial(x, g, it, least) for it in tried] for x, g, tried in leaves]

    value_of = jax.jit(loss)
    for batch in batches:
        _check_finite(value_of(given, batch), "loss_fn at the given parameters")
    points, measured = [], []
    for i in range(_COPIES):
        arrays, directions = _perturb(jax.random.key(i), given)
        for batch in batches:
            value, radial = screen(arrays, batch)
            _check_finite(value, "loss_fn at randomly perturbed parameters")
            points.append((arrays, directions, batch, value))
            measured.append(radial)
    largest = jax.tree.map(lambda *values: float(jnp.max(jnp.stack(values))), *measured)

    found = {path: Evidence(path, None, "no candidate") for path, x in named if not is_hole(x)}
    for place, path in enumerate(paths):
        failed = []
        for (it, channel_axes), radial in zip(groups[place].items(), largest[place], strict=True):
            _check_finite(radial, f"{path}: the gradient of loss_fn")
            if radial > tolerance:
                failed.append(Evidence(path, None, "not invariant", radial))
                continue
            rescaled, turned, rounding = _changes(value_of, points, place, it)
            ratio = rescaled / turned if turned else math.inf
            if ratio <= tolerance and turned > rounding:
                found[path] = Evidence(path, channel_axes, "invariant", radial, ratio)
                break
            if rescaled <= rounding:
                found[path] = Evidence(path, None, "undecided", radial)
                break
            failed.append(Evidence(path, None, "not invariant", radial, ratio))
        else:
            if failed:  # what came closest
                found[path] = min(failed, key=lambda it: (it.rescaling or math.inf, it.radial))
    return InvariantGroups(tuple(found.values()))


def _distinct(shape: tuple[int, ...], tried: Sequence[Axes]) -> dict[Layout, Named]:
    """What of `tried` fits a shape, the finest first, no partition twice."""
    partitions: dict[Layout, Named] = {}
    for channel_axes in tried:
        try:
            groups = layout(shape, channel_axes)
        except ValueError:
            continue
        if groups.axes and channel_axes is not None:
            named = tuple(channel_axes) if isinstance(channel_axes, Sequence) else channel_axes
            partitions.setdefault(groups, named)
    return dict(sorted(partitions.items(), key=lambda item: item[0].size))


@jax.jit
def _perturb(key: jax.Array, arrays: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
    """The arrays with noise of half their size, or of 1/sqrt(fan_in) if that is larger; directions.

    For a bias, 1/sqrt(fan_in) is 1. Zeros, and values too small to matter, thus come to what a
    network trains with; constants keep their sign.
    """
    # One draw for all arrays compiles ten times faster than one for each.
    draw = jax.random.uniform(key, (2, sum(x.size for x in arrays)), minval=-0.5, maxval=0.5)
    perturbed, directions, start = [], [], 0
    for x in arrays:
        noise, direction = draw[:, start : start + x.size].reshape(2, *x.shape)
        start += x.size
        wide = widen(x)
        rms = jnp.sqrt(jnp.mean(wide**2))
        least = math.sqrt(x.shape[-1] / max(x.size, 1)) if x.ndim else 1.0
        perturbed.append(
            (wide + jnp.maximum(rms, least) * noise.astype(wide.dtype)).astype(x.dtype)
        )
        directions.append(direction)
    return perturbed, directions


def _radial(x: jax.Array, g: jax.Array, groups: Layout, least: jax.Array) -> jax.Array:
    """Largest |<g, x>| / (|g| |x|) of a group; `least` replaces denominators below it."""
    x, g = groups.view(widen(x)), groups.view(widen(g))
    whole = jnp.maximum(norm(g, groups.axes) * norm(x, groups.axes), least.astype(x.dtype))
    return jnp.max(jnp.abs(inner(g, x, groups.axes)) / nonzero(whole))


def _changes(
    value_of: Callable[[list[jax.Array], Any], jax.Array],
    points: list[tuple[list[jax.Array], list[jax.Array], Any, jax.Array]],
    place: int,
    groups: Layout,
) -> list[float]:
    """R and D of `find_invariant_groups` for the array at `place`, and what rounding explains."""
    changes = []
    for arrays, directions, batch, value in points:
        moved = _move(arrays[place], directions[place], groups)
        values = [value_of([*arrays[:place], x, *arrays[place + 1 :]], batch) for x in moved]
        some, others, turned = (jnp.abs(other - value) for other in values)
        changes.append(jnp.stack([jnp.maximum(some, others), turned, _rounding(value)]))
    return jnp.max(jnp.stack(changes), axis=0).tolist()


@partial(jax.jit, static_argnums=2)
def _move(x: jax.Array, direction: jax.Array, groups: Layout) -> tuple[jax.Array, ...]:
    """`x` with some of its groups doubled and the others halved, the inverse, and `x` turned.

    Powers of 2 pass through products and sums without rounding in any precision.
    """
    wide = groups.view(widen(x))
    direction = groups.view(direction.astype(wide.dtype))
    draw = jnp.sum(direction, groups.axes, keepdims=True)
    some = draw > draw.mean()  # of two groups and more, neither all nor none
    turned = to_radius(direction, norm(wide, groups.axes), groups.axes)
    factor = jnp.where(some, 2.0, 0.5).astype(wide.dtype)
    moved = (factor * wide, wide / factor, turned)
    return tuple(y.reshape(x.shape).astype(x.dtype) for y in moved)


def _rounding(value: jax.Array) -> jax.Array:
    # A bias before BatchNorm, on which nothing depends, moves the loss of a VGG16 by up to 7 eps.
    return 30 * float(jnp.finfo(value.dtype).eps) * jnp.abs(value)


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _scalar(value: Any) -> jax.Array:
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        types = jax.tree.map(jax.typeof, value)
        raise ValueError(f"loss_fn returned {types}; it must return a floating-point scalar")
    return value


def _check_finite(value: jax.Array | float, what: str) -> None:
    if not math.isfinite(value):
        raise ValueError(f"{what} is {float(value)}, not finite")


def _check_candidates(candidates: Any, params: optax.Params) -> Sequence[Axes]:
    if not isinstance(candidates, Sequence) or None in candidates:
        raise TypeError(f"candidates={candidates!r} is not a sequence such as [-1, (0, -1)]")
    shapes = [leaf.shape for _, leaf in named_leaves(params) if _is_floating(leaf)]
    for axes in candidates:
        layout((), axes)  # for its TypeError
        if not any(_distinct(shape, [axes]) for shape in shapes):
            raise ValueError(f"candidates: {axes!r} makes groups of no parameter")
    return candidates
