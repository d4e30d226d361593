"""Which groups are finer than others, by one step: more axes named, or more blocks of one."""

from __future__ import annotations

import math

from spherical_optax._ground.groups import Blocks, Layout

Named = int | tuple[int, ...] | Blocks  # channel_axes of a spherical leaf


def one_step_finer(groups: Layout) -> list[Layout]:
    """Groups of more than one element that a value of `channel_axes` can split `groups` into.

    First those with one more axis named, then those with the blocks of one axis multiplied by a
    prime number; among either, the most groups first, and later axes before earlier ones. All that
    `channel_axes` can say is reached in such steps.
    """
    shape, counts = groups
    blocked = [axis for axis in range(len(shape)) if 1 < counts[axis] < shape[axis]]
    named, split = [], []
    for axis in reversed(range(len(shape))):
        rest = shape[axis] // counts[axis]
        if rest > 1:
            named.append(_with_count(groups, axis, shape[axis]))
        if blocked in ([], [axis]):
            primes = (p for p in _prime_factors(rest) if p < rest)  # the axis in full is named
            split += [_with_count(groups, axis, counts[axis] * p) for p in primes]
    return [
        finer
        for step in (named, split)
        for finer in sorted(step, key=lambda finer: -math.prod(finer.counts))
        if finer.axes
    ]


def refines(groups: Layout, others: Layout) -> bool:
    """Whether each of `groups` lies in one of `others`, of an array of the same shape."""
    return all(n % m == 0 for n, m in zip(groups.counts, others.counts, strict=True))


def plain_axes(groups: Layout) -> Named:
    """The value of `channel_axes` for groups: the last two axes are counted from the end."""
    rank, named, block = len(groups.shape), [], None
    for axis, (n, count) in enumerate(zip(*groups, strict=True)):
        number = axis - rank if axis >= rank - 2 else axis
        if 1 < count < n:
            block = number, count
        elif count > 1:
            named.append(number)
    if block:
        return Blocks(*block, tuple(named))
    return named[0] if len(named) == 1 else tuple(named)


def _with_count(groups: Layout, axis: int, count: int) -> Layout:
    counts = list(groups.counts)
    counts[axis] = count
    return Layout(groups.shape, tuple(counts))


def _prime_factors(n: int) -> list[int]:
    """The different prime factors of a number, in descending order."""
    factors, p = [], 2
    while p * p <= n:
        if n % p == 0:
            factors.append(p)
            while n % p == 0:
                n //= p
        p += 1
    return sorted([*factors, n] if n > 1 else factors, reverse=True)
