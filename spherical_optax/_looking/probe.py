"""What a loss makes of rescaled parameters: its radial derivatives, and its changes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from spherical_optax._ground.geometry import to_radius
from spherical_optax._ground.groups import Layout, wide_dtype, widen
from spherical_optax._ground.hyperparams import check_tolerance
from spherical_optax._ground.selection import is_hole, named_leaves
from spherical_optax._ground.sums import nonzero, norm

LossFn = Callable[[Any, Any], ArrayLike]
Verdict = Literal["invariant", "not invariant", "undecided"]
_COPIES = 3


class Point(NamedTuple):
    """Perturbed parameters and a batch, and the loss there."""

    arrays: list[jax.Array]
    directions: list[jax.Array]  # random ones
    batch: Any
    value: jax.Array
    grads: list[jax.Array]


class Radial(NamedTuple):
    """The derivatives of a loss along the radii of some groups."""

    largest: float  # |<g, x>| / (|g| |x|) of a group at a point, at most 1
    live: int  # number of groups on which the loss depends: |g| |x| is above rounding at a point


class Probe(NamedTuple):
    """A loss of the floating-point leaves of a tree, at random points; made by `probe`."""

    paths: list[str]
    shapes: list[tuple[int, ...]]
    value_of: Callable[[list[jax.Array], Any], jax.Array]
    points: list[Point]
    tolerance: float
    whole: list[Radial]  # for each whole array


def probe(
    loss_fn: LossFn, params: optax.Params, batches: tuple[Any, ...], tolerance: float
) -> Probe:
    """Evaluates a loss and its gradient at random perturbations of the parameters.

    Raises:
      ValueError: no batch, a loss that is no scalar or not finite, a tolerance out of range.
    """
    if not batches:
        raise ValueError("no batch: pass at least one after the parameters")
    check_tolerance(tolerance)
    named = named_leaves(params)
    structure = jax.tree.structure(params, is_leaf=is_hole)
    places = [i for i, (_, leaf) in enumerate(named) if is_floating(leaf)]
    given = [jnp.asarray(named[i][1]) for i in places]

    def loss(arrays: list[jax.Array], batch: Any) -> jax.Array:
        leaves = [leaf for _, leaf in named]
        for i, x in zip(places, arrays, strict=True):
            leaves[i] = x
        # By default GPUs and TPUs round the factors of products, to as little as bfloat16.
        with jax.default_matmul_precision("float32"):
            return _scalar(loss_fn(jax.tree.unflatten(structure, leaves), batch))

    @jax.jit
    def screen(arrays: list[jax.Array], batch: Any) -> tuple[Any, ...]:
        value, grads = jax.value_and_grad(loss)(arrays, batch)
        sums = [jnp.sum(_products(*it).reshape(3, -1), 1) for it in zip(arrays, grads, strict=True)]
        dtype = wide_dtype(value.dtype)
        sums = jnp.stack([it.astype(dtype) for it in sums], axis=1) if sums else jnp.zeros((3, 0))
        return value, grads, _ratios(sums, _rounding(value), tolerance)

    value_of = jax.jit(loss)
    for batch in batches:
        check_finite(value_of(given, batch), "loss_fn at the given parameters")
    points, figures = [], []
    for i in range(_COPIES):
        arrays, directions = _perturb(jax.random.key(i), given)
        for batch in batches:
            value, grads, of_arrays = screen(arrays, batch)
            check_finite(value, "loss_fn at randomly perturbed parameters")
            points.append(Point(arrays, directions, batch, value, grads))
            figures.append(of_arrays)
    ratios, live = map(jnp.stack, zip(*figures, strict=True))
    largest, live = ratios.max(0).tolist(), live.any(0).tolist()
    whole = [Radial(*it) for it in zip(largest, live, strict=True)]
    shapes = [x.shape for x in given]
    return Probe([named[i][0] for i in places], shapes, value_of, points, tolerance, whole)


def radial(probe: Probe, places: Sequence[int], layouts: Sequence[Layout]) -> list[Radial]:
    """Radial derivatives for each of the layouts of one array, or of some joined to a vector.

    Raises:
      ValueError: a gradient is not finite.
    """
    xs = [_joined([point.arrays[i] for i in places]) for point in probe.points]
    gs = [_joined([point.grads[i] for i in places]) for point in probe.points]
    rounding = jnp.stack([_rounding(point.value) for point in probe.points])
    largest, live = _radial(xs, gs, rounding, probe.tolerance, tuple(layouts))
    found = [Radial(*figures) for figures in zip(largest.tolist(), live.tolist(), strict=True)]
    for figures in found:
        check_finite(figures.largest, f"{probe.paths[places[0]]}: the gradient of loss_fn")
    return found


def rescaling(probe: Probe, groups: Mapping[int, Layout]) -> tuple[Verdict, float | None]:
    """The verdict of R and D, and R/D, where the groups of some arrays are rescaled together.

    See `find_invariant_groups`. "undecided": rounding explains R, and D too or nearly so.
    """
    changes = []
    for point in probe.points:
        moved = {i: _move(point.arrays[i], point.directions[i], it) for i, it in groups.items()}
        values = []
        for k in range(3):
            arrays = [moved[i][k] if i in moved else x for i, x in enumerate(point.arrays)]
            values.append(probe.value_of(arrays, point.batch))
        some, others, turned = (jnp.abs(value - point.value) for value in values)
        changes.append(jnp.stack([jnp.maximum(some, others), turned, _rounding(point.value)]))
    rescaled, turned, rounding = jnp.max(jnp.stack(changes), axis=0).tolist()
    ratio = rescaled / turned if turned else math.inf
    if ratio <= probe.tolerance and turned > rounding:
        return "invariant", ratio
    return ("undecided", None) if rescaled <= rounding else ("not invariant", ratio)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of a real floating dtype."""
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def check_finite(value: jax.Array | float, what: str) -> None:
    """Raises `ValueError` if a value is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"{what} is {float(value)}, not finite")


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


def _joined(arrays: list[jax.Array]) -> jax.Array:
    if len(arrays) == 1:
        return arrays[0]
    dtype = wide_dtype(arrays[0].dtype)
    return jnp.concatenate([x.astype(dtype).ravel() for x in arrays])


# All layouts in one program, which arrays of one shape share.
@partial(jax.jit, static_argnums=4)
def _radial(
    xs: list[jax.Array],
    gs: list[jax.Array],
    rounding: jax.Array,
    tolerance: float,
    layouts: tuple[Layout, ...],
) -> tuple[jax.Array, jax.Array]:
    """The figures of `Radial` for each layout, of arrays and gradients at some points."""
    products = _products(jnp.stack(xs), jnp.stack(gs))
    sums = []
    for groups in layouts:

        def total(x: jax.Array, groups: Layout = groups) -> jax.Array:
            return jnp.sum(groups.view(x), groups.axes).ravel()

        sums.append(jax.vmap(jax.vmap(total))(products))
    # The groups of all layouts side by side compile in half the time.
    ratios, live = _ratios(jnp.concatenate(sums, 2), rounding[:, None], tolerance)
    ends = list(itertools.accumulate(it.shape[2] for it in sums))[:-1]
    largest = [jnp.max(it) for it in jnp.split(ratios, ends, axis=1)]
    number = [jnp.sum(it) for it in jnp.split(live.any(0), ends)]
    return jnp.stack(largest), jnp.stack(number)


def _products(x: jax.Array, g: jax.Array) -> jax.Array:
    x, g = widen(x), widen(g)
    return jnp.stack([g * x, g * g, x * x])


def _ratios(sums: jax.Array, rounding: jax.Array, tolerance: float) -> tuple[jax.Array, jax.Array]:
    """|<g, x>| / (|g| |x|), and whether |g| |x| is above rounding, of sums of `_products`.

    What rounding makes of <g, x> is no radial part: such denominators are replaced by larger ones.
    """
    radial, gg, xx = sums
    whole, rounding = jnp.sqrt(gg) * jnp.sqrt(xx), rounding.astype(sums.dtype)
    least = rounding / tolerance
    return jnp.abs(radial) / nonzero(jnp.maximum(whole, least)), whole > rounding


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


def _scalar(value: Any) -> jax.Array:
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        types = jax.tree.map(jax.typeof, value)
        raise ValueError(f"loss_fn returned {types}; it must return a floating-point scalar")
    return value
