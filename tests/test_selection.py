"""Selection by path: rules, masks, labels, the table, and what is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import spherical_optax as so

PARAMS = {
    "layers": [
        {"conv1": {"kernel": jnp.ones((3, 3, 2, 4))}, "bn1": {"scale": jnp.ones(4)}},
        {"attention": {"query": {"kernel": jnp.ones((8, 2, 4))}}},
    ],
    "head": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)},
}
AXES = so.by_path(
    {r"conv": -1, r"attention/(query|key|value)/kernel": (-2, -1)},
)


def test_paths_are_names_joined_by_slashes():
    seen = {}

    def axes(path, leaf):
        seen[path] = leaf.shape

    so.describe(PARAMS, axes)
    assert seen == {
        "head/bias": (2,),
        "head/kernel": (4, 2),
        "layers/0/bn1/scale": (4,),
        "layers/0/conv1/kernel": (3, 3, 2, 4),
        "layers/1/attention/query/kernel": (8, 2, 4),
    }


def test_paths_are_the_same_for_named_tuples():
    class Layer(NamedTuple):
        kernel: jax.Array
        value: jax.Array

    seen = []
    so.describe({"a": Layer(jnp.ones(2), jnp.ones(2))}, lambda path, leaf: seen.append(path))
    assert seen == ["a/kernel", "a/value"]


def test_an_attribute_value_has_a_name_unless_it_is_the_only_one():
    class Variable(NamedTuple):
        value: jax.Array

    class Attention(NamedTuple):
        query: Any
        key: Any
        value: Any

    arrays = [jnp.ones((4, 2))] * 3
    plain, wrapped = Attention(*arrays), Attention(*map(Variable, arrays))
    axes = so.by_path({"query|key|value": -1})
    for params in (plain, wrapped):  # nnx.Optimizer shows Variables to init and not to update
        rows = so.describe({"attention": params}, axes).splitlines()[1:-1]
        paths = [row.split()[0] for row in rows]
        assert paths == ["attention/query", "attention/key", "attention/value"]
        assert so.path_mask(axes)(params) == jax.tree.map(lambda _: True, params)


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": jnp.ones((2, 2)), "a": {"b": jnp.ones((2, 2))}}
    for use in (so.path_mask(-1), so.adam_s(0.1, channel_axes=-1).init):
        with pytest.raises(ValueError, match="^a/b: the path of two leaves"):
            use(params)


def test_the_first_rule_wins():
    axes = so.by_path({r"conv1": None, r"conv": -1, r"kernel$": [0, 1]})
    assert axes("conv1/kernel", None) is None
    assert axes("conv2/kernel", None) == -1
    assert axes("head/kernel", None) == (0, 1)
    assert axes("head/bias", None) is None


def test_a_selection_is_hashable_and_equal_by_value():
    assert hash(so.by_path({"a": [0, 1]})) == hash(so.by_path({"a": (0, 1)}))
    assert so.by_path({"a": -1}) == so.by_path({"a": -1}) != so.by_path({"a": -2})


def test_masks_and_labels():
    spherical = {
        "layers": [
            {"conv1": {"kernel": True}, "bn1": {"scale": False}},
            {"attention": {"query": {"kernel": True}}},
        ],
        "head": {"kernel": False, "bias": False},
    }
    assert so.path_mask(AXES)(PARAMS) == spherical
    inverse = jax.tree.map(lambda x: not x, spherical)
    assert so.path_mask(AXES, invert=True)(PARAMS) == inverse
    labels = jax.tree.map(lambda x: "spherical" if x else "classic", spherical)
    assert so.path_labels(AXES)(PARAMS) == labels
    named = so.path_labels(AXES, spherical="s", classic="c")(PARAMS)
    assert named == jax.tree.map(lambda x: "s" if x else "c", spherical)


def test_groups_of_one_element_count_as_classic():
    mask = so.path_mask(-1)(PARAMS)
    assert mask["head"] == {"kernel": True, "bias": False}
    assert mask["layers"][0]["bn1"] == {"scale": False}


def test_describe():
    assert so.describe(jax.eval_shape(lambda: PARAMS), AXES).splitlines() == [
        "path                             shape    groups × dimension",
        "head/bias                        2        classic",
        "head/kernel                      4×2      classic",
        "layers/0/bn1/scale               4        classic",
        "layers/0/conv1/kernel            3×3×2×4  4 × 18",
        "layers/1/attention/query/kernel  8×2×4    8 × 8",
        "5 leaves, 150 parameters, 90.7 % of them on spheres",
    ]
    stacked = {"w": jnp.ones((5, 3, 4)), "s": jnp.ones(()), "none": None}
    assert so.describe(stacked, (0, -1)).splitlines()[1:] == [
        "s     scalar  classic",
        "w     5×3×4   20 × 3",
        "2 leaves, 61 parameters, 98.4 % of them on spheres",
    ]
    assert so.describe(stacked, so.blocks(-1, 2, channel_axes=0)).splitlines()[2] == (
        "w     5×3×4   10 × 6, 2 blocks of axis -1"
    )
    assert so.describe({}, -1).splitlines()[-1] == (
        "0 leaves, 0 parameters, 0.0 % of them on spheres"
    )


def test_describe_shows_repeated_layers_once():
    layer = {"conv": jnp.ones((3, 4)), "{bias}": jnp.ones(4)}
    params = {"stem1": jnp.ones((9, 4)), "stages": [{"blocks": [layer] * 7} for _ in range(3)]}
    table = so.describe(params, so.by_path({"conv": -1}))
    assert table.splitlines() == [
        "path                          shape  groups × dimension",
        "stages/0…2/blocks/0…6/conv    3×4    4 × 3",
        "stages/0…2/blocks/0…6/{bias}  4      classic",
        "stem1                         9×4    classic",
        "43 leaves, 372 parameters, 67.7 % of them on spheres",
    ]
    # Where layers differ, each family has its numbers, and nothing is hidden.
    params["stages"][1]["blocks"][3] = {"conv": jnp.ones((3, 8))}
    table = so.describe(params, so.by_path({"conv": -1}))
    assert "stages/1/blocks/3/conv" in table and "stages/2/blocks/6/conv" in table
    flat = {f"{i}": jnp.ones(2) for i in range(45) if i != 7}
    assert "0…6,8…44" in so.describe(flat, None)


def test_describe_shows_the_evidence_of_a_selection_that_has_some():
    class Measured:
        def __call__(self, path, leaf):
            return -1 if path == "w" else None

        def evidence(self, path):
            return f"of {path}"

    params = {"w": jnp.ones((3, 4)), "scale": jnp.ones(4), "none": None}
    assert so.describe(params, Measured()).splitlines() == [
        "path   shape  groups × dimension  measured",
        "scale  4      classic             of scale",
        "w      3×4    4 × 3               of w",
        "2 leaves, 16 parameters, 75.0 % of them on spheres",
    ]


def test_a_rule_without_a_leaf_is_refused_and_the_paths_are_listed():
    axes = so.by_path({"conv": -1, "shortcut": -1})
    for use in (so.adam_srt(0.1, channel_axes=axes).init, so.path_mask(axes), so.path_labels(axes)):
        with pytest.raises(ValueError, match="'shortcut'") as caught:
            use(PARAMS)
        assert "layers/0/conv1/kernel" in str(caught.value)
    so.adam_srt(0.1, channel_axes=so.by_path(dict(axes.rules), require_match=False)).init(PARAMS)


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"kernel": -1, "conv1/kernel": None}, "'conv1/kernel' is never the first to match"),
        ({"bn": -1}, r"'bn' puts nothing on a sphere.*layers/0/bn1/scale \(4,\) has one element"),
    ],
)
def test_a_rule_that_does_nothing_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        so.describe(PARAMS, so.by_path(rules))
    so.describe(PARAMS, so.by_path(rules, require_match=False))


def test_a_tree_without_leaves_has_no_rule_to_match():
    assert so.path_mask(AXES)({"layers": {}}) == {"layers": {}}


def test_a_rule_may_say_none_and_decide_on_classic_leaves_too():
    so.describe(PARAMS, so.by_path({"bn": None, "layers": -1}))
    so.describe(PARAMS, so.by_path({"conv|bn": -1}))


def test_conditions_are_not_axes():
    def selection(path, leaf):
        return "conv" in path

    with pytest.raises(TypeError, match="False is no axis; .* -1 if condition else None"):
        so.adam_srt(0.1, channel_axes=selection).init(PARAMS)


@pytest.mark.parametrize(
    "selection", [so.path_mask(AXES), so.path_labels(AXES), lambda path: -1, lambda a, b, c: -1]
)
def test_selections_of_another_arity_are_refused(selection):
    with pytest.raises(TypeError, match=r"cannot be called as \(path, leaf\) -> axes"):
        so.sgd_mrt(0.1, channel_axes=selection).init(PARAMS)


@pytest.mark.parametrize("factory", [so.adam_s, so.adam_srt, so.adam_g, so.sgd_mrt])
@pytest.mark.parametrize("axes", [AXES, -1, so.InvariantGroups(())])
def test_injected_selections_ask_for_static_args(factory, axes):
    tx = optax.inject_hyperparams(factory)(learning_rate=0.1, channel_axes=axes)
    with pytest.raises(TypeError, match="static_args='channel_axes'"):
        tx.init(PARAMS)


def test_an_injected_mask_asks_for_static_args():
    tx = optax.inject_hyperparams(so.adam_s, static_args="channel_axes")(
        learning_rate=0.1, channel_axes=AXES, weight_decay_mask=so.path_mask(AXES)
    )
    with pytest.raises(ValueError, match="unless static_args names their argument"):
        tx.init(PARAMS)


def test_masked_and_missing_positions_have_matched():
    axes = so.by_path({"conv": -1, "gone": -1})
    params = {"conv": optax.MaskedNode(), "gone": None, "head": jnp.ones((4, 2))}
    tx = so.adam_srt(0.1, channel_axes=axes)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["conv"] == optax.MaskedNode() and updates["gone"] is None


@pytest.mark.parametrize(
    "axes, error, message",
    [
        (so.by_path({"conv1": 7}), ValueError, "layers/0/conv1/kernel: .*out of range"),
        (lambda path, leaf: "x", TypeError, "head/bias: .*not an int"),
        ({"conv": -1}, TypeError, "head/bias: .*by_path"),
    ],
)
def test_wrong_axes_are_refused_with_the_path(axes, error, message):
    with pytest.raises(error, match=message):
        so.sgd_mrt(0.1, channel_axes=axes).init(PARAMS)


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_only_real_floating_parameters_are_spherical(dtype):
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones((3, 2), dtype)}
    with pytest.raises(TypeError, match=f"b: .*{dtype}.*None"):
        so.adam_srt(0.1, channel_axes=-1).init(params)
    so.adam_srt(0.1, channel_axes=so.by_path({"a": -1})).init(params)
