"""Small checkpoints for the tests, and what is left of them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training import checkpoints


def no_warning(sentence: str) -> None:
    pytest.fail(f"warned: {sentence}")


def small(step: int) -> dict[str, jax.Array]:
    """Arrays that name their step, one of them too large for Orbax's index of small ones."""
    return {"small": jnp.full(3, step), "large": jnp.arange(2000.0) * step}


def assert_same(left, right) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def make_checkpoints(directory: Path, steps) -> None:
    manager = checkpoints.open_checkpoints(directory)
    for step in steps:
        checkpoints.save(manager, step, small(step), {"step": step})
    checkpoints.close(manager)


def read_newest(directory: Path, warn=no_warning) -> int | None:
    """The step of what `restore` returns, whose arrays and progress must belong together."""
    manager = checkpoints.open_checkpoints(directory)
    restored = checkpoints.restore(manager, small(0), warn=warn)
    checkpoints.close(manager)
    if restored is None:
        return None
    arrays, progress = restored
    assert_same(arrays, small(progress["step"]))
    return progress["step"]


def step_names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
