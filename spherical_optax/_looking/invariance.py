"""Which weights of a model are radially invariant: measured, not guessed from their names."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import optax

from spherical_optax._ground.groups import Axes, Layout, layout
from spherical_optax._ground.selection import (
    ChannelAxes,
    is_hole,
    named_leaves,
    refuse_schedule_call,
    select,
)
from spherical_optax._looking.probe import (
    LossFn,
    Probe,
    Verdict,
    check_finite,
    is_floating,
    probe,
    radial,
    rescaling,
)
from spherical_optax._looking.refinement import Named, one_step_finer, plain_axes, refines


class Evidence(NamedTuple):
    """What was measured of one leaf, for its invariant groups or else for those that failed."""

    path: str
    axes: Named | None  # channel_axes of the invariant groups; None: there are none
    verdict: Literal["invariant", "not invariant", "undecided", "no candidate"]
    radial: float | None = None  # largest radial derivative of a group, at most 1
    rescaling: float | None = None  # R/D; None where the radial derivative decides
    instead: Named | None = None  # the invariant groups where those of a selection are not
    with_bias: str | None = None  # path of the leaf with which it is invariant, and not without

    def __str__(self) -> str:
        figures = {"radial": self.radial, "rescaling": self.rescaling}
        shown = [f"{name} {x:.0e}" for name, x in figures.items() if x is not None]
        text = self.verdict
        if self.with_bias is not None:
            bias = self.with_bias.rpartition("/")[2]
            text = f"invariant only with its {bias}; use_bias=False would put it on a sphere"
        if shown:
            text += f" ({', '.join(shown)})"
        return text if self.instead is None else f"{text}; invariant as {self.instead}"


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

    def rules(self) -> dict[str, Named]:
        """The invariant leaves as rules, with which `by_path` selects the same.

        Print them, and paste them where a run is to be resumed with what was measured at its start.

        >>> import spherical_optax as so
        >>> found = so.InvariantGroups((so.Evidence("0/conv", so.blocks(-1, 4), "invariant"),))
        >>> found.rules()
        {'^0/conv$': so.blocks(-1, 4)}
        >>> so.by_path(found.rules())("0/conv", None)
        so.blocks(-1, 4)
        """
        return {
            f"^{re.escape(leaf.path)}$": leaf.axes for leaf in self.leaves if leaf.axes is not None
        }

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
    candidates: Sequence[Axes] | None = None,
    tolerance: float = 1e-2,
) -> InvariantGroups:
    """Finds the weights whose length does not change the loss: f(a x) = f(x) for a > 0 per group.

    The finest groups x of each leaf such that, with gradients g,

        |<g, x>| <= tolerance |g| |x|        in each group
        R = max |f(a x) - f(x)|              a = 1/2 or 2, drawn for each group, and vice versa
        D = max |f(y) - f(x)|                y in random directions, |y| = |x| in each group
        R <= tolerance D

    over all batches and three random perturbations of the parameters. What is invariant in groups
    is so in unions of them. The search therefore starts with the whole leaf, and refines what
    passes, by naming one more axis or by more `blocks` of one, as long as that passes and makes
    more groups that the loss depends on. (It does not on eight of nine taps over 1×1 images.) Where
    two refinements pass, but not both at once, the one of more groups is taken.

    The first line costs one gradient for all leaves, but a large group hardly has a radial part
    anyway; R and D cost three values of the loss at each point, once for most leaves that pass it.
    Perturbed, because at its start a network may hide what it depends on: BatchNorm's scale looks
    invariant while its bias is zero, and a last layer of zeros hides all layers before it. A leaf
    whose R and D are below the loss's rounding is undecided: such is a bias before BatchNorm, on
    which nothing depends. The evidence also tells a kernel that is invariant only with its bias.

    In ResNets and a VGG16, R/D is below 1e-3, for BatchNorm's eps, or above 0.1. Activations in
    bfloat16 round too much to tell: measure such a model in float32. In a whole tensor, one channel
    of many that is not normalised may be too little to be seen.

    Args:
      loss_fn: `(params, batch) -> loss`, a floating-point scalar, traced by `jax.jit`, with
        normalisation layers in training mode and a fixed key for what is random. In NNX, let it
        call `nnx.merge(graphdef, params, stats, copy=True)`.
      params: parameters. Leaves of real floating dtypes are measured, others left alone.
      *batches: at least one; 8 images are enough.
      candidates: `channel_axes` to try on each leaf that they fit, instead of the search: the
        finest that passes is taken.
      tolerance: what counts as zero, in (0, 1).

    Returns:
      A hashable callable `(path, leaf) -> axes` for any `channel_axes` argument. `describe` shows
      its verdicts with the largest |<g, x>| / (|g| |x|) as "radial" and R/D as "rescaling", and
      its method `rules()` gives it as a dictionary for `by_path`. The last two axes are counted
      from the end, others from the front: `(0, -1)`.

    Raises:
      ValueError: no batch, a loss that is not a scalar or not finite, a gradient that is not
        finite, a candidate that fits no leaf, a tolerance out of range.
      TypeError: a candidate is no value of `channel_axes`, or `None`.

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
    tried = None if candidates is None else _check_candidates(candidates, params)
    at = probe(loss_fn, params, batches, tolerance)
    places = range(len(at.paths))
    if tried is None:
        return _in_order(params, [_finest(at, place) for place in places])
    return _in_order(params, [_finest_of(at, place, tried) for place in places])


