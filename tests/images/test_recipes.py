"""The recipes, the learning-rate schedule and the optimizers made from them."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from images import recipes

PUBLISHED = json.loads((Path(__file__).parents[1] / "goldens" / "recipes.json").read_text())
CELLS = [
    (dataset, model, optimizer)
    for dataset, of_models in PUBLISHED["recipes"].items()
    for model, of_optimizers in of_models.items()
    for optimizer in of_optimizers
]


def test_there_are_49_recipes():
    assert len(CELLS) == 49
    ours = {(*setting, name) for setting, row in recipes.RECIPES.items() for name in row}
    assert ours == set(CELLS)
    assert {model for _, model, _ in CELLS} == set(recipes.MODELS)
    assert {optimizer for _, _, optimizer in CELLS} == set(recipes.OF_THE_PAPER)


@pytest.mark.parametrize(("dataset", "model", "optimizer"), CELLS)
def test_recipe_is_the_published_one(dataset, model, optimizer):
    want = dict(PUBLISHED["recipes"][dataset][model][optimizer])
    want.pop("note", None)
    got, exact = recipes.recipe(dataset, model, optimizer)
    assert exact
    assert {name: getattr(got, name) for name in want} == want


def test_protocol_is_the_published_one():
    training = PUBLISHED["training"]
    assert recipes.EPOCHS == training["epochs"]
    assert recipes.BATCH_SIZE == training["batch_size"]
    assert list(recipes.MILESTONES) == training["lr_milestones_epochs"]
    assert recipes.GAMMA == training["lr_gamma"]


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        ("digits", "resnet20"),
        ("folder:a/cifar100", "vgg16"),
        ("cifar100", "resnet20"),
        ("svhn", "resnet20"),
    ],
)
def test_a_setting_without_recipe_takes_cifar10s(dataset, model):
    got, exact = recipes.recipe(dataset, model, "adams")
    assert not exact
    assert got == recipes.RECIPES["cifar10", model]["adams"]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (405, 371, (135 * 371, 225 * 371, 315 * 371)),
        (10, 43, (143, 239, 334)),  # of 430 steps: 143.33, 238.89 and 334.44
        (1, 2, (1, 1, 2)),
        (1, 1, (1, 1, 1)),
    ],
)
def test_learning_rate_falls_at_the_milestones(epochs, steps, expected):
    milestones = recipes.milestones(epochs, steps)
    assert milestones == expected
    schedule = recipes.step_schedule(0.1, milestones)
    for step in {0, *expected, *(m - 1 for m in expected), *(m + 1 for m in expected)}:
        passed = sum(step >= m for m in expected)
        # 1e-6: products of float32.
        assert np.asarray(schedule(step)) == pytest.approx(0.1 * 0.1**passed, rel=1e-6)


RATE, DECAY = 0.01, 0.5
PARAMS: Any = {
    "conv1": {"kernel": np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32)},
    "linear": {"kernel": np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)},
}
GRADS: Any = jax.tree.map(
    lambda p: np.random.default_rng(2).normal(size=p.shape).astype(np.float32), PARAMS
)
RECIPE = recipes.Recipe(learning_rate=99.0, weight_decay=DECAY, b1=0.9, b2=0.99, momentum=0.9)


def run(
    name: str,
    grads: Any = GRADS,
    *,
    learning_rate: optax.ScalarOrSchedule = RATE,
    weight_decay: float = 0.0,
    steps: int = 1,
) -> list[Any]:
    """The updates of the first steps with constant gradients and parameters."""
    tx = recipes.make_optimizer(name, RECIPE._replace(weight_decay=weight_decay), learning_rate)
    state, history = tx.init(PARAMS), []
    for _ in range(steps):
        updates, state = tx.update(grads, state, PARAMS)
        history.append(updates)
    return history


def test_relatives_have_one_recipe_for_all_settings():
    for name in recipes.RELATIVES:
        assert recipes.recipe("digits", "resnet20", name) == (recipes.RELATIVES[name], True)
    assert not recipes.RELATIVES.keys() & set(recipes.OF_THE_PAPER)


@pytest.mark.parametrize("name", ["adamh", "muonh", "rotational"])
def test_the_relatives_keep_the_radii_and_train_the_others_by_adamw(name):
    (updates,) = run(name, weight_decay=0.0 if name == "rotational" else DECAY)
    kernel = PARAMS["conv1"]["kernel"]
    axes = (0, 1) if name == "muonh" else -1
    if name != "rotational":  # whose angle is zero without decay
        assert np.abs(updates["conv1"]["kernel"]).max() > 1e-4
    norms = [
        so.group_norm(x, channel_axes=axes) for x in (kernel, kernel + updates["conv1"]["kernel"])
    ]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    rate = RATE if name == "rotational" else 0.05 * RATE
    decay = 0.0 if name == "rotational" else DECAY
    linear = PARAMS["linear"]["kernel"]
    want = -rate * (np.sign(GRADS["linear"]["kernel"]) + decay * linear)
    np.testing.assert_allclose(updates["linear"]["kernel"], want, rtol=1e-4, atol=1e-8)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of the angles between the output channels of two kernels."""
    a, b = (np.reshape(x, (-1, x.shape[-1])) for x in (a, b))
    return (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)


