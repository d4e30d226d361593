"""The optimizers in NumPy and float64, from the equations of their papers.

Groups are the rows of a matrix [groups, d]. Transport happens right after each step, with the old
and the new point at hand, as the papers write it and the library does not do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np


def rows(x: np.ndarray, channel_axes: Any) -> np.ndarray:
    """The groups of an array as rows, in the order of the axes that index them."""
    if channel_axes is None:
        return x.reshape(-1, 1)
    if hasattr(channel_axes, "axis"):  # blocks: the same as an axis more
        split = channel_axes.axis % x.ndim
        others = [axis % x.ndim for axis in channel_axes.channel_axes]
        x = x.reshape(*x.shape[:split], channel_axes.count, -1, *x.shape[split + 1 :])
        axes = (split, *(axis + (axis > split) for axis in others))
    else:
        axes = (channel_axes,) if isinstance(channel_axes, int) else channel_axes
    kept = sorted(axis % x.ndim for axis in axes)
    groups = int(np.prod([x.shape[axis] for axis in kept]))
    return np.moveaxis(x, kept, range(len(kept))).reshape(groups, -1)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, axis=1, keepdims=True)


def rescale_and_transport(m: np.ndarray, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    """RT of Roburin et al.: (<x1, x2> m - <m, x2> x1) / |x2|²."""
    return (dot(x1, x2) * m - dot(m, x2) * x1) / dot(x2, x2)


def parallel_transport(m: np.ndarray, x1: np.ndarray, x2: np.ndarray) -> np.ndarray:
    """Rotates m in the plane of x1 and x2 by the angle between them; the rest of m stays."""
    u, w = x1 / np.sqrt(dot(x1, x1)), x2 / np.sqrt(dot(x2, x2))
    cosine = dot(u, w)
    side = w - cosine * u
    sine = np.sqrt(dot(side, side))
    side = side / sine
    along, radial = dot(m, side), dot(m, u)
    rest = m - along * side - radial * u
    turned_side, turned_u = cosine * side - sine * u, cosine * u + sine * side
    return rest + along * turned_side + radial * turned_u


def adam(
    x: np.ndarray,
    grads: Iterable[np.ndarray],
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float = 0.0,
    transport: str = "none",
) -> Iterator[np.ndarray]:
    """AdamS ("none") and AdamSRT ("rescale"), a point after each gradient."""
    d = x.shape[1]
    m, v = np.zeros_like(x), np.zeros((len(x), 1))
    for t, g in enumerate(grads, start=1):
        g = g + weight_decay * x
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * dot(g, g) / d
        old = x
        x = x - learning_rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps / np.sqrt(d))
        if transport == "rescale" and d > 1:
            m = rescale_and_transport(m, old, x)
            v = v * dot(old, old) / dot(x, x)
        yield x


def adam_g(
    x: np.ndarray,
    grads: Iterable[np.ndarray],
    learning_rate: float,
    b1: float,
    b2: float,
    eps: float,
) -> Iterator[np.ndarray]:
    """AdamG on spherical groups (d > 1)."""
    m, v = np.zeros_like(x), np.zeros((len(x), 1))
    for t, g in enumerate(grads, start=1):
        radius = np.sqrt(dot(x, x))
        g = radius * g
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * dot(g, g)
        step = radius * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        y = x - learning_rate * step
        y = y / np.sqrt(dot(y, y))
        m = parallel_transport(m, x, y)
        x = y
        yield x


def sgd_mrt(
    x: np.ndarray,
    grads: Iterable[np.ndarray],
    learning_rate: float,
    momentum: float,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """SGD-MRT, a point after each gradient."""
    m = np.zeros_like(x)
    for g in grads:
        g = g + weight_decay * x
        m = momentum * m + (1 - dampening) * g
        old = x
        x = x - learning_rate * m
        if x.shape[1] > 1:
            m = rescale_and_transport(m, old, x)
        yield x


def adam_directions(
    grads: Iterable[np.ndarray], b1: float, b2: float, eps: float, nesterov: bool = False
) -> Iterator[np.ndarray]:
    """Adam's, by element; with nesterov as AdamP has it."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        u = b1 * m + (1 - b1) * g if nesterov else m
        yield u / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def momentum_directions(
    grads: Iterable[np.ndarray], momentum: float, dampening: float = 0.0, nesterov: bool = False
) -> Iterator[np.ndarray]:
    m = 0.0
    for g in grads:
        m = momentum * m + (1 - dampening) * g
        yield g + momentum * m if nesterov else m


