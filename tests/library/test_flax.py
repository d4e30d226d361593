"""NNX and Linen: the same selection, the same trajectory, and the size of the state."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import spherical_optax as so
from images import models

pytestmark = pytest.mark.usefixtures("compiled_quickly")

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 6, 3)), jnp.float32)
LABELS = jnp.arange(8) % 2
AXES = so.by_path({r"conv\d/kernel": -1})
OPTIMIZERS = {
    "adam_srt": so.adam_srt(0.01, weight_decay=0.01, channel_axes=AXES),
    "adam_g": so.adam_g(0.01, weight_decay=0.01, channel_axes=AXES),
    "sgd_mrt": so.sgd_mrt(0.01, weight_decay=0.01, channel_axes=AXES),
    "partition": optax.partition(
        {"spherical": so.adam_srt(0.01, channel_axes=AXES), "classic": optax.sgd(0.1)},
        so.path_labels(AXES),
    ),
    "masked": optax.chain(
        optax.scale_by_adam(),
        optax.masked(so.project_to_tangent_space(channel_axes=AXES), so.path_mask(AXES)),
        optax.scale_by_learning_rate(0.01),
        so.reproject_to_sphere(channel_axes=AXES),
    ),
}


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.conv2 = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = nnx.LayerNorm(4, rngs=rngs)
        self.norm2 = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm1(self.conv1(x)))
        return self.head(nnx.relu(self.norm2(self.conv2(x))).mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm(name="norm1")(nn.Conv(4, (3, 3), use_bias=False, name="conv1")(x)))
        x = nn.relu(nn.LayerNorm(name="norm2")(nn.Conv(4, (3, 3), use_bias=False, name="conv2")(x)))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


@nnx.jit
def nnx_gradients(model):
    return nnx.grad(lambda model: cross_entropy(model(IMAGES)))(model)


@jax.jit
@jax.grad
def linen_gradients(params):
    return cross_entropy(LinenNet().apply({"params": params}, IMAGES))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_and_linen_give_the_same_trajectory(name):
    tx = OPTIMIZERS[name]
    model = NNXNet(nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx_update = nnx.jit(lambda optimizer, model, grads: optimizer.update(model, grads))
    state = TrainState.create(apply_fn=LinenNet().apply, params=params, tx=tx)
    linen_update = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for _ in range(5):
        nnx_update(optimizer, model, nnx_gradients(model))
        state = linen_update(state, linen_gradients(state.params))
    ours = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    # LayerNorm and the sums of the two are compiled on their own: float32 rounding, five steps.
    chex.assert_trees_all_close(ours, state.params, rtol=1e-4, atol=1e-5)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), ours, params)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_the_two_trees_of_nnx_have_the_same_paths():
    variables = nnx.state(NNXNet(nnx.Rngs(0)), nnx.Param)
    arrays = nnx.as_pure(variables)
    assert jax.tree.structure(variables) != jax.tree.structure(arrays)  # why paths are names
    table = so.describe(arrays, AXES)
    assert so.describe(variables, AXES) == table
    assert "conv1/kernel  3×3×3×4  4 × 27" in table


def nbytes(tx, params):
    return sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(tx.init, params))
    )


def test_adam_srt_keeps_half_of_the_state_of_adam_on_a_resnet18():
    model = nnx.eval_shape(lambda: models.resnet18(100, rngs=nnx.Rngs(0)))
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    axes = so.by_path({"conv": -1})
    adam = nbytes(optax.adam(1e-3), params)
    assert 0.50 < nbytes(so.adam_srt(1e-3, channel_axes=axes), params) / adam <= 0.51
    assert nbytes(so.adam_s(1e-3, channel_axes=axes), params) / adam <= 0.51
    half = so.adam_srt(1e-3, channel_axes=axes, mu_dtype=jnp.bfloat16)
    assert nbytes(half, params) / adam <= 0.26
    momentum = nbytes(optax.sgd(0.1, 0.9), params)
    assert nbytes(so.sgd_mrt(0.1, channel_axes=axes), params) == momentum
