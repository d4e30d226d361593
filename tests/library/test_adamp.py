"""AdamP, SGDP, and the links beside them; trajectories of the peers are in `test_relatives.py`."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from layouts import random_arrays

pytestmark = pytest.mark.usefixtures("compiled_quickly")
FACTORIES = [so.adamp, so.sgdp]


@pytest.mark.parametrize("factory", FACTORIES)
def test_decay_is_weaker_where_the_direction_is_projected(factory):
    x, g = jnp.array([3.0, 4.0]), jnp.array([-4.0, 3.0])  # tangent
    scale = 1.0 if factory is so.adamp else 1 / (1 - 0.9)
    moved = []
    for axes in ((), None):
        tx = factory(0.1, weight_decay=0.5, channel_axes=axes)
        updates, _ = tx.update(g, tx.init(x), x)
        moved.append(so.group_inner(updates, x, channel_axes=())[0])
    # -learning_rate weight_decay |x|², a tenth of it if projected; Adam's first step is a sign.
    sign = jnp.sum(jnp.sign(g) * x) if factory is so.adamp else 0.0
    expected = [-0.1 * 0.1 * 0.5 * 25 * scale, -0.1 * (0.5 * 25 * scale + sign)]
    np.testing.assert_allclose(moved, expected, rtol=1e-5)


def test_without_groups_they_are_adamw_and_decoupled_sgd():
    x, *grads = random_arrays((4, 3), 4, "float32")
    pairs = [
        (so.adamp(0.1, weight_decay=0.2, channel_axes=None), optax.adamw(0.1, weight_decay=0.2)),
        (so.sgdp(0.1, channel_axes=None), optax.sgd(0.1, 0.9)),
        (so.sgdp(0.1, nesterov=True, channel_axes=None), optax.sgd(0.1, 0.9, nesterov=True)),
        (
            so.sgdp(0.1, dampening=0.25, channel_axes=None),
            optax.chain(optax.scale(0.75), optax.sgd(0.1, 0.9)),
        ),
    ]
    for mine, theirs in pairs:
        a, b, states = x, x, [mine.init(x), theirs.init(x)]
        for g in grads:
            updates, states[0] = mine.update(g, states[0], a)
            a = optax.apply_updates(a, updates)
            updates, states[1] = theirs.update(g, states[1], b)
            b = optax.apply_updates(b, updates)
        np.testing.assert_allclose(a, b, rtol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_projected_parameters_are_on_their_spheres(dtype):
    params = {"w": jnp.ones((4, 3), dtype).at[:, 0].set(0), "b": jnp.ones(3, dtype)}
    out = so.project_to_sphere(params, 3.0, channel_axes=-1)
    assert out["w"].dtype == dtype and not out["w"][:, 0].any()
    np.testing.assert_array_equal(out["b"], params["b"])
    norms = so.group_norm(out["w"], channel_axes=-1)
    np.testing.assert_allclose(norms, [[0, 3, 3]], rtol=1e-6 if dtype == "float32" else 4e-3)


def test_the_angles_of_equilibrium_take_schedules():
    rates = jnp.array([1e-3, 1e-4])
    np.testing.assert_allclose(
        so.equilibrium_angle(rates, 0.1, b1=0.9), np.sqrt(2 * rates * 0.1 * 0.1 / 1.9), rtol=1e-6
    )
    # Lion without momentum is the sign of the gradient, of length sqrt(d).
    lion = so.equilibrium_angle_of_lion(rates, 0.1, b1=0.0)
    np.testing.assert_allclose(lion, np.sqrt(np.pi * rates * 0.1), rtol=1e-6)
    for angle in (so.equilibrium_angle_of_sgd(rates, 0.1, momentum=0.0),
                  so.equilibrium_angle_of_sgd_mrt(rates, 0.1)):  # fmt: skip
        np.testing.assert_allclose(angle, np.sqrt(2 * rates * 0.1), rtol=1e-6)


def test_parameters_may_have_the_names_of_a_state():
    params = {"nu": jnp.ones((3, 2)), "count": jnp.ones(3)}
    tx = so.adamp(0.1, nesterov=True, channel_axes=None)
    assert tx.update(params, tx.init(params), params) is not None
