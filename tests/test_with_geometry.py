"""The wrapper that watches an optimizer: it changes nothing, and knows names and momenta.

What it reads is in `test_geometry_figures.py`; that its state is one of Optax is in
`test_optax_contract.py`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spherical_optax as so
from watched import AXES, GRADS, PARAMS, watch

pytestmark = pytest.mark.usefixtures("compiled_quickly")

MOMENTUM = "momentum_radial_fraction"

OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, 0.9)),
    "muon": optax.contrib.muon(0.1),
    "adam_srt": so.adam_srt(0.1, weight_decay=0.1, channel_axes=AXES),
    "with_value": optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=1)),
}


def check_bits(bare, tx):
    plain_update, update = (jax.jit(t.update) for t in (bare, tx))
    params, plain_state, state = PARAMS, bare.init(PARAMS), tx.init(PARAMS)
    chex.assert_trees_all_equal(state.inner_state, plain_state)
    for g in GRADS[:3]:
        extra = {"value": 1.0} if bare is OPTIMIZERS["with_value"] else {}
        expected, plain_state = plain_update(g, plain_state, params, **extra)
        updates, state = update(g, state, params, **extra)
        chex.assert_trees_all_equal(updates, expected)
        chex.assert_trees_all_equal(state.inner_state, plain_state)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_and_inner_state_are_those_of_the_bare_optimizer_bit_for_bit(name):
    check_bits(OPTIMIZERS[name], watch(OPTIMIZERS[name]))


def test_nor_do_they_change_between_the_measured_updates():
    check_bits(OPTIMIZERS["adam_srt"], watch(OPTIMIZERS["adam_srt"], every=2))


def test_extra_arguments_do_not_hurt_an_optimizer_that_takes_none():
    tx, bare = watch(optax.trace(0.9)), optax.trace(0.9)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=1.0)
    chex.assert_trees_all_equal(updates, bare.update(GRADS[0], bare.init(PARAMS))[0])


def names_of(tx, params):
    return list(so.geometry(jax.jit(tx.init)(params)))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_the_names_are_path_measure_and_statistic_in_this_order(momentum):
    names = names_of(watch(optax.sgd(0.1, momentum)), PARAMS)
    measures = ["angle", "turn_per_gradient", "radius", "radial_fraction", "deformation"]
    assert names == [
        f"{path}/{measure}/{statistic}"
        for path in ("conv", "layers/stack")
        for measure in measures + [MOMENTUM] * bool(momentum)
        for statistic in ("mean", "min", "max")
    ]


class Net(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([nnx.Linear(3, 4, rngs=rngs)])


def test_nnx_optimizers_show_the_paths_of_the_module():
    model, axes = Net(nnx.Rngs(0)), so.by_path({"kernel": -1})
    tx = so.with_geometry(optax.sgd(0.1, 0.9), channel_axes=axes)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = jax.jit(lambda x: so.geometry(tx.update(x, tx.init(x), x)[1]))(params)

    @nnx.jit
    def step(model, optimizer):  # the parameters are the gradients
        optimizer.update(model, nnx.state(model, nnx.Param))

    step(model, optimizer)
    figures = so.geometry(optimizer.opt_state)
    assert sorted(figures) == sorted(expected)
    assert list(figures)[0] == "blocks/0/kernel/angle/mean"
    for name, figure in figures.items():
        np.testing.assert_allclose(float(figure), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tx, expected",
    [
        (optax.sgd(0.1), False),
        (optax.sgd(0.1, 0.9), True),
        (optax.rmsprop(0.1), False),
        (optax.rmsprop(0.1, momentum=0.9), True),
        (optax.lion(0.1), True),
        (optax.MultiSteps(optax.adam(0.1), 2), True),
        (optax.inject_hyperparams(optax.adam)(learning_rate=0.1), True),
        (optax.chain(optax.trace(0.9), optax.scale_by_adam()), False),  # two momenta
        (optax.chain(optax.trace(0.9), optax.trace(0.9)), False),
        (optax.partition(dict.fromkeys("ab", optax.adam(0.1)),
                         so.path_labels(AXES, spherical="a", classic="b")), True),
    ],
)  # fmt: skip
def test_the_momentum_is_measured_where_there_is_exactly_one(tx, expected):
    names = names_of(watch(tx), PARAMS)
    assert any(MOMENTUM in name for name in names) == expected


def test_a_parameter_may_be_called_like_a_momentum():
    params = {
        "mu": PARAMS["conv"],
        "trace": PARAMS["conv"],
        "nu": {"mu": {"trace": PARAMS["conv"]}},
    }
    tx = so.with_geometry(optax.sgd(0.1), channel_axes=-1)
    assert not any(MOMENTUM in name for name in names_of(tx, params))
    tx = so.with_geometry(optax.sgd(0.1, 0.9), channel_axes=-1)
    shifts = {"mu": 1.0, "trace": 2.0, "nu": {"mu": {"trace": 3.0}}}
    grads = jax.tree.map(lambda x, shift: x + shift, params, shifts)
    figures = so.geometry(tx.update(grads, tx.init(params), params)[1])
    # The first momentum is the gradient.
    expected = so.radial_fraction(params, grads, channel_axes=-1)
    pairs = {
        "mu": expected["mu"],
        "trace": expected["trace"],
        "nu/mu/trace": expected["nu"]["mu"]["trace"],
    }
    for path, values in pairs.items():
        np.testing.assert_allclose(figures[f"{path}/{MOMENTUM}/max"], np.max(values), rtol=1e-6)


def test_holes_and_classic_leaves_have_no_figures():
    def with_holes(tree):
        return tree | {"none": None, "masked": optax.MaskedNode(), "count": jnp.zeros((3,))}

    params, grads = with_holes(PARAMS), with_holes(GRADS[0])
    tx = watch(optax.sgd(0.1, 0.9))
    _, state = tx.update(grads, tx.init(params), params)
    figures = so.geometry(state)
    assert {name.split("/")[0] for name in figures} == {"conv", "layers"}


def test_a_leaf_without_an_update_keeps_its_figures():
    tx = watch(so.trace_rt(0.9, channel_axes=AXES))
    _, state = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
    before = so.geometry(state)
    after = so.geometry(tx.update(GRADS[1] | {"conv": None}, state, PARAMS)[1])
    for name in before:
        kept = np.array_equal(after[name], before[name])
        assert kept == (name.startswith("conv") or "radius" in name), name


def test_a_step_that_is_zero_in_a_leaf_keeps_its_figures():
    zero = jax.tree.map(jnp.zeros_like, GRADS[0])
    tx = watch(optax.chain(so.normalize_per_group(channel_axes=AXES), optax.scale(-0.1)))
    update = jax.jit(tx.update)
    _, state = update(GRADS[0], tx.init(PARAMS), PARAMS)
    before = so.geometry(state)
    assert before["conv/angle/mean"] > 0
    chex.assert_trees_all_equal(so.geometry(update(zero, state, PARAMS)[1]), before)
    after = so.geometry(update(GRADS[1] | {"conv": zero["conv"]}, state, PARAMS)[1])
    for name in before:
        if name.endswith("angle/mean"):
            assert (after[name] == before[name]) == name.startswith("conv"), name


@pytest.mark.parametrize("kind", ["MultiSteps", "apply_if_finite"])
def test_idle_steps_of_what_is_inside_keep_the_figures(kind):
    if kind == "MultiSteps":
        tx = watch(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation())
        grads = [GRADS[0], GRADS[1], GRADS[2]]  # the third one waits
    else:
        tx = watch(optax.apply_if_finite(optax.adam(0.1), 3))
        bad = jax.tree.map(lambda g: g * jnp.nan, GRADS[0])
        grads = [GRADS[0], GRADS[1], bad]
    state, update, seen = tx.init(PARAMS), jax.jit(tx.update), []
    for g in grads:
        _, state = update(g, state, PARAMS)
        seen.append(so.geometry(state))
    assert seen[1]["conv/angle/min"] > 0
    chex.assert_trees_all_equal(seen[2], seen[1])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_the_figures_of_its_leaf_alone(bad):
    tx = watch(optax.sgd(0.1, 0.9))
    update, state = jax.jit(tx.update), tx.init(PARAMS)
    spoiled = GRADS[0] | {"conv": GRADS[0]["conv"].at[0, 0, 0, 0].set(bad)}
    clean, shown = (so.geometry(update(g, state, PARAMS)[1]) for g in (GRADS[0], spoiled))
    for name in clean:
        if name.startswith("layers") or "radius" in name:
            assert shown[name] == clean[name], name
        else:
            assert not np.isfinite(shown[name]), name
    spoiled = PARAMS | {"conv": PARAMS["conv"].at[0, 0, 0, 0].set(bad)}
    shown = so.geometry(update(GRADS[0], state, spoiled)[1])
    for name in clean:
        assert np.isfinite(shown[name]) == (name.startswith("layers") or name.endswith("radius/min")
                                            and bad == np.inf), name  # fmt: skip


def test_a_kept_axis_has_figures_of_its_own():
    keep = so.by_path({"stack": 0})
    tx, apart = watch(optax.adam(0.1)), watch(optax.adam(0.1), keep=keep)
    whole, each = (so.geometry(t.update(GRADS[0], t.init(PARAMS), PARAMS)[1]) for t in (tx, apart))
    assert list(each) == list(whole)
    for i in range(2):
        params, grads = ({"stack": tree["layers"]["stack"][i]} for tree in (PARAMS, GRADS[0]))
        alone = so.with_geometry(optax.adam(0.1), channel_axes=so.blocks(-1, 4))
        expected = so.geometry(alone.update(grads, alone.init(params), params)[1])
        for name, figure in expected.items():
            kept = each[f"layers/{name}"]
            assert kept.shape == (2,)
            np.testing.assert_allclose(kept[i], figure, rtol=1e-5, atol=1e-6)
    for name, figure in whole.items():
        if name.startswith("conv"):
            np.testing.assert_allclose(each[name], figure, rtol=1e-6)


@pytest.mark.parametrize("keep", [-1, 1, 5, so.by_path({"stack": 1})])
def test_only_axes_that_index_groups_can_be_kept(keep):
    axes = so.by_path({"stack": so.blocks(-1, 4, channel_axes=0)})
    with pytest.raises(ValueError, match=r"layers/stack: keep=-?\d does not index groups"):
        so.with_geometry(optax.sgd(0.1), channel_axes=axes, keep=keep).init(PARAMS)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda tree: tree | {"more": jnp.ones((3, 2))},
            "more: on a sphere in the updates",
        ),
        (lambda tree: {"conv": tree["conv"]}, "layers/stack: on a sphere in the state"),
    ],
)
def test_an_update_with_another_tree_is_refused(change, message):
    tx = so.with_geometry(optax.identity(), channel_axes=lambda path, x: -1 if x.ndim > 1 else None)
    with pytest.raises(ValueError, match=message):
        tx.update(change(GRADS[0]), tx.init(PARAMS), change(PARAMS))


def test_the_interval_may_be_numpys():
    assert watch(optax.sgd(0.1), every=np.int64(2))


def test_the_parameters_are_needed_even_if_the_optimizer_can_do_without():
    tx = watch(optax.sgd(0.1))
    with pytest.raises(ValueError, match="with_geometry needs the current parameters"):
        tx.update(GRADS[0], tx.init(PARAMS))


@pytest.mark.parametrize(
    "other, message",
    [
        (
            {"bias": PARAMS["bias"]},
            "conv: in the updates but not at this place in the parameters",
        ),
        (
            PARAMS | {"conv": jnp.ones((1, 1, 1, 8))},
            r"conv: .* but \(1, 1, 1, 8\) in the parameters",
        ),
    ],
)
def test_other_parameters_are_refused_with_the_path(other, message):
    tx = watch(optax.sgd(0.1))  # which would not look at them
    with pytest.raises(ValueError, match="^" + message):
        tx.update(GRADS[0], tx.init(PARAMS), other)


@pytest.mark.parametrize("params", [{}, [], {"layer": {}}, {"layer": None}])
def test_there_may_be_nothing_to_measure(params):
    tx = so.with_geometry(optax.sgd(0.1), channel_axes=-1)
    _, state = tx.update(params, tx.init(params), params)
    assert so.geometry(state) == {}


def test_geometry_wants_one_watched_state():
    tx = watch(optax.sgd(0.1))
    with pytest.raises(ValueError, match="holds 0 states"):
        so.geometry(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="holds 2 states"):
        so.geometry(optax.chain(tx, tx).init(PARAMS))
