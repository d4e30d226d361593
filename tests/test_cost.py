"""What the compiled updates move through memory, by XLA's own count on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2), reason="this XLA writes the products of sums to memory"
)
AXES = so.by_path({"conv": -1})
# Two leaves of one shape: XLA may merge what they share into an array of its own.
SHAPES = {"conv1": (3, 3, 64, 128), "conv2": (3, 3, 64, 128), "scale": (128,), "head": (128, 10)}


def compiled(tx):
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(tx.init, params)

    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    return jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()


@pytest.mark.parametrize(
    "name, most",  # in passes over the parameters, and 1 % for the numbers per group
    [
        # adam reads or writes 12 times: 4 for mu, 4 for nu, 4 for x.
        ("adam_s", 9),  # 2 for the sum, 4 for mu, 3 for x
        ("adam_srt", 12),  # 5 for three sums, 4 for mu, 3 for x
        ("sgd_mrt", 10),  # 3 for two sums, 4 for the momentum, 3 for x
    ],
)
def test_an_update_passes_over_memory_no_more_than_it_must(name, most):
    program = compiled(getattr(so, name)(0.1, weight_decay=0.01, channel_axes=AXES))
    nbytes = 4 * sum(np.prod(shape) for shape in SHAPES.values())
    assert program.cost_analysis()["bytes accessed"] <= 1.01 * most * nbytes
    assert program.memory_analysis().temp_size_in_bytes <= 0.02 * nbytes


def test_adam_srt_moves_as_much_as_adam():
    adam = optax.chain(optax.add_decayed_weights(0.01), optax.adam(0.1))
    ours = so.adam_srt(0.1, weight_decay=0.01, channel_axes=AXES)
    moved = [compiled(tx).cost_analysis()["bytes accessed"] for tx in (adam, ours)]
    assert moved[1] <= 1.01 * moved[0]