def check_selection(
    loss_fn: LossFn,
    params: optax.Params,
    *batches: Any,
    channel_axes: ChannelAxes,
    tolerance: float = 1e-2,
) -> InvariantGroups:
    """Warns of each spherical leaf of a selection whose length does change the loss.

    Measures as `find_invariant_groups` does, with the selection's groups as the only candidates.
    Where they fail and others pass, the warning names those.

    Args:
      loss_fn: `(params, batch) -> loss`, see `find_invariant_groups`.
      params: parameters.
      *batches: at least one.
      channel_axes: the selection.
      tolerance: what counts as zero, in (0, 1).

    Returns:
      What was measured; as a selection, the part of `channel_axes` that was found invariant. The
      evidence on the rest names the groups that pass, if any, as `instead`.

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
    wanted = {leaf.path: leaf.channel_axes for leaf in select(params, channel_axes)}
    at = probe(loss_fn, params, batches, tolerance)
    measured = []
    for i, path in enumerate(at.paths):
        leaf = _finest_of(at, i, [wanted[path]])
        if leaf.verdict == "not invariant":
            finest = _finest(at, i)
            leaf = leaf._replace(instead=finest.axes, with_bias=finest.with_bias)
        measured.append(leaf)
        if leaf.verdict in _REASONS:
            warnings.warn(
                f"{path}: spherical in channel_axes, but {_REASONS[leaf.verdict]}: {leaf}",
                stacklevel=2,
            )
    return _in_order(params, measured)


_REASONS = {
    "not invariant": "its length changes the loss",
    "undecided": "it changes the loss by less than rounding, so that nothing is decided",
}


def _in_order(params: optax.Params, measured: list[Evidence]) -> InvariantGroups:
    """All leaves in the order of the tree, those that nothing was measured of too."""
    found = {leaf.path: leaf for leaf in measured}
    paths = [path for path, leaf in named_leaves(params) if not is_hole(leaf)]
    return InvariantGroups(
        tuple(found.get(path, Evidence(path, None, "no candidate")) for path in paths)
    )


def _finest(at: Probe, place: int) -> Evidence:
    """The finest invariant groups of an array that are reached by refining the whole."""
    path, whole = at.paths[place], layout(at.shapes[place], ())
    if not whole.axes:
        return Evidence(path, None, "no candidate")
    radials = {whole: at.whole[place]}
    refuted: list[Layout] = []  # and so is what is finer

    def promising(groups: Layout) -> Iterator[Layout]:
        """What is one step finer and may be invariant."""
        finer = one_step_finer(groups)
        new = [it for it in finer if it not in radials and not is_refuted(it)]
        if new:
            radials.update(zip(new, radial(at, [place], new), strict=True))
            refuted.extend(it for it in new if radials[it].largest > at.tolerance)
        for it in finer:
            if not is_refuted(it) and radials[it].live > radials[groups].live:
                yield it

    def is_refuted(groups: Layout) -> bool:
        return any(refines(groups, it) for it in refuted)

    @cache
    def verdict(groups: Layout) -> tuple[Verdict, float | None]:
        return rescaling(at, {place: groups})

    def passes(groups: Layout) -> bool:
        if verdict(groups)[0] != "invariant":
            refuted.append(groups)
        return not is_refuted(groups)

    least = at.whole[place].largest  # of all groups
    check_finite(least, f"{path}: the gradient of loss_fn")
    if least > at.tolerance:
        return _with_bias(at, place, Evidence(path, None, "not invariant", least))
    # R and D of the finest groups spare those of all that are coarser. So go down by radial
    # derivatives alone, and step by step only if that went too far.
    last = whole
    while finer := next(promising(last), None):
        last = finer
    if not passes(last):
        last = whole
        while passes(last) and (finer := next(filter(passes, promising(last)), None)):
            last = finer
    outcome, ratio = verdict(last)
    axes = plain_axes(last) if outcome == "invariant" else None
    found = Evidence(path, axes, outcome, radials[last].largest, ratio)
    return _with_bias(at, place, found) if outcome == "not invariant" else found


def _with_bias(at: Probe, place: int, found: Evidence) -> Evidence:
    """Adds whether an array that is not invariant is so together with its bias.

    Its bias is the only array beside it that has fewer axes.
    """
    node, rank = found.path.rpartition("/")[0], len(at.shapes[place])
    biases = [
        i
        for i, (path, shape) in enumerate(zip(at.paths, at.shapes, strict=True))
        if path.rpartition("/")[0] == node and 0 < len(shape) < rank
    ]
    if len(biases) != 1:
        return found
    both = [place, *biases]
    size = sum(math.prod(at.shapes[i]) for i in both)
    if radial(at, both, [layout([size], ())])[0].largest > at.tolerance:
        return found
    if rescaling(at, {i: layout(at.shapes[i], ()) for i in both})[0] != "invariant":
        return found
    return found._replace(with_bias=at.paths[biases[0]])


def _finest_of(at: Probe, place: int, tried: Sequence[Axes]) -> Evidence:
    """The finest invariant groups of an array among candidates."""
    path, failed = at.paths[place], []
    groups = _distinct(at.shapes[place], tried)
    radials = radial(at, [place], list(groups)) if groups else []
    for (it, channel_axes), figures in zip(groups.items(), radials, strict=True):
        if figures.largest > at.tolerance:
            failed.append(Evidence(path, None, "not invariant", figures.largest))
            continue
        verdict, ratio = rescaling(at, {place: it})
        axes = channel_axes if verdict == "invariant" else None
        found = Evidence(path, axes, verdict, figures.largest, ratio)
        if verdict != "not invariant":
            return found
        failed.append(found)
    # What came closest.
    closest = min(failed, key=lambda it: (it.rescaling or math.inf, it.radial), default=None)
    return closest or Evidence(path, None, "no candidate")


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


def _check_candidates(candidates: Any, params: optax.Params) -> Sequence[Axes]:
    if not isinstance(candidates, Sequence) or None in candidates:
        raise TypeError(f"candidates={candidates!r} is not a sequence such as [-1, (0, -1)]")
    shapes = [leaf.shape for _, leaf in named_leaves(params) if is_floating(leaf)]
    for axes in candidates:
        layout((), axes)  # for its TypeError
        if not any(_distinct(shape, [axes]) for shape in shapes):
            raise ValueError(f"candidates: {axes!r} makes groups of no parameter")
    return candidates