@pytest.mark.parametrize("name", ["adams", "adamsrt", "sgdmrt", "sgd"])
def test_filters_step_along_their_gradient(name):
    (updates,) = run(name)
    aligned = cosines(updates["conv1"]["kernel"], GRADS["conv1"]["kernel"])
    np.testing.assert_allclose(aligned, -1, atol=1e-5)  # float32


@pytest.mark.parametrize("name", ["adam", "adamw", "adams", "adamsrt", "adamg"])
def test_the_linear_layer_is_treated_by_the_element(name):
    (updates,) = run(name)
    # The first step of Adam is one learning rate long in every element, up to eps / |g|.
    want = -RATE * np.sign(GRADS["linear"]["kernel"])
    np.testing.assert_allclose(updates["linear"]["kernel"], want, rtol=1e-4)
    by_element = np.abs(np.abs(updates["conv1"]["kernel"]) / RATE - 1).max() < 1e-4
    assert by_element == (name in ("adam", "adamw"))


def test_adamg_puts_filters_on_the_unit_sphere():
    (updates,) = run("adamg", weight_decay=DECAY)
    moved: Any = optax.apply_updates(PARAMS, updates)
    norms = np.linalg.norm(np.reshape(moved["conv1"]["kernel"], (-1, 4)), axis=0)
    np.testing.assert_allclose(norms, 1, atol=1e-6)


@pytest.mark.parametrize("name", recipes.OF_THE_PAPER)
def test_weight_decay_is_coupled_except_in_adamw(name):
    (updates,) = run(name, jax.tree.map(jnp.zeros_like, PARAMS), weight_decay=DECAY)
    got = np.asarray(updates["linear"]["kernel"])
    # Coupled, the first moment is divided by its own root mean square, so its size does not matter.
    decayed = {"adamw": DECAY, "sgd": DECAY, "sgdmrt": DECAY}
    sign, kernel = np.sign(PARAMS["linear"]["kernel"]), PARAMS["linear"]["kernel"]
    want = -RATE * (decayed[name] * kernel if name in decayed else sign)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize("name", ["sgd", "sgdmrt"])
def test_momentum(name):
    _, updates = run(name, steps=2)
    want = -RATE * 1.9 * GRADS["linear"]["kernel"]
    np.testing.assert_allclose(updates["linear"]["kernel"], want, rtol=1e-5)


def test_a_schedule_serves_as_learning_rate():
    schedule = recipes.step_schedule(RATE, (1, 1, 1))
    first, second = run("adamsrt", learning_rate=schedule, steps=2)
    sizes = [np.abs(updates["linear"]["kernel"]).mean() for updates in (first, second)]
    assert sizes[1] / sizes[0] == pytest.approx(1e-3, rel=1e-3)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="adamax.*adamsrt"):
        recipes.make_optimizer("adamax", RECIPE, RATE)
