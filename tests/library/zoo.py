"""Small networks of many kinds of layers, and which of their kernels must be invariant, and how."""

import jax
import jax.numpy as jnp
import numpy as np

import spherical_optax as so

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(8, 6, 6, 2)), jnp.float32)
SIGNS = jnp.asarray(RNG.choice([-1, 1], size=(16, 256)), jnp.float32)


def weights(*shape):
    fan_in = np.prod(shape[:-1])
    return jnp.asarray(RNG.normal(size=shape) / np.sqrt(fan_in), jnp.float32)


def normalise(x, axes):
    x = x - x.mean(axes, keepdims=True)
    return x / jnp.sqrt((x**2).mean(axes, keepdims=True) + 1e-5)


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(p):
    y = normalise(convolve(IMAGES, p["kernel"]) + p["bias_before"], (0, 1, 2))
    y = jax.nn.relu(y * p["scale"] + p["bias"])
    return jnp.tanh(normalise(convolve(y, p["kernel_1x1"]), (0, 1, 2))) @ p["head"]


def instance_norm(p):
    y = normalise(convolve(IMAGES, p["kernel"]), (1, 2))
    return (y * jnp.arange(36).reshape(6, 6, 1) / 36).clip(0).mean((1, 2)) @ p["head"]


def layer_norm(p):
    return jnp.tanh(normalise(X @ p["kernel"], -1) * p["scale"]) @ p["head"]


def group_norm(p):
    y = normalise((X @ p["kernel"]).reshape(-1, 2, 4), -1)
    z = normalise(jnp.einsum("ni,igc->ngc", X, p["by_group"]), -1)
    return jnp.tanh(jnp.concatenate([y, z], -1).reshape(16, -1)) @ p["head"]


def homogeneous(p):
    y = jax.nn.relu(X @ p["first"]) @ p["second"]
    return jnp.tanh(normalise(y, 0)) @ p["head"]


def deep_relu(p):
    y = X @ p["first"]
    for kernel in p["kernels"]:
        y = jax.nn.relu(y) @ kernel
    return jnp.mean(y * SIGNS)  # the radial part of the gradient is this mean, which is small


def dead(p):
    off = jax.nn.relu(X @ p["off"] - 1e3)
    return off @ p["after"] + jnp.sum(p["lengths"] ** 2)  # depends on lengths, not on directions


def scanned(p):
    def layer(y, kernel):
        return y + jax.nn.relu(normalise(y @ kernel, 0)), None

    return jax.lax.scan(layer, X, p["kernels"])[0] @ p["head"]


def clipped(p):
    return X @ (p["kernel"] / jnp.maximum(1, jnp.linalg.norm(p["kernel"])))


def embedding(p):
    tokens = jnp.arange(16) % 8
    return jnp.tanh(normalise(p["table"][tokens], -1)) @ p["head"]


def attend(y, query, key):
    """Attention with normalised queries and keys."""

    def by_head(kernel):
        z = jnp.tensordot(y, kernel, 1).reshape(16, HEADS if kernel.ndim == 2 else 4, -1)
        return z / jnp.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)

    scores = jax.nn.softmax(jnp.einsum("nhd,mhd->hnm", by_head(query), by_head(key)))
    mixed = jnp.einsum("hnm,mc->hnc", scores, y)
    return y + jnp.tensordot(jnp.arange(1.0, 1 + len(mixed)), mixed, 1) / len(mixed)


def flat_heads(p):
    return jnp.tanh(attend(X, p["query"], p["key"])) @ p["head"]


def scanned_heads(p):
    y = jnp.tanh(X @ p["first"])
    y = jax.lax.scan(lambda y, layer: (attend(y, *layer), None), y, (p["query"], p["key"]))[0]
    return jnp.tanh(y) @ p["head"]


def group_norm_after_convolution(p):
    y = convolve(IMAGES, p["kernel"]).reshape(8, 6, 6, 4, 2)
    return jax.nn.relu(normalise(y, (1, 2, 4))).reshape(8, 36, 8).mean(1) @ p["head"]


def one_pixel(p):
    y = normalise(convolve(IMAGES[:, :1, :1], p["kernel"]), (0, 1, 2))
    return jax.nn.relu(y).mean((1, 2)) @ p["head"]


