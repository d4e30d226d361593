"""The optimizer step's benchmark: what is timed, and how."""

import gc
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spherical_optax as so
from common import timing
from compiled import kernels
from steps import step_programs
from steps.step_programs import Program, measure
from steps.step_runs import OPTIMIZERS
from tiny_step import make_tree


def test_the_transformer_is_gpt2_small_with_a_sphere_per_row_or_feature():
    shapes = step_programs.transformer_shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
    lines = so.describe(shapes, so.by_path({"kernel": -1, "embedding": 0})).splitlines()
    groups = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines[1:-1]}
    assert groups["token_embedding"] == "50257 × 768"
    assert groups["blocks/0…11/mlp_out/kernel"] == "768 × 3072"
    assert groups["blocks/0…11/query_key_value/kernel"] == "2304 × 768"
    assert groups["blocks/0…11/mlp_in/bias"] == groups["norm/scale"] == "classic"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_is_the_optimizers_and_works_in_place(name):
    tree = make_tree()
    tx = step_programs.make_optimizer(name, tree.channel_axes)
    state = jax.tree.map(jnp.copy, tx.init(tree.params))
    compiled = step_programs.compile_step(tx, state, tree.params, tree.grads)
    updates, expected_state = tx.update(tree.grads, state, tree.params)
    new_params = optax.apply_updates(tree.params, updates)
    expected = jax.tree.map(np.array, (expected_state, new_params))  # not of what is donated

    donated = step_programs.nbytes((state, tree.params))
    assert compiled.memory_analysis().alias_size_in_bytes == donated
    # A result in the buffer of another argument would need a copy of that.
    assert "copy(%params" not in compiled.as_text()
    found = compiled(state, tree.params, tree.grads)
    # Fused operations round otherwise, and Muon's iterations enlarge that.
    tolerance = 1e-3 if name == "muon" else 1e-5
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-7), found, expected)


@pytest.mark.parametrize("name", ["adam", "adam_srt", "muon_h"])
def test_steps_of_one_call_are_those_of_several(name, monkeypatch):
    tree = make_tree()
    one = step_programs.jax_program(name, tree)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(step_programs, "STEPS", 3)
    three = step_programs.jax_program(name, tree)
    for _ in range(3):
        one.step()
    three.step()
    assert (one.steps, three.steps, three.bytes_accessed) == (1, 3, one.bytes_accessed)
    tolerance = 1e-4 if name == "muon_h" else 1e-5  # its iterations enlarge rounding
    same = partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-7)
    jax.tree.map(same, three.wait(), one.wait())


def test_what_depends_on_the_gradients_alone_is_in_every_step_of_a_call():
    tree = make_tree()

    def init(params):
        return optax.EmptyState()

    def update(grads, state, params):
        return jax.tree.map(jnp.sin, grads), state

    tx = optax.GradientTransformation(init, update)
    compiled = step_programs.compile_step(tx, init(None), tree.params, tree.grads, steps=3)
    launched = kernels.launches(compiled.as_text())
    assert {kernel.times for kernel in launched if kernel.kind == "fusion"} == {3}


@pytest.mark.parametrize("name", ["adam", "sgd", "adam_s", "adam_srt", "adam_g", "sgd_mrt"])
def test_coupled_decay_is_part_of_the_step(name):
    tree = make_tree()
    tx = step_programs.make_optimizer(name, tree.channel_axes)
    zeros = jax.tree.map(jnp.zeros_like, tree.params)
    updates, _ = tx.update(zeros, tx.init(tree.params), tree.params)
    x, step = tree.params["head"]["bias"], updates["head"]["bias"]
    assert jnp.all(x * step < 0)
    decay = step_programs.LEARNING_RATE * step_programs.WEIGHT_DECAY
    if name in ("sgd", "sgd_mrt"):
        np.testing.assert_allclose(step, -decay * x, rtol=1e-5)