def orthogonalized(u: np.ndarray, matrix: tuple[int, int], steps: int) -> np.ndarray:
    """Muon's quintic, which turns each singular value s into a s + b s³ + c s⁵, `steps` times."""
    a, b, c = 3.4445, -4.7750, 2.0315
    left, s, right = np.linalg.svd(u.reshape(-1, *matrix), full_matrices=False)
    s = s / (np.sqrt(dot(s, s)) + 1e-8)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return np.einsum("gik,gk,gkj->gij", left, s, right).reshape(u.shape)


def steps(
    x: np.ndarray, directions: Iterable[np.ndarray], learning_rate: float, weight_decay: float = 0.0
) -> Iterator[np.ndarray]:
    """What classic leaves do: the direction, and a decoupled decay."""
    for u in directions:
        x = x - learning_rate * (u + weight_decay * x)
        yield x


def hyperball(
    x: np.ndarray,
    directions: Iterable[np.ndarray],
    learning_rate: float,
    radius: Any = None,
    retraction: str = "normalize",
) -> Iterator[np.ndarray]:
    """Hyperball, a point after each direction."""
    r = np.sqrt(dot(x, x)) if radius is None else radius
    for u in directions:
        if retraction == "exp":
            u = u - dot(u, x) / dot(x, x) * x
        n = u / np.sqrt(dot(u, u))
        if retraction == "exp":
            unit = x / np.sqrt(dot(x, x))
            x = r * (np.cos(learning_rate) * unit - np.sin(learning_rate) * n)
        else:
            y = x - learning_rate * r * n
            x = r * y / np.sqrt(dot(y, y))
        yield x


def rotational(
    x: np.ndarray,
    directions: Iterable[np.ndarray],
    angle: float,
    decay: float,
    eps: float,
    zero_mean: bool = False,
) -> Iterator[np.ndarray]:
    """Kosson et al.'s wrapper, a point after each direction."""
    r, s = np.sqrt(dot(x, x)), 0.0
    for t, u in enumerate(directions, start=1):
        if zero_mean:
            u = u - np.mean(u, axis=1, keepdims=True)
        u = u - dot(u, x) / dot(x, x) * x
        s = decay * s + (1 - decay) * dot(u, u)
        y = x - angle * r * u / (np.sqrt(s / (1 - decay**t)) + eps)
        x = r * y / np.sqrt(dot(y, y))
        yield x


def project_where_invariant(
    x: np.ndarray,
    grads: Iterable[np.ndarray],
    directions: Iterable[np.ndarray],
    groups_per_layer: int,
    learning_rate: float,
    weight_decay: float,
    delta: float,
    wd_ratio: float,
    eps: float,
) -> Iterator[np.ndarray]:
    """AdamP and SGDP of layers, each of some rows: a point after each gradient."""

    def step_of_layer(u: np.ndarray, g: np.ndarray, x: np.ndarray) -> np.ndarray:
        for shape in (x.shape, (1, -1)):
            u1, g1, x1 = (a.reshape(shape) for a in (u, g, x))
            norms = np.sqrt(dot(g1, g1) * dot(x1, x1))
            cosines = np.abs(dot(g1, x1)) / np.maximum(norms, eps)
            if np.max(cosines) < delta / np.sqrt(x1.shape[1]):
                unit = x1 / (np.sqrt(dot(x1, x1)) + eps)
                return (u1 - dot(u1, unit) * unit).reshape(x.shape) + wd_ratio * weight_decay * x
        return u + weight_decay * x

    for g, u in zip(grads, directions, strict=True):
        layers = (a.reshape(-1, groups_per_layer, x.shape[1]) for a in (u, g, x))
        step = np.concatenate([step_of_layer(*layer) for layer in zip(*layers, strict=True)])
        x = x - learning_rate * step
        yield x
