"""The spherical perspective of Roburin et al. as numbers: gradients, rates and transport."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oracle
import spherical_optax as so
from invariant import ROUNDING, SHAPE, D, assert_close, gradient, random_arrays

ETA, DECAY = 0.05, 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def as_rows(x):
    return oracle.rows(np.asarray(x), -1)


def lengths(x):
    return np.sqrt(oracle.dot(x, x))


def tangents(x, v):
    """P_x(v) of rows."""
    return v - oracle.dot(v, x) / oracle.dot(x, x) * x


# Gradients of radially invariant weights.


class Normalised(nn.Module):
    """A convolution and a hidden layer, both followed by BatchNorm without eps."""

    @nn.compact
    def __call__(self, images):
        wide = {"param_dtype": jnp.float64}
        norm = partial(nn.BatchNorm, use_running_average=False, epsilon=0.0, **wide)
        dense = partial(nn.Dense, use_bias=False, **wide)
        x = nn.Conv(3, (2, 2), use_bias=False, name="conv", **wide)(images)
        x = dense(4, name="hidden")(nn.relu(norm()(x)).mean((1, 2)))
        return dense(2, name="head")(nn.relu(norm()(x)))


def test_the_gradient_of_a_normalised_layer_is_tangent_and_falls_with_the_radius():
    images, targets = random_arrays(1, (12, 4, 4, 2), (12, 2))
    net = Normalised()
    variables = jax.jit(net.init)(jax.random.key(0), images)

    @jax.jit
    @jax.grad
    def gradients(params):
        out, _ = net.apply(variables | {"params": params}, images, mutable=["batch_stats"])
        return jnp.sum((out - targets) ** 2)

    params = dict(variables["params"])
    for layer in ("conv", "hidden"):
        kernel = params[layer]["kernel"]  # with a radius of its own for each channel
        params[layer] = {"kernel": kernel * jnp.geomspace(0.1, 30, kernel.shape[-1])}
    radii = so.radius(params, channel_axes=so.by_path({"conv|hidden": -1}))
    units = params | {
        layer: {"kernel": params[layer]["kernel"] / radii[layer]["kernel"]}
        for layer in ("conv", "hidden")
    }
    grads, unit_grads = gradients(params), gradients(units)
    radial = so.radial_fraction(params, grads, channel_axes=so.by_path({"conv|hidden|head": -1}))
    for layer in ("conv", "hidden"):
        g, r = grads[layer]["kernel"], radii[layer]["kernel"]
        assert lengths(as_rows(g)).min() > 1e-3
        assert np.max(radial[layer]["kernel"]) < ROUNDING
        assert_close(g * r, unit_grads[layer]["kernel"])
    # The head, which nothing normalises, has no such gradients.
    assert np.min(radial["head"]["kernel"]) > 1e-3


# The table of effective learning rates and directions. A row names the optimizer, and what of its
# state after the step, of the gradient and the point, is the momentum a and the division b.


def coupled(tx):
    return optax.chain(optax.add_decayed_weights(DECAY), tx)


def corrected(moment, decay, count):
    return moment / (1 - decay**count)


def from_sgd(state, g, x, count):
    return g, 1.0


def from_sgd_l2(state, g, x, count):
    return g + DECAY * x, 1.0


def from_trace(state, g, x, count):
    return optax.tree.get(state, "trace"), 1.0


def from_adam(state, g, x, count):
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    return corrected(mu, 0.8, count), jnp.sqrt(corrected(nu, 0.95, count)) + 1e-3


def from_adam_s(state, g, x, count):
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    return corrected(mu, 0.8, count), jnp.sqrt(corrected(nu, 0.95, count)) + 1e-3 / D**0.5


def from_adam_srt(state, g, x, count):
    # Its state keeps the second moment times |x|².
    mu, nu = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    here = corrected(nu / jnp.sum(x * x, axis=0, keepdims=True), 0.95, count)
    return corrected(mu, 0.8, count), jnp.sqrt(here) + 1e-3 / D**0.5


ADAM = (ETA, 0.8, 0.95, 1e-3)
TABLE = {
    "sgd": (optax.sgd(ETA), from_sgd),
    "sgd_l2": (coupled(optax.sgd(ETA)), from_sgd_l2),
    "sgd_m": (optax.sgd(ETA, 0.9), from_trace),
    "sgd_m_l2": (coupled(optax.sgd(ETA, 0.9)), from_trace),
    "sgd_mrt": (so.sgd_mrt(ETA, 0.9, weight_decay=DECAY, channel_axes=-1), from_trace),
    "adam": (optax.adam(*ADAM), from_adam),
    "adam_l2": (coupled(optax.adam(*ADAM)), from_adam),
    "adam_s": (so.adam_s(*ADAM, weight_decay=DECAY, channel_axes=-1), from_adam_s),
    "adam_srt": (so.adam_srt(*ADAM, weight_decay=DECAY, channel_axes=-1), from_adam_srt),
}


def steps_of(name, count=5):
    """Point, gradient, step, momentum and division of each step on the quadratic."""
    tx, parts = TABLE[name]
    (x,) = random_arrays(2, SHAPE)
    x, state = x * jnp.array([0.5, 1.0, 4.0]), tx.init(x)
    for t in range(1, count + 1):
        g = gradient(x)
        step, state = tx.update(g, state, x)
        yield x, g, step, *parts(state, g, x, t)
        x = x + step


@pytest.mark.parametrize("name", TABLE)
def test_the_effective_learning_rate_gives_the_angle_travelled(name):
    for x, _, step, a, b in steps_of(name):
        rate = so.effective_learning_rate(ETA, x, a, b, channel_axes=-1)
        xs, moved, a = as_rows(x), as_rows(x + step), as_rows(a)
        b = np.broadcast_to(as_rows(jnp.broadcast_to(b, SHAPE)), a.shape)
        r = lengths(xs)
        c = r * a / (b / (lengths(b) / np.sqrt(D)))
        nu = r * lengths(b) / np.sqrt(D)
        ct = tangents(xs, c)
        # The table's formula, and the measured turn from x to the new point.
        expected = ETA / (r * nu) / (1 - ETA * oracle.dot(c, xs / r) / (r * nu))
        assert_close(as_rows(rate), expected)
        turn = lengths(tangents(xs, moved)) / oracle.dot(moved, xs / r)
        assert_close(as_rows(rate) * lengths(ct), turn)
        assert_close(jnp.tan(so.angle_per_step(x, step, channel_axes=-1)).ravel(), turn.ravel())
        along = tangents(xs, as_rows(step))
        assert_close(along / lengths(along), -ct / lengths(ct))


@pytest.mark.parametrize("name", ["sgd", "sgd_l2"])
def test_without_momentum_sgd_is_a_gradient_descent_on_the_unit_sphere(name):
    decay = DECAY if name == "sgd_l2" else 0.0
    for x, g, step, a, b in steps_of(name):
        r = so.radius(x, channel_axes=-1)
        rate = so.effective_learning_rate(ETA, x, a, b, channel_axes=-1)
        assert_close(rate, ETA / (r**2 * (1 - ETA * decay)))
        # c_t is the gradient at u, and so the step is x + s ~ u - rate grad f(u).
        on_sphere = gradient(x / r)
        assert_close(r * so.project_to_tangent(x, a, channel_axes=-1), on_sphere)
        moved = x + step
        descended = x / r - rate * on_sphere
        assert_close(
            moved / so.radius(moved, channel_axes=-1),
            descended / so.radius(descended, channel_axes=-1),
        )
        assert np.max(so.deformation(x, step, g, channel_axes=-1)) < ROUNDING


@pytest.mark.parametrize("name", ["adam", "adam_s"])
def test_a_division_per_element_deforms_the_gradient_and_one_per_group_does_not(name):
    # Without decay the first momentum is the gradient; what is left is the division.
    factory = {"adam": optax.adam, "adam_s": partial(so.adam_s, channel_axes=-1)}[name]
    tx, (x,) = factory(ETA), random_arrays(3, SHAPE)
    g = gradient(x)
    step, _ = tx.update(g, tx.init(x), x)
    turned = so.deformation(x, step, g, channel_axes=-1)
    assert np.min(turned) > 0.1 if name == "adam" else np.max(turned) < 1e-8


def test_transport_keeps_radial_terms_out_of_the_momentum():
    def radial(name):
        *_, (x, _, _, momentum, _) = steps_of(name)
        return so.radial_fraction(x, momentum, channel_axes=-1)

    assert np.min(radial("sgd_m")) > 0.01
    assert np.min(radial("sgd_m_l2")) > 0.01
    tx, (x,) = so.sgd_mrt(ETA, 0.9, channel_axes=-1), random_arrays(2, SHAPE)
    state = tx.init(x)
    for _ in range(5):
        step, state = tx.update(gradient(x), state, x)
        momentum = optax.tree.get(state, "trace")
        assert np.max(so.radial_fraction(x, momentum, channel_axes=-1)) < ROUNDING
        x = x + step


# Rescaling and transport.


@pytest.mark.parametrize("rescaled", [1.0, 0.7])
def test_rescaling_and_transport_is_parallel_transport_times_the_ratio_of_radii(rescaled):
    x1, m = random_arrays(5, SHAPE, SHAPE)
    m = so.project_to_tangent(x1, m, channel_axes=-1)
    x2 = rescaled * (x1 - jnp.array([0.1, 1.0, -3.0]) * m)
    ratio = so.radius(x1, channel_axes=-1) / so.radius(x2, channel_axes=-1)
    rows1, rows2, ms = map(as_rows, (x1, x2, m))
    expected = oracle.rescale_and_transport(ms, rows1, rows2)
    carried = so.parallel_transport(x1, x2, m, channel_axes=-1)
    assert_close(as_rows(ratio * carried), expected)
    assert_close(oracle.parallel_transport(ms, rows1, rows2) * as_rows(ratio), expected)
    # The one-point form, a projection where the point has arrived.
    assert_close(as_rows(so.project_to_tangent(x2, m, channel_axes=-1)) / rescaled, expected)


@pytest.mark.parametrize("name", ["trace_rt", "scale_by_adam_srt"])
def test_the_links_transport_their_moments_so(name):
    x1, m = random_arrays(6, SHAPE, SHAPE)
    m = so.project_to_tangent(x1, m, channel_axes=-1)
    args = (0.9,) if name == "trace_rt" else (0.9, 0.99)
    link = getattr(so, name)(*args, channel_axes=-1)
    update, state = link.update(m, link.init(x1), x1)
    before = optax.tree.get(state, "trace" if name == "trace_rt" else "mu")
    x2 = x1 - 0.4 * update
    _, state = link.update(jnp.zeros_like(m), state, x2)
    after = optax.tree.get(state, "trace" if name == "trace_rt" else "mu")
    square1, square2 = (so.group_inner(x, x, channel_axes=-1) for x in (x1, x2))
    carried = so.parallel_transport(x1, x2, before, channel_axes=-1)
    assert_close(after, 0.9 * jnp.sqrt(square1 / square2) * carried)
    assert np.min(so.angle(after, before, channel_axes=-1)) > 0.1
    if name == "scale_by_adam_srt":  # v <- v |x1|²/|x2|²; the state keeps it times |x|²
        v = 0.01 * so.group_inner(m, m, channel_axes=-1) / D
        assert_close(optax.tree.get(state, "nu") / square2, 0.99 * v * square1 / square2)
