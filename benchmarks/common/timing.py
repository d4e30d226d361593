"""Fair timings: several programs in turn on one machine, and what the machine itself can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from common.run_lines import Spread


def spread(values: Sequence[float]) -> Spread:
    """The quartiles of one or more values."""
    return Spread(*np.quantile(values, [0.25, 0.5, 0.75]).tolist())


def interleave(
    programs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    pause: float = 0.0,
    on_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Times several programs in turn; every second round goes backwards.

    What slows the machine for a while so falls on all of them, and ratios within a round are fair.

    Args:
      programs: each runs to its end, device included, before it returns.
      rounds: how often each is timed, from 1. Let them run once before.
      pause: seconds of sleep before each timing, in which another library's idle threads stop
        spinning.
      on_round: called after each round.

    Returns:
      Seconds of each program in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds):
        names = list(programs)
        for name in names if number % 2 == 0 else names[::-1]:
            time.sleep(pause)
            began = time.perf_counter()
            programs[name]()
            seconds[name].append(time.perf_counter() - began)
        if on_round:
            on_round()
    return seconds


def copy_bandwidth(rounds: int = 20) -> float:
    """Bytes per second that the device reads and writes in copying 256 MiB in a row."""
    source = jnp.ones(2**26, jnp.float32)
    # A donated copy writes in place; a plain one is free to be no copy at all.
    step = jax.jit(lambda x: x + 1, donate_argnums=0)

    def copy() -> None:
        nonlocal source
        for _ in range(10):
            source = step(source)
        jax.block_until_ready(source)

    nbytes = 10 * 2 * source.nbytes
    copy()
    return nbytes / min(interleave({"copy": copy}, rounds)["copy"])


def matrix_peak(dtype: DTypeLike, rounds: int = 10) -> float:
    """Floating-point operations per second of a product of two large square matrices."""
    size = 1536 if jax.default_backend() == "cpu" else 8192
    repeats = 1 if jax.default_backend() == "cpu" else 10
    # At random: a GPU multiplies equal numbers at less power and hence faster. Scaled to keep size.
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (size, size), dtype) * size**-0.25 for key in keys)

    @jax.jit
    def product(left, right):
        for _ in range(repeats):
            right = left @ right * size**-0.25
        return right

    def multiply() -> None:
        jax.block_until_ready(product(left, right))

    multiply()
    return repeats * 2 * size**3 / min(interleave({"product": multiply}, rounds)["product"])
