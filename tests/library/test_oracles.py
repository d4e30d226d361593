"""Optimizers on spheres against their papers' equations in NumPy, and layers of a stack alone."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

import oracle
import spherical_optax as so
from layouts import COUNTS, LAYOUTS, as_rows, from_rows, random_arrays
from replay import replay

pytestmark = pytest.mark.usefixtures("compiled_quickly")


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Leaf:
    """A layout as the oracle needs it."""

    def __init__(self, shape, axes):
        self.shape, self.axes = shape, axes
        counts = COUNTS.get((shape, axes), shape)  # of a classic leaf each element
        self.group = [n // count for n, count in zip(shape, counts, strict=True) if n != count]
        self.groups_per_layer = [1, *(count for count in counts if count > 1)][-1]
        self.layers = (-1, self.groups_per_layer, int(np.prod(self.group)))


SPHERICAL = {f"leaf{i}": Leaf(*layout) for i, layout in enumerate(LAYOUTS)}
MATRICES = {name: leaf for name, leaf in SPHERICAL.items() if len(leaf.group) == 2}
LEAVES = SPHERICAL | {"bias": Leaf((6,), None)}
# EPS is seen beside numbers of about 1.
ADAM = B1, B2, EPS = 0.8, 0.9, 1e-3
DELTA, STEPS = 0.2, 10


def adam_h(leaf, x, grads, radius=None):
    return oracle.hyperball(x, oracle.adam_directions(grads, *ADAM), 0.3, radius)


def muon_h(leaf, x, grads, nesterov=True):
    momenta = oracle.momentum_directions(grads, 0.8, nesterov=nesterov)
    directions = (oracle.orthogonalized(m, leaf.group, 5) for m in momenta)
    return oracle.hyperball(x, directions, 0.3)


def adamp(leaf, x, grads, nesterov=False):
    directions = oracle.adam_directions(grads, *ADAM, nesterov)
    return oracle.project_where_invariant(
        x, grads, directions, leaf.groups_per_layer, 0.1, 0.3, DELTA, 0.4, EPS
    )


def sgdp(leaf, x, grads, **options):
    directions = oracle.momentum_directions(grads, 0.8, **options)
    return oracle.project_where_invariant(
        x, grads, directions, leaf.groups_per_layer, 0.1, 0.3 / (1 - 0.8), DELTA, 0.4, 1e-8
    )


def rotational(leaf, x, grads, zero_mean=False):
    return oracle.rotational(x, oracle.adam_directions(grads, *ADAM), 0.3, 0.7, EPS, zero_mean)


def adamw(rate, weight_decay):
    def classic(x, grads, nesterov=False, **_):
        return oracle.steps(x, oracle.adam_directions(grads, *ADAM, nesterov), rate, weight_decay)

    return classic


def sgdw(x, grads, **options):
    momenta = oracle.momentum_directions(grads, 0.8, **options)
    return oracle.steps(x, momenta, 0.1, 0.3 / (1 - 0.8))


OF_CLASSIC = {"adam_learning_rate": 0.05, "adam_weight_decay": 0.2}
OF_TEST = {"weight_decay": 0.3, "delta": DELTA, "wd_ratio": 0.4}
FACTORIES = {
    "adam_h": partial(so.adam_h, 0.3, *ADAM, **OF_CLASSIC),
    "muon_h": partial(so.muon_h, 0.3, 0.8, adam_b1=B1, adam_b2=B2, adam_eps=EPS, **OF_CLASSIC),
    "adamp": partial(so.adamp, 0.1, *ADAM, **OF_TEST),
    "sgdp": partial(so.sgdp, 0.1, 0.8, **OF_TEST),
    "rotational": partial(
        so.rotational, optax.scale_by_adam(*ADAM), 0.3, update_norm_decay=0.7, eps=EPS
    ),
}
# Of spherical and of classic leaves.
ORACLES = {
    "adam_h": (adam_h, adamw(0.05, 0.2)),
    "muon_h": (muon_h, adamw(0.05, 0.2)),
    "adamp": (adamp, adamw(0.1, 0.3)),
    "sgdp": (sgdp, sgdw),
    "rotational": (rotational, adamw(0.3, 0.0)),
}


def gradient(step, leaf, g, x):
    """In rows: of each layer in turn one that `turned` makes of this one."""
    layers = zip(*(as_rows(a, leaf.axes).reshape(leaf.layers) for a in (g, x)), strict=True)
    return np.concatenate([turned((step + i) % 5, *layer) for i, layer in enumerate(layers)])


def turned(kind, g, x):
    """As it is; or just tangent enough, or just not, in each group (1, 2) or as a whole (3, 4)."""
    if kind == 0:
        return g
    shape = g.shape
    if kind > 2:
        g, x = g.reshape(1, -1), x.reshape(1, -1)
    cosine = DELTA / np.sqrt(x.shape[1]) * (0.9 if kind % 2 else 1.1)
    unit = x / np.sqrt(oracle.dot(x, x))
    g = g - oracle.dot(g, unit) * unit
    radial = cosine / np.sqrt(1 - cosine**2) * np.sqrt(oracle.dot(g, g))
    return (g + radial * unit).reshape(shape)


@pytest.mark.parametrize("name, options", [
    ("adam_h", {}),
    ("adam_h", {"radius": 2.0}),
    ("muon_h", {}),
    ("muon_h", {"nesterov": False}),
    ("adamp", {}),
    ("adamp", {"nesterov": True}),
    ("sgdp", {}),
    ("sgdp", {"nesterov": True, "dampening": 0.3}),
    ("rotational", {}),
    ("rotational", {"zero_mean": True}),
])  # fmt: skip
def test_it_is_the_oracle(name, options):
    spherical, classic = ORACLES[name]
    selected = MATRICES if name == "muon_h" else SPHERICAL
    axes = so.by_path({key: leaf.axes for key, leaf in selected.items()})
    raw = {key: random_arrays(leaf.shape, 1 + STEPS) for key, leaf in LEAVES.items()}
    start = {key: arrays[0] for key, arrays in raw.items()}
    seen = {key: [] for key in LEAVES}

    def gradients(params, step):
        out = {}
        for key, leaf in LEAVES.items():
            seen[key].append(gradient(step, leaf, raw[key][1 + step], params[key]))
            out[key] = from_rows(seen[key][-1], leaf.shape, leaf.axes)
        return out

    tx = FACTORIES[name](channel_axes=axes, **options)
    points = replay(tx, start, [partial(gradients, step=step) for step in range(STEPS)])
    # Some hundred float64 operations; Muon's quintic stretches by 3.4445^5 what is near to 0.
    tolerance = 1e-11 if name == "muon_h" else 1e-12
    for key, leaf in LEAVES.items():
        rule = partial(spherical, leaf) if key in selected else classic
        expected = list(rule(as_rows(start[key], leaf.axes), seen[key], **options))
        actual = [as_rows(point[key], leaf.axes) for point in points]
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("name", FACTORIES)
def test_stacked_layers_are_as_layers_alone(name):
    leaf = SPHERICAL["leaf2"]  # a stack of two
    stacked, alone = (0, ()) if name == "muon_h" else (leaf.axes, leaf.axes[1:])
    x, *raw = random_arrays(leaf.shape, 6)
    seen = []

    def gradients(x, step):
        seen.append(from_rows(gradient(step, leaf, raw[step], x), leaf.shape, leaf.axes))
        return seen[-1]

    steps = [partial(gradients, step=step) for step in range(len(raw))]
    together = replay(FACTORIES[name](channel_axes=stacked), x, steps)
    tx = FACTORIES[name](channel_axes=alone)
    for i in range(2):
        layer = replay(tx, x[i], [g[i] for g in seen])
        np.testing.assert_allclose([point[i] for point in together], layer, rtol=1e-11, atol=1e-11)
