"""The paper's 49 recipes (7 optimizers x 7 settings), its protocol, and the optimizers of both.

The figures are the best of the grid search of Roburin et al. 2022 (appendix E, table 4). JAX is
imported only inside the functions that need it, so that the command can read its choices and
defaults from here and still answer `--help` at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import optax

    import spherical_optax as so

EPOCHS = 405
BATCH_SIZE = 128
MILESTONES = (135, 225, 315)  # epochs, of EPOCHS
GAMMA = 0.1  # the learning rate's factor at each milestone


class Recipe(NamedTuple):
    """Hyper-parameters for one setting; an optimizer reads those that it has."""

    learning_rate: float
    weight_decay: float
    b1: float = 0.9
    b2: float = 0.999
    momentum: float = 0.9


def _adam(weight_decay: float, *, b2: float) -> Recipe:
    return Recipe(learning_rate=1e-3, weight_decay=weight_decay, b2=b2)


def _adamg(*, b2: float) -> Recipe:
    return Recipe(learning_rate=1e-2, weight_decay=5e-4, b2=b2)


def _sgd(weight_decay: float) -> Recipe:
    return Recipe(learning_rate=0.1, weight_decay=weight_decay)


RECIPES: dict[tuple[str, str], dict[str, Recipe]] = {
    ("cifar10", "resnet18"): {
        "adams": _adam(1.5625e-5, b2=0.99),
        "adamsrt": _adam(7.8125e-6, b2=0.99),
        "adamw": _adam(6.25e-5, b2=0.99),
        "adam": _adam(7.8125e-6, b2=0.999),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(2.5e-4),
        "sgdmrt": _sgd(2.5e-4),
    },
    ("cifar10", "resnet20"): {
        "adams": _adam(5e-4, b2=0.99),
        "adamsrt": _adam(7.8125e-6, b2=0.99),
        "adamw": _adam(0.01, b2=0.99),  # the paper gives none: its framework's default
        "adam": _adam(5e-4, b2=0.99),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(2.5e-4),
        "sgdmrt": _sgd(3.125e-5),
    },
    ("cifar10", "vgg16"): {
        "adams": _adam(3.125e-5, b2=0.999),
        "adamsrt": _adam(1.5625e-5, b2=0.999),
        "adamw": _adam(2.5e-4, b2=0.999),
        "adam": _adam(3.125e-5, b2=0.999),
        "adamg": _adamg(b2=0.999),
        "sgd": _sgd(2.5e-4),
        "sgdmrt": _sgd(6.25e-5),
    },
    ("cifar100", "resnet18"): {
        "adams": _adam(1.25e-4, b2=0.99),
        "adamsrt": _adam(0.0, b2=0.999),
        "adamw": _adam(1.25e-4, b2=0.99),
        "adam": _adam(1.25e-4, b2=0.999),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(5e-4),
        "sgdmrt": _sgd(5e-4),
    },
    ("cifar100", "vgg16"): {
        "adams": _adam(6.25e-5, b2=0.99),
        "adamsrt": _adam(7.8125e-6, b2=0.99),
        "adamw": _adam(1.5625e-5, b2=0.99),
        "adam": _adam(6.25e-5, b2=0.99),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(5e-4),
        "sgdmrt": _sgd(1.25e-4),
    },
    ("svhn", "resnet18"): {
        "adams": _adam(3.125e-5, b2=0.99),
        "adamsrt": _adam(7.8125e-6, b2=0.999),
        "adamw": _adam(7.8125e-6, b2=0.999),
        "adam": _adam(0.0, b2=0.999),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(5e-4),
        "sgdmrt": _sgd(5e-4),
    },
    ("svhn", "vgg16"): {
        "adams": _adam(7.8125e-6, b2=0.99),
        "adamsrt": _adam(2.5e-4, b2=0.999),
        "adamw": _adam(3.125e-5, b2=0.99),
        "adam": _adam(0.0, b2=0.99),
        "adamg": _adamg(b2=0.99),
        "sgd": _sgd(5e-4),
        "sgdmrt": _sgd(3.125e-5),
    },
}

OF_THE_PAPER = ("adams", "adamsrt", "adamw", "adam", "adamg", "sgd", "sgdmrt")
# The paper has none of these. The figures train digits, and are where to start from elsewhere.
RELATIVES = {
    "adamh": Recipe(learning_rate=0.02, weight_decay=0.0, b2=0.95),
    "muonh": Recipe(learning_rate=0.02, weight_decay=0.0, b2=0.95, momentum=0.95),
    "adamp": Recipe(learning_rate=1e-3, weight_decay=0.01),
    "sgdp": Recipe(learning_rate=0.1, weight_decay=1e-4),
    "rotational": Recipe(learning_rate=1e-3, weight_decay=0.1),
}
OPTIMIZERS = (*OF_THE_PAPER, *RELATIVES)
MODELS = ("resnet18", "resnet20", "vgg16")
PRECISIONS = ("float32", "bfloat16")
DATASETS = ("digits", "cifar10", "cifar100", "svhn")  # and folder:PATH


def recipe(dataset: str, model: str, optimizer: str) -> tuple[Recipe, bool]:
    """The recipe of a setting, and whether it is this setting's own.

    A setting without one (`digits`, a folder, `cifar100` with `resnet20`, ...) takes that of
    `cifar10` with the same model. Optimizers that are not the paper's have one for all.

    Args:
      dataset: any name.
      model: one of `MODELS`.
      optimizer: one of `OPTIMIZERS`.
    """
    if optimizer in RELATIVES:
        return RELATIVES[optimizer], True
    exact = (dataset, model) in RECIPES
    return RECIPES[dataset if exact else "cifar10", model][optimizer], exact


def milestones(epochs: int, steps_per_epoch: int) -> tuple[int, ...]:
    """The optimizer steps, counted from 0, that are the first with a lowered learning rate.

    A run of other than `EPOCHS` epochs keeps the milestones' places relative to its length. In very
    short runs several may fall on the same step.
    """
    return tuple(max(1, round(m / EPOCHS * epochs * steps_per_epoch)) for m in MILESTONES)


def step_schedule(learning_rate: float, steps: tuple[int, ...]) -> optax.Schedule:
    """Multiply the learning rate by `GAMMA` at each of these optimizer steps."""
    import optax

    # A dict holds a step once, so milestones that coincide must multiply their factors here.
    scales = {step: GAMMA ** steps.count(step) for step in steps}
    return optax.piecewise_constant_schedule(learning_rate, scales)


def spheres() -> so.ByPath:
    """The selection: one group per output channel of each kernel whose path contains `conv`."""
    import spherical_optax as so

    return so.by_path({"conv": -1})


def make_optimizer(
    name: str, recipe: Recipe, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """The named optimizer with a recipe's hyper-parameters.

    The spherical ones treat what `spheres` selects spherically, and the other parameters
    classically. Weight decay is coupled L2 on every parameter, except for `adamw`, `adamp` and
    `sgdp`, which decouple it, `adamh` and `muonh`, where it is that of the other parameters, and
    `rotational`, where with the learning rate it decides the angle. `muonh` has a sphere for each
    place of a kernel, a matrix of inputs and outputs.

    Args:
      name: one of `OPTIMIZERS`.
      recipe: its hyper-parameters; `recipe.learning_rate` is not used.
      learning_rate: a number or a schedule.

    Raises:
      ValueError: for another name.
    """
    import optax

    import spherical_optax as so

    spherical = {"weight_decay": recipe.weight_decay, "channel_axes": spheres()}
    coupled_l2 = optax.add_decayed_weights(recipe.weight_decay)
    match name:
        case "adams":
            return so.adam_s(learning_rate, recipe.b1, recipe.b2, **spherical)
        case "adamsrt":
            return so.adam_srt(learning_rate, recipe.b1, recipe.b2, **spherical)
        case "adamg":
            return so.adam_g(learning_rate, recipe.b1, recipe.b2, **spherical)
        case "sgdmrt":
            return so.sgd_mrt(learning_rate, recipe.momentum, **spherical)
        case "sgd":
            return optax.chain(coupled_l2, optax.sgd(learning_rate, recipe.momentum))
        case "adam":
            return optax.chain(coupled_l2, optax.adam(learning_rate, recipe.b1, recipe.b2))
        case "adamw":
            decay = recipe.weight_decay
            return optax.adamw(learning_rate, recipe.b1, recipe.b2, weight_decay=decay)
        case "adamh" | "muonh":
            # The rate on spheres is an angle, and too much for Adam on the others.
            classic = {
                "adam_learning_rate": _scaled(learning_rate, 0.05),
                "adam_weight_decay": recipe.weight_decay,
            }
            if name == "adamh":
                angles = {"channel_axes": spheres(), **classic}
                return so.adam_h(learning_rate, recipe.b1, recipe.b2, **angles)
            matrices = so.by_path({"conv": (0, 1)})
            return so.muon_h(learning_rate, recipe.momentum, channel_axes=matrices, **classic)
        case "adamp":
            return so.adamp(learning_rate, recipe.b1, recipe.b2, **spherical)
        case "sgdp":
            return so.sgdp(learning_rate, recipe.momentum, nesterov=True, **spherical)
        case "rotational":
            adam = optax.scale_by_adam(recipe.b1, recipe.b2)
            turning = so.rotational(
                adam,
                lambda count: so.equilibrium_angle(
                    _at(learning_rate, count), recipe.weight_decay, b1=recipe.b1
                ),
                channel_axes=spheres(),
            )
            decay = optax.add_decayed_weights(recipe.weight_decay)
            plain = optax.chain(adam, decay, optax.scale_by_learning_rate(learning_rate))
            labels = so.path_labels(spheres())
            return optax.partition({"spherical": turning, "classic": plain}, labels)
    raise ValueError(f"unknown optimizer {name!r}: it must be one of {', '.join(OPTIMIZERS)}")


def _at(learning_rate: optax.ScalarOrSchedule, count: Any) -> Any:
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _scaled(learning_rate: optax.ScalarOrSchedule, factor: float) -> optax.Schedule:
    return lambda count: factor * _at(learning_rate, count)
