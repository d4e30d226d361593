"""A small tree for the optimizers' steps, and made-up figures of a step."""

import jax
import jax.numpy as jnp
import numpy as np

import spherical_optax as so
from common.run_lines import Spread
from steps.step_programs import Tree
from steps.step_runs import Figures, Measurement, Setting


def make_tree(model="resnet20"):
    rng = np.random.default_rng(1)
    shapes = {"conv": {"kernel": (3, 3, 2, 4)}, "head": {"kernel": (4, 5), "bias": (5,)}}

    def normal(shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    trees = (jax.tree.map(normal, shapes, is_leaf=lambda x: isinstance(x, tuple)) for _ in "pg")
    return Tree(*trees, so.by_path({"conv": -1}))


FIGURES = Figures(
    timings=20,
    steps_per_timing=4,
    seconds=Spread(0.0099, 0.0101, 0.012),
    ratio_to_adam=Spread(1.21, 1.234, 1.25),
    ratio_of_ours=None,
    parameter_bytes=44_700_000,
    state_bytes=44_800_000,
    state_ratio=0.501,
    bytes_accessed=358e6,
    bytes_ratio=0.667,
    temporary_bytes=0,
    compile_seconds=1.5,
    copy_bandwidth=50e9,
    bandwidth_share=0.709,
)
VERSIONS = {"python": "3.11.7", "jax": "0.10.2"}


def make_measurement(model, optimizer, *, rounds=20, device="cpu (2 cores)", torch=None, **figures):
    versions = VERSIONS | ({"torch": torch} if torch else {})
    setting = Setting(model, optimizer, rounds, device, versions, 1)
    return Measurement(setting, "abc", FIGURES._replace(**figures))
