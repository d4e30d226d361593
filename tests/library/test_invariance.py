"""Radial invariance as measured, against what the mathematics of small networks says."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from images import models
from tiny import Tiny
from zoo import (
    INVARIANT,
    RNG,
    UNDECIDED,
    ZOO_PARAMS,
    X,
    group_norm,
    layer_norm,
    normalise,
    weights,
    with_bias,
    zoo_loss,
)

LABELS = jnp.arange(8) % 4
TOLERANCE = 1e-2


def normalised_loss(params, x):
    """Invariant per column of `kernel`; of `head` in nothing."""
    return jnp.mean((jnp.tanh(normalise(x @ params["kernel"], 0)) @ params["head"] - 1) ** 2)


SMALL = {"kernel": weights(6, 5), "head": weights(5, 3)}


@pytest.fixture(scope="module")
def of_zoo(compiled_quickly):
    return so.find_invariant_groups(zoo_loss, ZOO_PARAMS, 0.5)


@pytest.fixture(scope="module")
def of_small(compiled_quickly):
    return so.find_invariant_groups(normalised_loss, SMALL, X)


def test_it_finds_what_the_mathematics_says(of_zoo):
    found = of_zoo
    assert {leaf.path: leaf.axes for leaf in found.leaves if leaf.axes is not None} == INVARIANT
    undecided = {leaf.path for leaf in found.leaves if leaf.verdict == "undecided"}
    assert undecided == UNDECIDED
    rescaled = set()
    for leaf in found.leaves:
        if leaf.verdict == "invariant":
            assert leaf.path in INVARIANT
            assert max(leaf.radial, leaf.rescaling) < TOLERANCE / 3, leaf
        elif leaf.path not in UNDECIDED:
            assert leaf.verdict == "not invariant"
            assert leaf.rescaling is None or leaf.rescaling > 3 * TOLERANCE, leaf
            rescaled |= {leaf.path} if leaf.rescaling else set()
    # By its radial derivative alone this would be invariant.
    assert "deep_relu/kernels/1" in rescaled


def test_a_kernel_that_is_invariant_only_with_its_bias(of_zoo):
    with_bias = {leaf.path: leaf.with_bias for leaf in of_zoo.leaves if leaf.with_bias}
    assert with_bias == {"with_bias/dense/kernel": "with_bias/dense/bias"}
    text = of_zoo.evidence("with_bias/dense/kernel")
    assert text.startswith("invariant only with its bias; use_bias=False would put it on a sphere")
    assert text.split(" (")[0] in so.describe(ZOO_PARAMS, of_zoo)
    assert of_zoo.evidence("with_bias/out/kernel").startswith("not invariant (")


def test_rules_select_what_was_found(of_zoo):
    rules = of_zoo.rules()
    assert eval(repr(rules), {"so": so}) == rules
    pasted = so.by_path(rules)
    assert {leaf.path: pasted(leaf.path, None) for leaf in of_zoo.leaves} == {
        leaf.path: leaf.axes for leaf in of_zoo.leaves
    }
    for mask in map(so.path_mask, (pasted, of_zoo)):
        assert sum(jax.tree.leaves(mask(ZOO_PARAMS))) == len(INVARIANT)


def test_rules_are_of_one_path_each():
    params = {"a.b": {"w+": jnp.ones((2, 2))}, "aXb": {"w+": jnp.ones((2, 2))}}
    params["aXb"]["w+1"] = jnp.ones((2, 2))
    one = so.InvariantGroups((so.Evidence("a.b/w+", (), "invariant"),))
    mask = so.path_mask(so.by_path(one.rules()))(params)
    assert mask == {"a.b": {"w+": True}, "aXb": {"w+": False, "w+1": False}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wide", [False, True])
def test_strict_dtype_promotion(dtype, wide):
    def loss(params, x):
        y = jnp.dot(x, params["kernel"].astype(x.dtype))
        y = y / jnp.sqrt(jnp.sum(y * y))
        return jnp.mean(jnp.tanh(y)).astype(dtype)

    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        found = so.find_invariant_groups(loss, {"kernel": SMALL["kernel"]}, X)
    assert found("kernel", None) == ()


def test_what_is_found_is_a_selection(of_small):
    found = of_small
    assert hash(found) == hash(type(found)(found.leaves))
    grads = jax.tree.map(jnp.cos, SMALL)
    updates = []
    for axes in (found, so.by_path({"kernel": -1})):
        tx = so.adam_srt(0.1, channel_axes=axes)
        updates.append(tx.update(grads, tx.init(SMALL), SMALL)[0])
    jax.tree.map(np.testing.assert_array_equal, *updates)
    head, kernel = map(str, found.leaves)
    assert kernel.startswith("invariant (radial ") and ", rescaling " in kernel
    assert head.startswith("not invariant (radial ")
    assert so.describe(SMALL, found).splitlines() == [
        "path    shape  groups × dimension  measured",
        f"head    5×3    classic             {head}",
        f"kernel  6×5    5 × 6               {kernel}",
        "2 leaves, 45 parameters, 66.7 % of them on spheres",
    ]
    with pytest.raises(ValueError, match="^new: not measured"):
        so.adam_srt(0.1, channel_axes=found).init({"new": jnp.ones((2, 2))})


def test_a_wrong_selection_warns():
    axes = so.by_path({"kernel": -1, "head": -1, "unused": ()})
    with pytest.warns(UserWarning) as caught:
        found = so.check_selection(
            normalised_loss, SMALL | {"unused": jnp.ones(3)}, X, channel_axes=axes
        )
    head, unused = sorted(str(warning.message) for warning in caught)
    assert head.startswith("head: ") and "its length changes the loss" in head
    assert unused.startswith("unused: ") and "by less than rounding" in unused
    assert {warning.filename for warning in caught} == {__file__}
    assert {leaf.path: leaf.axes for leaf in found.leaves} == {
        "kernel": -1, "head": None, "unused": None
    }  # fmt: skip


def test_a_wrong_selection_is_told_what_holds():
    def loss(params, target):
        return jnp.mean((layer_norm(params) + with_bias(params) - target) ** 2)

    params = ZOO_PARAMS["layer_norm"] | ZOO_PARAMS["with_bias"]
    axes = so.by_path({"dense/kernel": (), "^kernel": -1})
    with pytest.warns(UserWarning) as caught:
        found = so.check_selection(loss, params, 0.5, channel_axes=axes)
    dense, kernel = sorted(str(warning.message) for warning in caught)
    but = "spherical in channel_axes, but its length changes the loss:"
    assert dense.startswith(f"dense/kernel: {but} invariant only with its bias; use_bias=False ")
    assert kernel.startswith(f"kernel: {but} not invariant (")
    assert kernel.endswith("; invariant as ()")
    assert {leaf.path: leaf.instead for leaf in found.leaves if leaf.instead is not None} == {
        "kernel": ()
    }
    assert all(leaf.axes is None for leaf in found.leaves)


def test_a_right_selection_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = so.check_selection(
            normalised_loss, SMALL, X, channel_axes=so.by_path({"kernel": [1]})
        )
    assert found("kernel", None) == (1,)
    assert found.evidence("head") == "no candidate"


def test_a_stack_of_which_one_layer_is_not_normalised():
    def loss(params, x):
        first, second = params["kernels"]
        return jnp.mean((jnp.tanh(normalise(x @ first, 0)) @ second - 1) ** 2)

    found = so.find_invariant_groups(loss, {"kernels": weights(2, 6, 6)}, X)
    assert found("kernels", None) is None


def test_queries_and_keys_of_linen():
    x = jnp.asarray(RNG.normal(size=(2, 5, 8)), jnp.float32)
    layers = {
        name: nn.MultiHeadDotProductAttention(2, normalize_qk=name == "normalised", use_bias=False)
        for name in ("normalised", "plain")
    }
    params = {name: layer.init(jax.random.key(0), x)["params"] for name, layer in layers.items()}

    def loss(params, x):
        y = [layer.apply({"params": params[name]}, x) for name, layer in layers.items()]
        return jnp.mean((sum(y) - x) ** 2)

    found = so.find_invariant_groups(loss, params, x)
    axes = {leaf.path: leaf.axes for leaf in found.leaves if leaf.axes is not None}
    assert axes == {"normalised/query/kernel": -2, "normalised/key/kernel": -2}


def cross_entropy(logits):
    return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()


def test_an_nnx_state():
    graphdef, params, stats = nnx.split(Tiny(4, rngs=nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, images):
        return cross_entropy(nnx.merge(graphdef, params, stats, copy=True)(images, train=True))

    images = jnp.asarray(RNG.normal(size=(2, 8, 16, 16, 3)), jnp.float32)
    found = so.find_invariant_groups(loss, params, *images)
    assert {leaf.path: leaf.axes for leaf in found.leaves} == {
        "bn/bias": None,
        "bn/scale": None,
        "conv/kernel": -1,
        "linear/bias": None,
        "linear/kernel": None,
    }
    assert so.describe(nnx.as_pure(params), found) == so.describe(params, found)


def test_a_module_with_leaves_of_other_kinds():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Module:
        kernel: jax.Array
        head: jax.Array
        bias: jax.Array | None
        temperature: jax.Array
        steps: jax.Array
        key: jax.Array

    def loss(module, x):
        assert module.bias is None
        noise = jax.random.normal(module.key, x.shape) * module.steps
        return normalised_loss(vars(module), x + noise) * module.temperature

    module = Module(
        SMALL["kernel"],
        SMALL["head"],
        None,
        jnp.ones(()),
        jnp.ones((2, 1), int)[0],
        jax.random.key(1),
    )
    found = so.find_invariant_groups(loss, module, X)
    assert {leaf.path: (leaf.axes, leaf.verdict) for leaf in found.leaves} == {
        "kernel": (-1, "invariant"),
        "head": (None, "not invariant"),
        "temperature": (None, "no candidate"),
        "steps": (None, "no candidate"),
        "key": (None, "no candidate"),
    }
    assert so.describe(module, found).count("classic") == 4


@pytest.mark.parametrize(
    "candidates, axes",
    [([-1, ()], ()), ([(), so.blocks(-1, 4), so.blocks(-1, 2)], so.blocks(-1, 2)), ([-1], None)],
)
def test_the_finest_of_given_candidates(candidates, axes):
    def loss(params, target):
        return jnp.mean((group_norm(params) - target) ** 2)

    params = ZOO_PARAMS["group_norm"]
    found = so.find_invariant_groups(loss, params, 0.5, candidates=candidates)
    assert found("kernel", None) == axes
    assert found("head", None) is None


def test_equal_partitions_count_once():
    def loss(params, x):
        return jnp.mean((jnp.tanh(normalise(x @ params["kernel"][0], 0)) - 1) ** 2)

    params = {"kernel": SMALL["kernel"][None]}
    for candidates, axes in ([(0, -1), -1], (0, -1)), ([-1, [0, 2]], -1):
        found = so.find_invariant_groups(loss, params, X, candidates=candidates)
        assert found("kernel", None) == axes


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"candidates": [None]}, TypeError, "is not a sequence"),
        ({"candidates": ["x"]}, TypeError, "'x' is not an int"),
        ({"candidates": [-1, 7]}, ValueError, "candidates: 7 "),
        ({"loss_fn": lambda p, x: x @ p["kernel"]}, ValueError, r"float32\[16,5\]; it must"),
        ({"loss_fn": lambda p, x: (p["kernel"].sum(), x)}, ValueError, "must return a floating"),
        ({"loss_fn": lambda p, x: jnp.int32(1)}, ValueError, "must return a floating-point scalar"),
        ({"loss_fn": lambda p, x: p["kernel"].sum() / 0}, ValueError, "given parameters is .*inf"),
        (
            {"loss_fn": lambda p, x: jnp.log(6.0 - jnp.sum(p["ones"] ** 2 > 1.1))},
            ValueError,
            "perturbed parameters is nan",
        ),
        (
            {"loss_fn": lambda p, x: 1 + jnp.sqrt(0 * p["kernel"]).sum()},
            ValueError,
            "^kernel: the gradient of loss_fn is nan",
        ),
    ],
)
def test_what_is_refused(change, error, message):
    given = {"loss_fn": normalised_loss, "batches": (X,)} | change
    loss_fn, batches = given.pop("loss_fn"), given.pop("batches")
    params = SMALL | {"ones": jnp.ones(60)}
    with pytest.raises(error, match=message):
        so.find_invariant_groups(loss_fn, params, *batches, **given)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("resnet20", marks=pytest.mark.slow),
        pytest.param("resnet18", marks=pytest.mark.long),
        pytest.param("vgg16", marks=pytest.mark.long),
    ],
)
def test_every_convolution_of_the_networks_and_nothing_else(name):
    model = models.MODELS[name](10, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)

    def loss(params, images):
        return cross_entropy(nnx.merge(graphdef, params, stats, copy=True)(images, train=True))

    # Smaller ones take longer: XLA is slow at images of 2×2 pixels on a CPU.
    images = jnp.asarray(RNG.normal(size=(8, 32, 32, 3)), jnp.float32)
    found = so.find_invariant_groups(loss, params, images)
    for leaf in found.leaves:
        assert leaf.axes == (-1 if "conv" in leaf.path else None), leaf
        if leaf.rescaling is not None:
            away = leaf.rescaling / TOLERANCE
            assert (away < 1 / 3) if leaf.axes == -1 else (away > 3), leaf
