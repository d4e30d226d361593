"""Selection by path: rules, masks, labels, the table, and what is refused."""

from typing import NamedTuple

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
    # A trailing attribute `value` is dropped: NNX shows it to init and not to update.
    assert seen == ["a/kernel", "a"]


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
    ]
    stacked = {"w": jnp.ones((5, 3, 4)), "s": jnp.ones(()), "none": None}
    assert so.describe(stacked, (0, -1)).splitlines()[1:] == [
        "s     scalar  classic",
        "w     5×3×4   20 × 3",
    ]


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
    ]


def test_a_rule_without_a_leaf_is_refused_and_the_paths_are_listed():
    axes = so.by_path({"conv": -1, "shortcut": -1})
    for use in (so.adam_srt(0.1, channel_axes=axes).init, so.path_mask(axes), so.path_labels(axes)):
        with pytest.raises(ValueError, match="'shortcut'") as caught:
            use(PARAMS)
        assert "layers/0/conv1/kernel" in str(caught.value)
    so.adam_srt(0.1, channel_axes=so.by_path(dict(axes.rules), require_match=False)).init(PARAMS)


def test_a_rule_that_an_earlier_one_hides_has_matched():
    so.describe(PARAMS, so.by_path({"kernel": -1, "conv": 0}))


def test_masked_and_missing_positions_have_matched():
    axes = so.by_path({"conv": -1, "gone": -1})
    params = {"conv": optax.MaskedNode(), "gone": None, "head": jnp.ones((4, 2))}
    tx = so.adam_srt(0.1, channel_axes=axes)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["conv"] == optax.MaskedNode() and updates["gone"] is None


def test_a_wrong_pattern_is_refused():
    with pytest.raises(ValueError, match=r"'conv\(' is not a regular expression"):
        so.by_path({"conv(": -1})


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
