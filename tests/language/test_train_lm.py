"""The command that trains a language model, and its programs on meshes."""

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import compare_runs
import plot_geometry
import train_lm
from ends import assert_same_end, figures
from language import figures as language_figures
from language import models, programs, recipes, text
from test_processes import start_command, start_processes, wait_for
from training.task import Epoch

pytestmark = pytest.mark.usefixtures("compiled_quickly")
TINY = "--width 16 --depth 2 --heads 2 --context 8 --batch_size 8 --steps 6 --eval_every 2"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A directory of text whose next bytes can be guessed."""
    directory = tmp_path_factory.mktemp("text")
    for i in range(12):
        (directory / f"{i}.txt").write_text("abcdefgh" * (20 + i))
    return directory


COMPILED = {}


@pytest.fixture(scope="module", autouse=True)
def shared_programs(compiled_quickly):
    """Runs of as many steps with the same options, apart from what they write, share programs."""
    compile_trainer = programs.compile_trainer

    def shared(graphdef, tx, content, keys, state, **options):
        leaves, tree = jax.tree.flatten(state)
        key = content.sha256, tree, *((x.shape, x.sharding) for x in leaves), *options.items()
        if key not in COMPILED:
            COMPILED[key] = compile_trainer(graphdef, tx, content, keys, state, **options)
        return COMPILED[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "compile_trainer", shared)
        yield


def run(words, options, output=None):
    arguments = f"--text {words} {TINY} {options}" + (f" --output {output}" if output else "")
    return train_lm.main(arguments.split())


def stop_before(step):
    """What asks before each step whether to stop there."""
    calls = itertools.count(1)
    return lambda: next(calls) == step


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run(words, "--geometry", output) == 0
    return output


def test_it_learns_and_prints_its_validation_loss(words, capsys):
    assert (
        run(words, "--steps 60 --eval_every 20 --learning_rate 0.1 --adam_learning_rate 0.03") == 0
    )
    out = capsys.readouterr().out
    assert re.search(r"^qwen3 of 14,\d{3} parameters with adam_h: learning rate 0\.1 ", out)
    loss, bits = re.search(
        r"Validation loss (\S+) \((\S+) bits per byte\) at step \d+, the lowest", out
    ).groups()
    assert float(loss) < math.log(256) / 3
    assert float(bits) == pytest.approx(float(loss) / math.log(2), abs=1e-3)


def test_it_writes_its_files(whole):
    names = {path.name for path in whole.iterdir()}
    files = {"arguments.json", "metrics.jsonl", "geometry.jsonl", "summary.json", "curves.png"}
    assert names - {".lock", "checkpoints"} == files
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    measured = json.loads((whole / "geometry.jsonl").read_text().splitlines()[-1])
    for layer in range(2):
        assert 0 < measured[f"blocks/attention/query/kernel/{layer}/angle/mean"] < 0.1
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["valid_loss"] == min(line["valid_loss"] for line in lines)
    assert len(summary["arguments"]["text_sha256"]) == 64


def test_a_run_that_was_stopped_goes_on_to_the_same_end(words, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("training.runs.make_stop", lambda signals: stop_before(4))
        assert run(words, "--geometry", tmp_path / "run") == 143
    assert run(words, "--geometry --resume", tmp_path / "run") == 0
    assert_same_end(tmp_path / "run", whole)


def trained(shape, devices, optimizer, steps=3, driver="loop"):
    """The state after some steps on a mesh, their losses, and that of the validation."""
    mesh = programs.make_mesh(jax.devices()[:devices], shape)
    style, size = recipes.ARCHITECTURES["qwen3"], models.Size(64, 16, 2, 4)
    content = text.Text(
        np.arange(500, dtype=np.uint8) % 64, np.arange(99, dtype=np.uint8), (1, 1), ""
    )
    tx = recipes.make_optimizer(
        optimizer, style, learning_rate=0.05, adam_learning_rate=0.01, weight_decay=0.1, clip=1.0
    )

    def make_model(rngs):
        return models.Decoder(size, style, rngs=rngs)

    graphdef, keys, start = programs.start_run(make_model, tx, [0], mesh)
    trainer = programs.compile_trainer(
        graphdef,
        tx,
        content,
        keys,
        start.state,
        shape=(8, 8),
        steps=steps,
        mesh=mesh,
        driver=driver,
    )
    state, losses = start.state, []
    while len(losses) < steps:
        state, batch = trainer.train(state, trainer.shuffle(keys, 1), len(losses))
        losses += np.ravel(batch.loss).tolist()
    return state, losses, trainer.validate(state.params, keys)["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon_h", "adam_srt"])
def test_a_mesh_of_2_by_4_trains_as_one_device(optimizer):
    """To the rounding of float32 and of its sums in another order."""
    state, *of_mesh = trained((2, 4), 8, optimizer)
    alone, *of_one = trained((1, 1), 1, optimizer)
    for a, b in zip(of_mesh, of_one, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    for path, leaf in jax.tree.leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.split("/")[-2:-1] in (["kernel"], ["embedding"]) and "nu" not in name:
            parts = math.prod(leaf.shape) // math.prod(leaf.addressable_shards[0].data.shape)
            assert parts in (4, 1), name
            assert parts == 4 or "radius" in name, name


@pytest.mark.slow
def test_a_scan_of_steps_is_the_loop_of_them():
    ends = [trained((1, 1), 1, "adam_h", driver=driver) for driver in ("loop", "scan")]
    for found, expected in zip(*(end[1:] for end in ends), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("optimizer, calls", [("adam_h", 2), ("adam_srt", 2)])
def test_an_update_of_shared_parameters_gathers_none(optimizer, calls):
    """One all-reduce is of the clip, and one of all groups' sums."""
    mesh = programs.make_mesh(jax.devices(), (2, 4))
    style, size = recipes.ARCHITECTURES["gemma3"], models.Size(64, 16, 2, 4)
    tx = recipes.make_optimizer(
        optimizer, style, learning_rate=0.05, adam_learning_rate=0.01, weight_decay=0.1, clip=1.0
    )
    _, _, start = programs.start_run(
        lambda rngs: models.Decoder(size, style, rngs=rngs), tx, [0], mesh
    )
    state = start.state
    places = jax.tree.map(lambda x: x.sharding, state)

    def update(state, grads):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return programs.TrainState(updates, opt_state)

    mapped = jax.jit(jax.vmap(update), out_shardings=places)
    program = mapped.lower(state, state.params).compile().as_text()
    assert "all-gather" not in program
    assert len(re.findall(r"= .*\ball-reduce(?:-start)?\(", program)) <= calls


