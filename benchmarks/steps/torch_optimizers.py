"""PyTorch's Adam, and AdamSRT as one writes it there from the paper's equations.

The only file that needs PyTorch. Groups lie along axis 0 of a parameter, as PyTorch has its output
channels and features.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
import torch

from steps.step_programs import LEARNING_RATE, WEIGHT_DECAY, Program, Tree, path_name

PAUSE = 0.05  # seconds in which PyTorch's idle threads stop spinning


class AdamSRT(torch.optim.Optimizer):
    """AdamSRT of Roburin et al. (arXiv 2006.13382), a loop over parameters.

    Args:
      params: parameters, or groups of them; in a group with "spherical" true each index of axis 0
        is a sphere, in the others, and in parameters of one axis, every element is its own group.
      lr: the learning rate.
      betas: decay of the first and second moment.
      eps: added to the root of the second moment, divided by sqrt(d).
      weight_decay: coupled L2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"spherical": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters that have gradients; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _update(param, self.state[param], group)
        return loss


def _update(param: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    dims = tuple(range(1, param.dim())) if group["spherical"] else ()
    size = math.prod(param.shape[dim] for dim in dims)
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(param)
        state["exp_avg_sq"] = torch.zeros_like(_inner(param, param, dims))
    state["step"] += 1

    b1, b2 = group["betas"]
    grad = param.grad + group["weight_decay"] * param
    exp_avg = b1 * state["exp_avg"] + (1 - b1) * grad
    exp_avg_sq = b2 * state["exp_avg_sq"] + (1 - b2) * _inner(grad, grad, dims) / size
    corrected = exp_avg / (1 - b1 ** state["step"])
    corrected_sq = exp_avg_sq / (1 - b2 ** state["step"])
    old = param.clone()
    param.sub_(group["lr"] * corrected / (corrected_sq.sqrt() + group["eps"] / math.sqrt(size)))

    if size > 1:  # rescaling and transport to the new point
        squared = _inner(param, param, dims)
        along, radial = _inner(old, param, dims), _inner(exp_avg, param, dims)
        exp_avg = (along * exp_avg - radial * old) / squared
        exp_avg_sq = exp_avg_sq * _inner(old, old, dims) / squared
    state["exp_avg"], state["exp_avg_sq"] = exp_avg, exp_avg_sq


def _inner(a: torch.Tensor, b: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    # For torch.sum no axes are all of them.
    return (a * b).sum(dims, keepdim=True) if dims else a * b


def names() -> tuple[str, ...]:
    """The optimizers that `torch_program` knows, as far as they are for this device.

    Raises:
      RuntimeError: JAX has a GPU and PyTorch has none.
    """
    if _device() == "cpu":
        return "torch_adam", "torch_adam_srt"
    if not torch.cuda.is_available():
        raise RuntimeError("JAX runs on a GPU that this PyTorch cannot use; install it for CUDA")
    return "torch_adam", "torch_adam_fused", "torch_adam_srt"


def torch_program(name: str, tree: Tree) -> Program:
    """One of `names()` on a tree's parameters in PyTorch's layout, on the device of JAX."""
    device = _device()
    torch.set_num_threads(_cores())
    groups = {True: [], False: []}
    leaves, grads = jax.tree.leaves_with_path(tree.params), jax.tree.leaves(tree.grads)
    for (path, param), grad in zip(leaves, grads, strict=True):
        axes = tree.channel_axes(path_name(path), param)
        tensor = _tensor(param, axes == 0, device).requires_grad_()
        tensor.grad = _tensor(grad, axes == 0, device)
        groups[axes is not None].append(tensor)
    both = [{"params": params, "spherical": spherical} for spherical, params in groups.items()]
    options = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    match name:
        case "torch_adam":
            optimizer = torch.optim.Adam(groups[True] + groups[False], **options)
        case "torch_adam_fused":
            optimizer = torch.optim.Adam(groups[True] + groups[False], fused=True, **options)
        case "torch_adam_srt":
            optimizer = AdamSRT(both, **options)
        case _:
            raise ValueError(f"unknown optimizer {name!r}")

    optimizer.step()  # makes the state
    state = [x for values in optimizer.state.values() for x in values.values()]
    return Program(
        lambda: optimizer.step(),
        torch.cuda.synchronize if device == "cuda" else lambda: None,
        lambda: None,
        state_bytes=sum(x.nbytes for x in state if isinstance(x, torch.Tensor)),
    )


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _cores() -> int:
    """The cores that this process may use, which is what XLA takes as well."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tensor(x: jax.Array, rows_first: bool, device: str) -> torch.Tensor:
    # Transposed, HWIO is OIWH and [in, out] is [out, in]; an embedding has its rows first already.
    array = np.asarray(x)
    return torch.tensor(np.ascontiguousarray(array if rows_first else array.T), device=device)
