"""The predicted angle per step against steps with random gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spherical_optax as so
from images import recipes
from plot_geometry import predicted_angle


def test_numbers_of_a_compiled_function_may_be_constants():
    rate = jnp.asarray(1e-3)
    angle = jax.jit(lambda decay: so.equilibrium_angle(rate, decay))(0.1)
    assert float(angle) == pytest.approx(float(so.equilibrium_angle(1e-3, 0.1)), rel=1e-6)


def walk(
    optimizer: str, recipe: recipes.Recipe, learning_rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """Angles per step and radii [1500, 8] of 8 spheres under random gradients, in float64.

    The optimizer is the trainer's own. Gradients are as of radially invariant weights: tangent and
    inversely proportional to the radius; their size differs from sphere to sphere.
    """
    steps, shape = 1500, (200, 8)
    sizes = np.geomspace(0.3, 3, 8)
    with jax.enable_x64(True):
        tx = recipes.make_optimizer(optimizer, recipe, learning_rate)

        def step(carry, key):
            x, state = carry
            r = jnp.linalg.norm(x, axis=0)
            u = x / r
            g = jax.random.normal(key, shape)
            g = sizes / r * (g - jnp.sum(g * u, axis=0) * u)
            updates, state = tx.update({"conv": g}, state, {"conv": x})
            y = x + updates["conv"]
            chord = jnp.linalg.norm(u - y / jnp.linalg.norm(y, axis=0), axis=0)
            return (y, state), (2 * jnp.arcsin(chord / 2), r)

        keys = jax.random.split(jax.random.key(0), 1 + steps)
        x = jax.random.normal(keys[0], shape) / 3
        run = jax.jit(lambda *start: jax.lax.scan(step, start, keys[1:])[1])
        angles, radii = run(x, tx.init({"conv": x}))
    assert angles.dtype == "float64"
    return np.asarray(angles), np.asarray(radii)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgdmrt"])
def test_the_prediction_is_the_angle_of_random_gradients(optimizer):
    rate, decay = (0.02, 0.1) if optimizer == "adamw" else (0.1, 0.02)
    recipe = recipes.Recipe(rate, decay, b1=0.8, b2=0.99, momentum=0.8)
    angles, radii = walk(optimizer, recipe, rate)
    # A balance is reached: the radii have stopped, up to fluctuations.
    np.testing.assert_allclose(radii[500:1000].mean(), radii[1000:].mean(), rtol=0.03)
    predicted = predicted_angle(optimizer, recipe, rate)
    # On each sphere: the size of the gradients has no say. Of 500 steps the mean fluctuates like
    # the radius; momenta of other optimizers would be wrong by a factor of 1.3 or more.
    np.testing.assert_allclose(angles[1000:].mean(axis=0), predicted, rtol=0.05)


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_no_prediction_without_decay_or_with_one_that_the_gradients_scale(optimizer):
    rates = np.array([0.1, 0.01])
    recipe = recipes.Recipe(learning_rate=0.1, weight_decay=0.01)
    assert predicted_angle(optimizer, recipe._replace(weight_decay=0.0), rates) is None
    angles = predicted_angle(optimizer, recipe, rates)
    if optimizer in ("adamw", "rotational", "sgd", "sgdmrt"):
        np.testing.assert_allclose(angles[0] / angles[1], np.sqrt(10), rtol=1e-12)
    else:
        assert angles is None


def test_the_predictions_are_the_librarys_angles():
    rates = np.array([0.1, 0.01])
    recipe = recipes.Recipe(0.1, 0.02, b1=0.8, momentum=0.7)
    expected = {
        "adamw": so.equilibrium_angle(rates, 0.02, b1=0.8),
        "rotational": so.equilibrium_angle(rates, 0.02, b1=0.8),
        "sgd": so.equilibrium_angle_of_sgd(rates, 0.02, momentum=0.7),
        "sgdmrt": so.equilibrium_angle_of_sgd_mrt(rates, 0.02),
    }
    for name, angle in expected.items():
        np.testing.assert_allclose(predicted_angle(name, recipe, rates), angle, rtol=1e-6)