def test_runs_are_drawn_as_those_on_images_are(whole, tmp_path, capsys):
    picture = str(tmp_path / "picture.png")
    assert compare_runs.main([str(whole), "--output", picture]) == 0
    table = capsys.readouterr().out
    loss = json.loads((whole / "summary.json").read_text())["valid_loss"]
    assert re.search(rf"adam_h +1 +6 +{loss:.4f} +{loss:.4f}", table), table
    assert "qwen3 on" in table and "validation loss" in table
    assert plot_geometry.main([str(whole), "--output", picture]) == 0


def test_a_line_has_the_mean_learning_rate_of_its_steps():
    schedule = recipes.make_schedule("cosine", 0.1, 20, 4)
    line = language_figures.task(schedule).line(
        Epoch(
            number=8,
            first_step=2,
            items=1,
            loss_sum=0.0,
            counts={},
            scores={"loss": 0.0},
            items_per_second=1.0,
        )
    )
    expected = np.mean([float(schedule(step)) for step in range(2, 8)])
    assert line.learning_rate == pytest.approx(expected, rel=1e-5)  # six digits are written


def test_another_text_is_another_run(words, whole, tmp_path, capsys):
    other = tmp_path / "text"
    other.mkdir()
    for path in words.iterdir():
        (other / path.name).write_text(path.read_text() + "more")
    arguments = f"--text {other} {TINY} --geometry --resume --output {whole}"
    assert train_lm.main(arguments.split()) == 2
    assert "text_sha256" in capsys.readouterr().err


def test_the_selection_is_shown_with_what_is_measured(words, capsys):
    assert run(words, "--optimizer adam_srt --show_selection") == 0
    chosen, measured = capsys.readouterr().out.split("Radially invariant, as measured:")
    assert re.search(r"blocks/attention/query/kernel +2×16×2×8 +4 × 128\n", chosen)
    assert re.search(r"blocks/attention/value/kernel +2×16×2×8 +classic\n", chosen)
    assert re.search(r"blocks/attention/query/kernel +\S+ +4 × 128 +invariant", measured)


def test_help_starts_no_jax():
    code = """import sys, train_lm
try:
    train_lm.main(["--help"])
finally:
    assert "jax" not in sys.modules"""
    environment = os.environ | {"PYTHONPATH": str(Path(train_lm.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr


def in_processes(words, options, output):
    return f"--text {words} {TINY} {options} --output {output}"


@pytest.mark.slow
def test_two_processes_share_the_parameters_and_stop_together(words, tmp_path):
    """They train as one device does, and go on from their checkpoint on another mesh."""
    command, options = Path(train_lm.__file__), "--steps 24 --eval_every 4"
    alone = start_command(
        in_processes(words, options, tmp_path / "alone"), command, JAX_NUM_CPU_DEVICES="1"
    )
    ((code, _, err),) = wait_for([alone])
    assert code == 0, err
    shared = in_processes(words, f"{options} --resume", tmp_path / "shared")
    processes = start_processes(f"{shared} --mesh data=2,fsdp=4", command=command)
    for line in processes[0].stdout or ():
        if line.startswith("step 8/"):
            break
    processes[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in wait_for(processes)] == [143, 143]
    ends = wait_for(start_processes(f"{shared} --mesh data=4,fsdp=2", command=command))
    assert [code for code, _, _ in ends] == [0, 0], ends[0][2]
    assert "going on after step" in ends[0][1]
    expected, found = (figures(tmp_path / name)[1] for name in ("alone", "shared"))
    assert len(found) == len(expected) == 6
    for line, wanted in zip(found, expected, strict=True):
        assert line == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_end(words, tmp_path):
    """Bit for bit, on one device."""
    command = Path(train_lm.__file__)

    def start(output, more=""):
        options = f"--steps 100 --eval_every 4 --geometry {more}"
        arguments = in_processes(words, options, tmp_path / output)
        return start_command(arguments, command, JAX_NUM_CPU_DEVICES="1")

    assert wait_for([start("whole")])[0][0] == 0
    process = start("killed", "--resume")
    for line in process.stdout or ():
        if line.startswith("step 40/"):
            break
    process.kill()
    wait_for([process])
    ((code, _, err),) = wait_for([start("killed", "--resume")])
    assert code == 0, err
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
