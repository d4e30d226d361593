"""Refusals of hyper-parameters, where they are given: later they would be NaNs, or pass for others.

What is traced cannot be looked at, and passes. All raise `ValueError`, but for the last two.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_decays(**values: Any) -> None:
    """Each is the decay of an average."""
    _check(values, lambda x: 0 <= x < 1, "in [0, 1)")


def check_shares(**values: Any) -> None:
    """Each is a share of something."""
    _check(values, lambda x: 0 <= x <= 1, "in [0, 1]")


def check_tolerance(value: Any) -> None:
    """It tells what is zero from what is not."""
    _check({"tolerance": value}, lambda x: 0 < x < 1, "in (0, 1)")


def check_not_negative(**values: Any) -> None:
    """Each is a number that can be 0."""
    _check(values, lambda x: 0 <= x < math.inf, "a finite number from 0")


def check_weight_decay(value: Any) -> None:
    """A number that can be 0, or a schedule."""
    if not callable(value):
        wanted = "a finite number from 0, and no schedule"
        _check({"weight_decay": value}, lambda x: 0 <= x < math.inf, wanted)


def check_rates(below: float = math.inf, **values: Any) -> None:
    """Each is a schedule, or a number; with a bound, from 0 and below it."""
    numbers = {name: value for name, value in values.items() if not callable(value)}
    if below == math.inf:
        _check(numbers, math.isfinite, "a finite number, and no schedule")
    else:
        _check(numbers, lambda x: 0 <= x < below, f"in [0, {below:.6g}), and no schedule")


def check_elements(check: Callable[..., None], **values: Any) -> None:
    """Each is a number that passes the check, or an array of such."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer):
            is_array = hasattr(value, "ravel")
            # Inside `jax.jit` a method of a constant would be traced.
            for element in jax.device_get(value).ravel().tolist() if is_array else [value]:
                check(**{name: element})


def check_count(**values: Any) -> None:
    """Each is a number of times."""
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{name} is traced, and has to be known: pass static_args={name!r}")
        try:
            enough = operator.index(value) >= 1
        except TypeError:
            enough = False
        if not enough:
            raise ValueError(f"{name}={value!r} is not an integer from 1")


def check_dtype(**values: Any) -> None:
    """Each is None or the dtype of a momentum; raises `TypeError`."""
    for name, value in values.items():
        if value is not None and not jnp.issubdtype(jnp.dtype(value), jnp.inexact):
            raise TypeError(f"{name}={value!r} is no floating-point dtype")


def check_optimizer(**values: Any) -> None:
    """Each is made by a factory, and not the factory; raises `TypeError`."""
    for name, value in values.items():
        if not (hasattr(value, "init") and hasattr(value, "update")):
            raise TypeError(
                f"{name}={value!r} is no gradient transformation such as optax.scale_by_adam()"
            )


def _check(values: dict[str, Any], allowed: Callable[[float], bool], wanted: str) -> None:
    for name, value in values.items():
        if isinstance(value, jax.core.Tracer):
            continue
        is_number = isinstance(value, int | float) or getattr(value, "shape", None) == ()
        if not (is_number and allowed(float(value))):
            raise ValueError(f"{name}={value!r} is not {wanted}")
