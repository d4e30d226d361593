"""The optimizer step's benchmark: what is timed, the command, and the report from its lines."""

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optimizer_step
import spherical_optax as so
import step_programs
import step_report
import step_runs
import timing
from step_programs import Program, Tree, measure
from step_runs import COUNTERPARTS, OPTIMIZERS, Figures, Measurement, Setting
from timing import Spread


def make_tiny(model="resnet20"):
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
    setting = Setting(model, optimizer, rounds, device, versions)
    return Measurement(setting, "abc", FIGURES._replace(**figures))


# What is timed.


def test_the_transformer_is_gpt2_small_with_a_sphere_per_row_or_feature():
    shapes = step_programs.transformer_shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 124_439_808
    lines = so.describe(shapes, so.by_path({"kernel": -1, "embedding": 0})).splitlines()
    groups = {line.split()[0]: line.split(maxsplit=2)[2] for line in lines[1:]}
    assert groups["token_embedding"] == "50257 × 768"
    assert groups["blocks/11/mlp_out/kernel"] == "768 × 3072"
    assert groups["blocks/0/query_key_value/kernel"] == "2304 × 768"
    assert groups["blocks/0/mlp_in/bias"] == groups["norm/scale"] == "classic"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_is_the_optimizers_and_works_in_place(name):
    tree = make_tiny()
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


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("adamw", "muon")])
def test_coupled_decay_is_part_of_the_step(name):
    tree = make_tiny()
    tx = step_programs.make_optimizer(name, tree.channel_axes)
    zeros = jax.tree.map(jnp.zeros_like, tree.params)
    updates, _ = tx.update(zeros, tx.init(tree.params), tree.params)
    x, step = tree.params["head"]["bias"], updates["head"]["bias"]
    assert jnp.all(x * step < 0)
    decay = step_programs.LEARNING_RATE * step_programs.WEIGHT_DECAY
    if name in ("sgd", "sgd_mrt"):
        np.testing.assert_allclose(step, -decay * x, rtol=1e-5)


def test_muon_orthogonalises_the_convolutions_as_matrices():
    tree = make_tiny()
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


# PyTorch's.


def test_torch_adam_srt_is_ours():
    torch = pytest.importorskip("torch")
    import torch_optimizers

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
    import torch_optimizers

    program = torch_optimizers.torch_program(name, make_tiny())
    program.step()
    program.wait()
    steps = 3 if name == "torch_adam" else 0  # a counter in a tensor per parameter
    assert program.state_bytes == 4 * (numbers + steps)


def test_the_fused_adam_is_for_gpus(monkeypatch):
    torch = pytest.importorskip("torch")
    import torch_optimizers

    assert torch_optimizers.names() == ("torch_adam", "torch_adam_srt")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_optimizers.names() == tuple(COUNTERPARTS)


# The command.


@pytest.fixture
def quick(monkeypatch):
    """A tiny tree instead of every network's, single steps, and no measured copy."""
    monkeypatch.setattr(step_programs, "make_tree", make_tiny)
    monkeypatch.setattr(step_programs, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda rounds: 1e9)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.fixture
def faked(quick, monkeypatch):
    """Nothing is compiled: the figures are always the same. Yields the names of the optimizers."""
    compiled = []
    adam = Program(lambda: None, lambda: None, lambda: None, 1)
    monkeypatch.setattr(step_programs, "jax_program", lambda name, _: compiled.append(name) or adam)
    monkeypatch.setattr(step_programs, "measure", lambda *_, **__: FIGURES)
    return compiled


def run(output, *arguments):
    return optimizer_step.main(["--output", str(output), *arguments])


