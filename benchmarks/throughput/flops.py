"""How many operations a network takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr


def forward_flops(make_model: Callable[..., nnx.Module]) -> int:
    """Operations of a network's convolutions and linear layers for one image of 32x32, ten classes.

    A product and its addition are two; those with the padding count.

    Args:
      make_model: one of `images.models.MODELS`.
    """

    def forward(images: jax.Array) -> jax.Array:
        return make_model(10, rngs=nnx.Rngs(0))(images, train=False)

    return _count(jax.make_jaxpr(forward)(np.zeros((1, 32, 32, 3), np.float32)).jaxpr)


def _count(jaxpr: Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        operands: list[Any] = [variable.aval for variable in equation.invars]
        results: list[Any] = [variable.aval for variable in equation.outvars]
        match equation.primitive.name:
            case "conv_general_dilated":
                kernel = operands[1]
                outputs = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * results[0].size * kernel.size // outputs
            case "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                length = math.prod(operands[0].shape[axis] for axis in contracted)
                total += 2 * results[0].size * length
        for inner in jax.tree.leaves(equation.params):
            if isinstance(inner, ClosedJaxpr):
                total += _count(inner.jaxpr)
            elif isinstance(inner, Jaxpr):
                total += _count(inner)
    return total
