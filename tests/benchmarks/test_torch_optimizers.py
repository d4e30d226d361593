"""PyTorch's side of the optimizer step: the same optimizers on the same tree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from steps.step_runs import COUNTERPARTS
from tiny_step import make_tree


def test_torch_adam_srt_is_ours():
    torch = pytest.importorskip("torch")
    from steps import torch_optimizers

    rng = np.random.default_rng(2)
    params = {"conv": rng.standard_normal((3, 2, 2, 4)), "head": rng.standard_normal((4, 3))}
    grads = [{name: rng.standard_normal(x.shape) for name, x in params.items()} for _ in range(6)]
    axes = so.by_path({"conv": -1})

    theirs = {name: torch.tensor(np.ascontiguousarray(x.T)) for name, x in params.items()}
    optimizer = torch_optimizers.AdamSRT(
        [{"params": [theirs["conv"]], "spherical": True}, {"params": [theirs["head"]]}],
        lr=0.1,
        weight_decay=0.01,
    )
    with jax.enable_x64(True):
        tx = so.adam_srt(0.1, weight_decay=0.01, channel_axes=axes)
        ours = jax.tree.map(jnp.asarray, params)
        state = tx.init(ours)
        for grad in grads:
            for name, x in theirs.items():
                x.grad = torch.tensor(np.ascontiguousarray(grad[name].T))
            optimizer.step()
            updates, state = tx.update(jax.tree.map(jnp.asarray, grad), state, ours)
            ours = optax.apply_updates(ours, updates)
            for name, x in theirs.items():
                # The same formulas in another order of float64 operations, over 6 steps.
                np.testing.assert_allclose(x.numpy().T, ours[name], rtol=1e-11)
    assert not np.allclose(ours["conv"], params["conv"], atol=0.1)


@pytest.mark.parametrize("name, numbers", [("torch_adam", 2 * 97), ("torch_adam_srt", 97 + 4 + 25)])
def test_torch_programs_have_the_trees_parameters_and_spheres(name, numbers):
    pytest.importorskip("torch")
    from steps import torch_optimizers

    program = torch_optimizers.torch_program(name, make_tree())
    program.step()
    program.wait()
    steps = 3 if name == "torch_adam" else 0  # a counter in a tensor per parameter
    assert program.state_bytes == 4 * (numbers + steps)


def test_the_fused_adam_is_for_gpus(monkeypatch):
    torch = pytest.importorskip("torch")
    from steps import torch_optimizers

    assert torch_optimizers.names() == ("torch_adam", "torch_adam_srt")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_optimizers.names() == tuple(COUNTERPARTS)
