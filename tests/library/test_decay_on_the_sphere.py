"""What weight decay does on the sphere: directions, AdamG*, and the equilibrium of the radius."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from invariant import SHAPE, assert_close, gradient, random_arrays
from replay import replay

ETA, DECAY = 0.05, 0.3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def coupled(tx):
    return optax.chain(optax.add_decayed_weights(DECAY), tx)


DECAYED = {
    "sgd, coupled": (optax.sgd(ETA), coupled(optax.sgd(ETA))),
    "sgd, decoupled": (
        optax.sgd(ETA),
        optax.chain(optax.sgd(ETA), optax.add_decayed_weights(-ETA * DECAY)),
    ),
    "adam, decoupled": (optax.adam(ETA), optax.adamw(ETA, weight_decay=DECAY)),
    "adam_s without momentum, coupled": (
        so.adam_s(ETA, 0.0, channel_axes=-1),
        so.adam_s(ETA, 0.0, weight_decay=DECAY, channel_axes=-1),
    ),
}


@pytest.mark.parametrize("name", DECAYED)
def test_weight_decay_does_not_change_the_direction_of_a_step(name):
    (x,) = random_arrays(7, SHAPE)
    g = gradient(x)
    plain, decayed = (tx.update(g, tx.init(x), x)[0] for tx in DECAYED[name])
    along, other = (so.project_to_tangent(x, step, channel_axes=-1) for step in (plain, decayed))
    lengths_of = [so.group_norm(v, channel_axes=-1) for v in (along, other)]
    assert_close(other / lengths_of[1], along / lengths_of[0])
    # It shortens the radius, and so lengthens the next step on the sphere.
    assert np.all(so.radius(x + decayed, channel_axes=-1) < so.radius(x + plain, channel_axes=-1))
    if name.startswith("sgd"):
        assert_close(*lengths_of)
        r2 = so.radius(x, channel_axes=-1) ** 2
        kept = (1 - ETA * DECAY) ** 2 * r2 + ETA**2 * so.group_inner(g, g, channel_axes=-1)
        after = x + decayed
        rate = so.effective_learning_rate(ETA, after, gradient(after), 1.0, channel_axes=-1)
        assert_close(rate, ETA / kept)


def test_coupled_decay_does_change_the_direction_of_adam():
    # By its division per element, so that what keeps the direction above is no triviality.
    (x,) = random_arrays(7, SHAPE)
    g = gradient(x)
    plain, decayed = (
        so.project_to_tangent(x, tx.update(g, tx.init(x), x)[0], channel_axes=-1)
        for tx in (optax.adam(ETA, 0.0), coupled(optax.adam(ETA, 0.0)))
    )
    assert np.max(so.angle(plain, decayed, channel_axes=-1)) > 0.1


# SGD with L2 is an adaptive method on the sphere.


def adam_g_star(x, eta, decay, steps, *, forget=True, accumulate=True):
    """AdamG* on the unit sphere, started as SGD with L2 is at x; its last point."""
    beta = (1 - eta * decay) ** 4
    r = np.linalg.norm(x, axis=0, keepdims=True)
    u, v = np.asarray(x) / r, r**4 / (2 * beta**0.5 * eta**2)
    for _ in range(steps):
        g = np.asarray(gradient(u))
        y = u - (2 * beta) ** -0.5 * g / np.sqrt(v)
        u = y / np.linalg.norm(y, axis=0)
        v = (beta if forget else 1) * v + accumulate * np.sum(g * g, axis=0, keepdims=True)
    return u


def distances(steps_at, **change):
    """Between SGD with L2 and AdamG* after a number of steps, as η is halved thrice."""
    (x,) = random_arrays(4, SHAPE)
    x *= 2 / np.linalg.norm(x, axis=0)
    result = []
    for eta in (0.02, 0.01, 0.005, 0.0025):
        tx = coupled(optax.sgd(eta))
        end = replay(tx, x, [gradient] * steps_at(eta))[-1]
        end = np.asarray(end / jnp.linalg.norm(end, axis=0))
        other = adam_g_star(x, eta, DECAY, steps_at(eta), **change)
        result.append(np.linalg.norm(end - other))
    return np.array(result)


def order(distances):
    """The power of η with which the distances fall, from the last halving."""
    return round(np.log2(distances[-2] / distances[-1]))


def test_sgd_with_l2_follows_adam_g_star_at_second_order():
    """Halving η at least quarters the distance after a fixed number of steps.

    Held fixed: the function, λ, the first point with its radius, and the number of steps. AdamG*
    drops of the recursion of r⁴ the term η⁴ |grad f|⁴/r⁴ alone, so that its rate is off by η⁵ and
    a halving divides the distance by 32; by 8 if the time, η times the number of steps, is held
    fixed instead.
    """
    fixed_steps = distances(lambda eta: 10)
    assert fixed_steps[0] > 1e-7 and fixed_steps[-1] > 1e-12  # not zero, and above rounding
    assert np.all(fixed_steps[:-1] / fixed_steps[1:] >= 4)
    assert order(fixed_steps) == 5

    fixed_time = distances(lambda eta: round(0.8 / eta))
    assert np.all(fixed_time[:-1] / fixed_time[1:] >= 4)
    assert order(fixed_time) == 3


@pytest.mark.parametrize("part, expected", [("forget", 2), ("accumulate", 3)])
def test_each_part_of_adam_g_star_is_needed(part, expected):
    # Without it the distance is larger, and falls with a lower power of η.
    without = distances(lambda eta: 10, **{part: False})
    assert np.all(without > 100 * distances(lambda eta: 10))
    assert order(without) == expected


# The equilibrium of decay and steps: name, optimizer, predicted angle, and the radius where it is,
# for gradients of length 1 on the unit sphere.

MOMENTUM, DAMPENING, STEP_DECAY = 0.8, 0.4, 0.004  # η λ
EQUILIBRIA = {
    "sgd": (coupled(optax.sgd(STEP_DECAY / DECAY)), 1.0),
    "sgd_m": (coupled(optax.sgd(STEP_DECAY / DECAY, MOMENTUM)), 1 / (1 + MOMENTUM)),
    "sgd_mrt, dampened": (
        so.sgd_mrt(
            *(STEP_DECAY / DECAY, MOMENTUM),
            dampening=DAMPENING,
            weight_decay=DECAY,
            channel_axes=-1,
        ),
        1 - DAMPENING,
    ),
    "adamw": (
        optax.adamw(STEP_DECAY / DECAY, 0.8, 0.99, weight_decay=DECAY),
        (1 - 0.8) / (1 + 0.8),
    ),
}


@pytest.mark.parametrize("name", EQUILIBRIA)
def test_the_equilibrium_angle_does_not_depend_on_the_gradients(name):
    """sqrt(2 η λ) per step for SGD, and that times the root of what the momentum leaves.

    This share is 1/(1 + μ) for SGD with momentum and coupled decay, and (1 - b1)/(1 + b1) for AdamW
    (Kosson et al. 2023). With transport the buffer keeps of its past only tangent parts: the decay
    of a step acts once, as η λ (1 - dampening) x, and |step|² = 2 η λ (1 - dampening) |x|² balances
    it. Gradients are random and tangent, and longer at a smaller radius.
    """
    tx, share = EQUILIBRIA[name]
    sizes = jnp.array([0.5, 1.0, 2.0, 4.0])

    def step(carry, key):
        x, state = carry
        g = so.project_to_tangent(x, jax.random.normal(key, x.shape), channel_axes=-1)
        g = sizes * g / so.group_norm(g, channel_axes=-1) / so.radius(x, channel_axes=-1)
        updates, state = tx.update(g, state, x)
        return (x + updates, state), so.angle_per_step(x, updates, channel_axes=-1)

    x = jax.random.normal(jax.random.key(0), (200, 4))
    x /= so.radius(x, channel_axes=-1)
    keys = jax.random.split(jax.random.key(1), 1500)
    run = jax.jit(lambda x: jax.lax.scan(step, (x, tx.init(x)), keys)[1])
    angles = np.asarray(run(x)[-500:]).mean(axis=0)
    predicted = np.sqrt(2 * STEP_DECAY * share)
    np.testing.assert_allclose(angles.mean(), predicted, rtol=0.02)
    # Each sphere has it, although the gradients of the last are eight times those of the first.
    np.testing.assert_allclose(angles, np.full((1, 4), predicted), rtol=0.1)