def test_muon_orthogonalises_the_convolutions_as_matrices():
    tree = make_tree()
    tx = step_programs.make_optimizer("muon", tree.channel_axes)
    updates, _ = tx.update(tree.grads, tx.init(tree.params), tree.params)
    singular = np.linalg.svd(updates["conv"]["kernel"].reshape(18, 4))[1]
    # Five Newton-Schulz iterations end between 0.7 and 1.2, by the choice of their coefficients.
    np.testing.assert_allclose(singular / step_programs.LEARNING_RATE, 1, atol=0.35)
    head = jnp.abs(updates["head"]["kernel"])  # Adam's first step is as long in every element
    np.testing.assert_allclose(head, head[0, 0], rtol=1e-5)


# How it is timed, on a clock that the programs wind.


class Clock:
    def __init__(self, monkeypatch):
        self.now, self.slow = 0.0, lambda: 1.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(gc, "collect", lambda: None)  # slow among many tests

    def program(self, seconds, **figures):
        begun = []

        def wait():
            self.now += seconds * len(begun) * self.slow()
            begun.clear()

        return Program(
            lambda: begun.append(1), wait, lambda: None, **({"state_bytes": 8} | figures)
        )


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


COMMON = {"parameter_bytes": 100, "bandwidth": 1000.0}


def test_a_call_of_several_steps_is_shared_out(clock):
    program, adam = clock.program(0.03, steps=3), clock.program(0.02, steps=4)
    found = measure(program, adam, 6, **COMMON)
    assert found.steps_per_timing == 6  # 2 calls are 60 ms
    assert found.seconds == pytest.approx([0.01] * 3)
    assert found.ratio_to_adam == pytest.approx([2.0] * 3)


def test_figures_are_those_of_one_step(clock):
    program = clock.program(0.01, state_bytes=4, bytes_accessed=6.0, compile_seconds=2.5)
    adam = clock.program(0.004, state_bytes=8, bytes_accessed=12.0)
    found = measure(program, adam, 6, **COMMON)
    assert (found.timings, found.steps_per_timing) == (6, 8)  # 8 steps of 10 ms are 50 ms or more
    assert found.seconds == pytest.approx([0.01] * 3)
    assert found.ratio_to_adam == pytest.approx([2.5] * 3)
    assert (found.state_ratio, found.bytes_ratio, found.compile_seconds) == (0.5, 0.5, 2.5)
    assert found.bandwidth_share == pytest.approx(6 / 0.01 / 1000)
    assert found.ratio_of_ours is None


def test_ratios_are_taken_within_rounds(clock, monkeypatch):
    times = {"program": [2.0, 4.0, 9.0], "adam": [1.0, 4.0, 3.0], "ours": [1.0, 1.0, 9.0]}
    asked = []

    def interleave(programs, rounds, *, pause, on_round):
        asked.append((list(programs), rounds, pause))
        on_round()
        return times

    monkeypatch.setattr(timing, "interleave", interleave)
    renewed = []
    program = clock.program(0.1)._replace(renew=lambda: renewed.append(1))
    found = measure(program, program, 3, **COMMON, ours=program, pause=0.5)
    assert asked == [(["program", "adam", "ours"], 3, 0.5)]
    assert len(renewed) == 3  # one round of three programs
    assert found.ratio_to_adam == (1.5, 2.0, 2.5)  # of 2, 1 and 3
    assert found.ratio_of_ours == (0.375, 0.5, 0.75)  # of 1/2, 1/4 and 1
    assert found.seconds.median == 4.0


@pytest.mark.parametrize("seconds, rounds", [(0.9, 20), (4.0, 4), (30.0, 3)])
def test_slow_steps_are_timed_less_often(clock, seconds, rounds):
    found = measure(clock.program(seconds), clock.program(min(seconds, 1.0) / 10), 20, **COMMON)
    assert (found.timings, found.steps_per_timing) == (rounds, 1)


def test_a_slow_first_step_does_not_count(clock):
    first = iter([100.0])
    clock.slow = lambda: next(first, 1.0)
    assert measure(clock.program(0.01), clock.program(0.01), 3, **COMMON).steps_per_timing == 8