def with_bias(p):
    y = normalise(X @ p["dense"]["kernel"] + p["dense"]["bias"], -1)
    return jnp.tanh(y) @ p["out"]["kernel"] + p["out"]["bias"]


HEADS = 6
ZOO = {
    "batch_norm": (
        batch_norm,
        {
            "kernel": weights(3, 3, 2, 4),
            "bias_before": jnp.zeros(4),
            "scale": jnp.ones(4),
            "bias": jnp.zeros(4),
            "kernel_1x1": weights(1, 1, 4, 5),
            "head": jnp.zeros((5, 2)),  # all before it is dead at the start
        },
    ),
    "instance_norm": (instance_norm, {"kernel": weights(3, 3, 2, 4), "head": weights(4, 2)}),
    "layer_norm": (
        layer_norm,
        {"kernel": weights(6, 8), "scale": jnp.ones(8), "head": weights(8, 2)},
    ),
    "group_norm": (
        group_norm,
        {"kernel": weights(6, 8), "by_group": weights(6, 2, 4), "head": weights(16, 2)},
    ),
    "homogeneous": (
        homogeneous,
        {"first": weights(6, 8), "second": weights(8, 8), "head": weights(8, 2)},
    ),
    "deep_relu": (
        deep_relu,
        {"first": weights(6, 256), "kernels": [weights(256, 256), weights(256, 256)]},
    ),
    "dead": (dead, {"off": weights(6, 4), "after": weights(4, 2), "lengths": weights(3, 3)}),
    "scanned": (
        scanned,
        {"kernels": jnp.stack([weights(6, 6) for _ in range(3)]), "head": weights(6, 2)},
    ),
    "clipped": (clipped, {"kernel": 1.6 * weights(6, 1) / jnp.linalg.norm(weights(6, 1))}),
    "embedding": (embedding, {"table": weights(10, 6), "head": weights(6, 2)}),  # two are unused
    "flat_heads": (
        flat_heads,
        {"query": weights(6, 12), "key": weights(6, 12), "head": weights(6, 2)},
    ),
    "scanned_flat_heads": (
        scanned_heads,
        {
            "first": weights(6, 6),
            "query": weights(2, 6, 12),
            "key": weights(2, 6, 12),
            "head": weights(6, 2),
        },
    ),
    "scanned_heads": (
        scanned_heads,
        {
            "first": weights(6, 64),
            "query": weights(2, 64, 4, 16),
            "key": weights(2, 64, 4, 16),
            "head": weights(64, 2),
        },
    ),
    "group_norm_after_convolution": (
        group_norm_after_convolution,
        {"kernel": weights(3, 3, 2, 8), "head": weights(8, 2)},
    ),
    "one_pixel": (one_pixel, {"kernel": weights(3, 3, 2, 4), "head": weights(4, 2)}),
    "with_bias": (
        with_bias,
        {
            "dense": {"kernel": weights(6, 8), "bias": jnp.zeros(8)},
            "out": {"kernel": weights(8, 2), "bias": jnp.zeros(2)},
        },
    ),
}
INVARIANT = {
    "batch_norm/kernel": -1,
    "batch_norm/kernel_1x1": -1,
    "instance_norm/kernel": -1,
    "layer_norm/kernel": (),
    "group_norm/kernel": so.blocks(-1, 2),
    "group_norm/by_group": -2,
    "homogeneous/first": (),
    "homogeneous/second": -1,
    "scanned/kernels": (0, -1),
    "embedding/table": -2,
    "flat_heads/query": so.blocks(-1, HEADS),
    "flat_heads/key": so.blocks(-1, HEADS),
    "scanned_flat_heads/query": so.blocks(-1, HEADS, channel_axes=(0,)),
    "scanned_flat_heads/key": so.blocks(-1, HEADS, channel_axes=(0,)),
    "scanned_heads/query": (0, -2),
    "scanned_heads/key": (0, -2),
    "group_norm_after_convolution/kernel": so.blocks(-1, 4),
    "one_pixel/kernel": -1,  # and not each of its taps, of which one matters
}
UNDECIDED = {"batch_norm/bias_before", "dead/off", "dead/after"}
ZOO_PARAMS = {name: params for name, (_, params) in ZOO.items()}


def zoo_loss(params, target):
    # All networks in one program; the target makes each depend on its scales.
    return sum(
        jnp.mean((network(params[name]) - target) ** 2) for name, (network, _) in ZOO.items()
    )
