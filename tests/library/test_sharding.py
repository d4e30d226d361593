"""Parameters with specs, such as Linen's: how the optimizer's state comes to its devices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import spherical_optax as so

AXES = so.by_path({"hidden/kernel": -1, "query/kernel": so.blocks(-1, 2)})
OPTIMIZERS = {
    "adam_srt": so.adam_srt(0.1, weight_decay=0.01, channel_axes=AXES),
    "adam_g": so.adam_g(0.1, channel_axes=AXES),
    "reproject": optax.chain(optax.adam(0.1), so.reproject_to_sphere(channel_axes=AXES)),
}


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        def dense(features, name, *names):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), names)
            return nn.Dense(features, use_bias=False, kernel_init=init, name=name)

        x = dense(8, "hidden", "data", "model")(x)
        return dense(8, "query", None, "model")(x)


def place(mesh):
    def fit(leaf, spec):
        # A number per group has no part of an axis that the group spans, nor of a block.
        sizes = [mesh.shape[name] if name else 1 for name in spec]
        names = [name if n % size == 0 else None
                 for n, size, name in zip(leaf.shape, sizes, spec, strict=False)]  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*names))

    return fit


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_specs_of_parameters_place_the_state(name, kind):
    tx, mesh = OPTIMIZERS[name], jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    boxed = Net().init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    specs, params = nn.get_partition_spec(boxed), nn.unbox(boxed)
    grads = jax.tree.map(jnp.cos, params)
    whole, plain_state = params, tx.init(params)
    for _ in range(3):
        updates, plain_state = tx.update(grads, plain_state, whole)
        whole = optax.apply_updates(whole, updates)

    shardings = optax.tree.map_params(
        tx,
        place(mesh),
        jax.eval_shape(tx.init, params),
        specs,
        transform_non_params=lambda leaf: NamedSharding(mesh, PartitionSpec()),
    )
    of_params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    params, grads = jax.device_put((params, grads), (of_params, of_params))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    # Without specs, init puts what it makes to where the parameters are.
    for mine, own in zip(*map(jax.tree.leaves, (state, tx.init(params))), strict=True):
        if mine.ndim == 2:
            assert own.sharding.is_equivalent_to(mine.sharding, 2)
    step = jax.jit(tx.update, out_shardings=(of_params, shardings))
    for _ in range(3):
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    # float32 sums in another order
    chex.assert_trees_all_close(jax.device_get(params), jax.device_get(whole), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(*map(jax.device_get, (state, plain_state)), rtol=1e-5, atol=1e-6)


MIXED = {
    "adam_srt": so.adam_srt(0.1, weight_decay=0.01, channel_axes=-1),
    "adam_g": so.adam_g(0.1, channel_axes=-1),
    "sgd_mrt": so.sgd_mrt(0.1, channel_axes=-1),
    "adamp": so.adamp(0.1, channel_axes=-1),
    "rotational": so.rotational(optax.trace(0.9), 0.1, channel_axes=-1),
    "with_geometry": so.with_geometry(optax.adam(0.1), channel_axes=-1),
}
X = jnp.arange(1.0, 33.0).reshape(4, 8)
G = jnp.cos(X)


@pytest.mark.parametrize("name", MIXED)
def test_gradients_may_be_sharded_where_parameters_are_not(name):
    tx, mesh = MIXED[name], jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    state = tx.init(X)
    expected, _ = jax.jit(tx.update)(G, state, X)
    with jax.set_mesh(mesh):
        x, state = jax.device_put((X, state), PartitionSpec())
        g = jax.device_put(G, PartitionSpec("data"))
        updates, _ = jax.jit(tx.update)(g, state, x)
    chex.assert_trees_all_close(jax.device_get(updates), expected, rtol=1e-4)


@pytest.mark.parametrize("name", MIXED)
def test_devices_may_step_from_common_parameters_by_their_own_gradients(name):
    tx, mesh = MIXED[name], jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    grads, state = jnp.stack([G, jnp.sin(X)]), tx.init(X)

    def update(grads, state, x):
        return tx.update(grads[0], state, x)[0][None]

    whole, own = PartitionSpec(), PartitionSpec("data")
    found = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(own, whole, whole), out_specs=own))(
        grads, state, X
    )
    for i in range(2):
        expected, _ = tx.update(grads[i], state, X)
        chex.assert_trees_all_close(found[i], expected, rtol=1e-4)