def read(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_the_command_measures_and_goes_on_from_what_is_there(quick, tmp_path, capsys, monkeypatch):
    names = ("adam", "adam_srt")
    assert run(tmp_path, "--models=resnet20", f"--optimizers={','.join(names)}", "--rounds=2") == 0
    lines = read(tmp_path)
    assert [line["optimizer"] for line in lines] == list(names)
    assert {line["model"] for line in lines} == {"resnet20"}
    adam, srt = lines
    assert adam["state_bytes"] == 2 * 4 * 97 + 4 and adam["state_ratio"] == 1
    state = so.adam_srt(1e-3, channel_axes=so.by_path({"conv": -1})).init(make_tiny().params)
    assert srt["state_bytes"] == step_programs.nbytes(state)
    assert srt["bytes_ratio"] == srt["bytes_accessed"] / adam["bytes_accessed"]
    assert adam["parameter_bytes"] == 4 * 97 and adam["compile_seconds"] > 0
    assert 0 < srt["seconds"]["q1"] <= srt["seconds"]["median"] <= srt["seconds"]["q3"]
    assert srt["device"].startswith("cpu (") and srt["versions"]["jax"] == jax.__version__
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert "| adam_srt |" in (tmp_path / "table.md").read_text()
    assert "2 measured, 0 there" in capsys.readouterr().out

    monkeypatch.setattr(timing, "copy_bandwidth", None)  # not called again
    assert run(tmp_path, "--models=resnet20", "--optimizers=adam_srt", "--rounds=2") == 0
    assert read(tmp_path) == lines
    assert "0 measured, 1 there" in capsys.readouterr().out


def test_torch_is_measured_beside_its_counterpart(quick, tmp_path):
    torch = pytest.importorskip("torch")
    options = ["--models=resnet20", "--optimizers=sgd", "--rounds=2", "--torch"]
    assert run(tmp_path, *options) == 0
    sgd, adam, srt = read(tmp_path)
    assert "torch" not in sgd["versions"] and sgd["ratio_of_ours"] is None
    assert srt["versions"]["torch"] == torch.__version__ and srt["bytes_accessed"] is None
    assert (adam["optimizer"], srt["optimizer"]) == ("torch_adam", "torch_adam_srt")
    assert srt["ratio_of_ours"]["median"] > 0
    assert "`adam_srt` takes " in (tmp_path / "table.md").read_text()


def test_an_interrupted_command_goes_on(faked, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*_, **__):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return FIGURES

    monkeypatch.setattr(step_programs, "measure", interrupted)
    options = ["--models=resnet20,vgg16", "--optimizers=adam,sgd"]
    assert run(tmp_path, *options) == 130
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("optimizer_step.py: interrupted; what ")
    assert len(read(tmp_path)) == 2
    assert run(tmp_path, *options) == 0
    cells = [(line["model"], line["optimizer"]) for line in read(tmp_path)]
    expected = [(model, name) for model in ("resnet20", "vgg16") for name in ("adam", "sgd")]
    assert cells == expected and len(calls) == 5


def test_other_rounds_or_versions_are_measured_again(faked, tmp_path, monkeypatch):
    options = ["--models=resnet20", "--optimizers=sgd"]
    assert [run(tmp_path, *options), run(tmp_path, *options, "--rounds=3")] == [0, 0]
    assert [line["rounds"] for line in read(tmp_path)] == [20, 3]
    monkeypatch.setattr("cifar.report.versions", lambda: {"jax": "0.99"})
    assert run(tmp_path, *options) == 0
    assert len(read(tmp_path)) == 3


def test_a_failure_is_told_and_the_others_are_measured(faked, tmp_path, capsys, monkeypatch):
    def fail(name, tree):
        if name == "muon":
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand much more")
        return Program(lambda: None, lambda: None, lambda: None, 1)

    monkeypatch.setattr(step_programs, "jax_program", fail)
    assert run(tmp_path, "--models=resnet18", "--optimizers=sgd,muon,adam_s") == 1
    out, err = capsys.readouterr()
    message = "optimizer_step.py: failed: muon on resnet18: RESOURCE_EXHAUSTED: no memory"
    assert err.splitlines()[-1] == message
    assert [line["optimizer"] for line in read(tmp_path)] == ["sgd", "adam_s"]
    assert "2 measured" in out and (tmp_path / "table.md").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--models=resnet50"], "unknown 'resnet50' (choose from resnet20, resnet18, vgg16"),
        (["--optimizers=adam,adam"], "adam is named twice"),
        (["--rounds=0"], "'0' is not an integer from 1"),
        (["--round=3"], "unrecognized arguments: --round=3"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "new", *arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_done_is_refused(faked, tmp_path, capsys, monkeypatch):
    assert run(tmp_path / "new", "--report") == 2
    assert "there are no measurements in" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run(tmp_path / "file") == 2
    assert "cannot create" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run(tmp_path / "new", "--torch") == 2
    err = capsys.readouterr().err
    assert "--torch needs PyTorch" in err and len(err.splitlines()) == 1
    assert not (tmp_path / "new").exists() and not faked


def test_a_torch_without_the_gpu_is_refused(faked, tmp_path, capsys, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(tmp_path / "new", "--torch") == 2
    assert "JAX runs on a GPU that this PyTorch cannot use" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_help_shows_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        optimizer_step.main(["--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert "default: 20" in out and "runs/optimizer_step)" in out and "examples:" in out


# The report.


def test_lines_come_back_as_they_were(tmp_path):
    measurements = [
        make_measurement("vgg16", "adam_srt"),
        make_measurement("vgg16", "torch_adam", torch="2.13", ratio_of_ours=Spread(0.1, 0.2, 0.3)),
    ]
    lines = b"".join(map(step_runs.to_line, measurements))
    (tmp_path / "runs.jsonl").write_bytes(b'{"model": "vg\n\n5\n' + lines + lines[:100])
    assert step_runs.load(tmp_path / "runs.jsonl") == (measurements, [1, 3, 6])
    assert step_runs.load(tmp_path / "none.jsonl") == ([], [])


def test_the_table_has_a_section_per_device_and_a_table_per_model():
    ours = Spread(0.25, 0.26, 0.27)
    parts = step_report.sections(
        [
            make_measurement("resnet18", "adam_srt"),
            make_measurement("resnet18", "adam", state_ratio=1.0),
            make_measurement("resnet20", "adam"),
            make_measurement("resnet18", "adam_srt", rounds=5, ratio_to_adam=Spread(0.9, 1, 2)),
            make_measurement("resnet18", "torch_adam_srt", torch="2.13", ratio_of_ours=ours),
            make_measurement("transformer", "muon", device="gpu (H100)", bytes_accessed=None),
        ]
    )
    text = step_report.table(parts)
    headings = [line for line in text.splitlines() if line.startswith("##")]
    assert headings == [
        "## cpu (2 cores)",
        "### resnet20 (44.7 MB of parameters)",
        "### resnet18 (44.7 MB of parameters)",
        "## gpu (H100)",
        "### transformer (44.7 MB of parameters)",
    ]
    assert "* versions: python 3.11.7, jax 0.10.2, torch 2.13\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| adam")]
    times, rest = "10.1 (9.90–12.0)", "358 | 0.667 | 44.8 | 0.501 | 0 | 1.50 | 71 % |"
    assert rows[1] == f"| adam | {times} | 1.23 (1.21–1.25) | 20 | {rest}".replace("0.501", "1.00")
    assert rows[2] == f"| adam_srt | {times} | 1.00 (0.900–2.00) | 20 | {rest}"  # the last line
    assert "* `adam_srt` takes 0.260 (0.250–0.270) of the time of `torch_adam_srt`.\n" in text
    assert "command: `python benchmarks/optimizer_step.py --models transformer --opt" in text
    assert "--optimizers adam --rounds 20 --torch`" in text


def test_the_command_that_measured_all_names_neither():
    every = [
        make_measurement(model, name)
        for model in step_runs.MODELS
        for name in (*OPTIMIZERS, *COUNTERPARTS)
    ]
    text = step_report.table(step_report.sections(every))
    assert "command: `python benchmarks/optimizer_step.py --rounds 20 --torch`\n" in text


def test_report_makes_the_table_again(tmp_path, capsys):
    measurements = [
        make_measurement("resnet18", "adam_srt"),
        make_measurement("transformer", "muon", device="gpu (H100)", bytes_accessed=None),
    ]
    (tmp_path / "runs.jsonl").write_bytes(b"".join(map(step_runs.to_line, measurements)) + b"{")
    assert run(tmp_path, "--report") == 0
    out, err = capsys.readouterr()
    assert "warning: line 3 of" in err and "2 there" in out
    assert (tmp_path / "table.md").read_text().count("###") == 2
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.tmp")) and len(list(Path(tmp_path).iterdir())) == 3
