"""The published implementation's trajectories, and the oracle against them and against us."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
import spherical_optax as so
from replay import replay

HERE = Path(__file__).parents[1] / "goldens"
CASES = {case["name"]: case for case in json.loads((HERE / "optimizers.json").read_text())}
ARRAYS = np.load(HERE / "optimizers.npz")

# Relative, over 24 steps in float64. The published code adds eps = 1e-8 to |x|² where it rescales
# (adamsrt) and transports (adamg), which we leave out; the other two agree to rounding.
TOLERANCE = {"adams": 1e-12, "sgdmrt": 1e-12, "adamsrt": 1e-8, "adamg": 1e-6}


def make_optimizer(case):
    hyper, schedule = case["hyperparameters"], case["lr_schedule"]
    learning_rate = hyper["lr"] if schedule is None else lambda step: jnp.asarray(schedule)[step]
    axes = case["channel_axes"]
    axes = None if axes is None else tuple(axes)
    if case["algorithm"] == "sgdmrt":
        return so.sgd_mrt(
            learning_rate,
            hyper["momentum"],
            dampening=hyper["dampening"],
            weight_decay=hyper["weight_decay"],
            channel_axes=axes,
        )
    factory = {"adams": so.adam_s, "adamsrt": so.adam_srt, "adamg": so.adam_g}[case["algorithm"]]
    return factory(
        learning_rate,
        *hyper["betas"],
        hyper["eps"],
        weight_decay=hyper["weight_decay"],
        channel_axes=axes,
    )


def relative_error(trajectory, expected):
    return np.max(np.abs(np.asarray(trajectory) - expected)) / np.max(np.abs(expected))


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_the_published_one(name):
    with jax.enable_x64(True):
        trajectory = replay(
            make_optimizer(CASES[name]),
            jnp.asarray(ARRAYS[f"{name}/params"]),
            [jnp.asarray(grad) for grad in ARRAYS[f"{name}/grads"]],
        )
    error = relative_error(trajectory, ARRAYS[f"{name}/trajectory"])
    assert error < TOLERANCE[CASES[name]["algorithm"]]


def oracle_trajectory(case):
    name, hyper, axes = case["name"], case["hyperparameters"], case["channel_axes"]
    axes = None if axes is None else tuple(axes)
    x = oracle.rows(ARRAYS[f"{name}/params"], axes)
    grads = [oracle.rows(grad, axes) for grad in ARRAYS[f"{name}/grads"]]
    if case["algorithm"] == "sgdmrt":
        return oracle.sgd_mrt(
            x, grads, hyper["lr"], hyper["momentum"], hyper["dampening"], hyper["weight_decay"]
        )
    betas, eps = hyper["betas"], hyper["eps"]
    if case["algorithm"] == "adamg":
        return oracle.adam_g(x, grads, hyper["lr"], *betas, eps)
    transport = "rescale" if case["algorithm"] == "adamsrt" else "none"
    return oracle.adam(x, grads, hyper["lr"], *betas, eps, hyper["weight_decay"], transport)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case["lr_schedule"] is None]
)
def test_the_oracle_reproduces_the_published_trajectory(name):
    case = CASES[name]
    axes = None if case["channel_axes"] is None else tuple(case["channel_axes"])
    expected = np.stack([oracle.rows(x, axes) for x in ARRAYS[f"{name}/trajectory"]])
    error = relative_error(list(oracle_trajectory(case)), expected)
    assert error < TOLERANCE[case["algorithm"]]
