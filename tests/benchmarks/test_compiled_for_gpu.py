"""The command that compiles for GPUs: what it compiles, skips and refuses; the report."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import compiled_for_gpu
from compiled import compiled_lines, compiled_programs, compiled_report, targets
from compiled.compiled_lines import Compiled, Figures, Setting
from training.command import Refused

COMMAND = Path(compiled_for_gpu.__file__)


FIGURES = Figures(
    parameter_bytes=4_000_000,
    spherical_leaves=20,
    kernels=100,
    nbytes=28_000_000,
    temporary_bytes=16_388,
    kinds={"fusion": 98, "copy": 2},
    collective_bytes=0,
    compile_seconds=2.5,
)


@pytest.fixture
def faked(monkeypatch):
    """Nothing is compiled: the figures are always the same. Yields the settings asked for."""
    asked = []
    monkeypatch.setattr(targets, "prepare", lambda: {"jax-cuda12-plugin": "0.12"})
    monkeypatch.setenv("XLA_FLAGS", targets.FLAG)
    monkeypatch.setattr(targets, "devices", lambda gpu, count: [])
    monkeypatch.setattr(
        compiled_programs, "compile_and_count", lambda setting: asked.append(setting) or FIGURES
    )
    monkeypatch.setattr("training.environment.find_git_revision", lambda: "abc")
    yield asked
    jax.config.update("jax_enable_compilation_cache", True)


def run(output, *arguments):
    return compiled_for_gpu.main(["--output", str(output), *arguments])


def read(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_the_command_compiles_and_goes_on_from_what_is_there(faked, tmp_path, capsys, monkeypatch):
    options = ["--models=resnet18", "--optimizers=adam,adam_g", "--gpus=a100"]
    assert run(tmp_path, *options) == 0
    lines = read(tmp_path)
    assert [(line["kind"], line["optimizer"]) for line in lines] == [
        *(("step", "adam"), ("step", "adam_g")),
        *(("sharded", "adam"), ("sharded", "adam_g")),
        ("training", "adam"),
    ]
    assert [line["devices"] for line in lines] == [1, 1, 4, 4, 1]
    assert (lines[-1]["batch_size"], lines[-1]["precision"]) == (512, "bfloat16")
    assert {line["git_revision"] for line in lines} == {"abc"}
    assert lines[0]["versions"]["jax"] == jax.__version__
    assert lines[0]["versions"]["jax-cuda12-plugin"] == "0.12"
    assert "5 compiled, 0 there; the table is in " in capsys.readouterr().out

    assert run(tmp_path, *options) == 0
    assert "0 compiled, 5 there; " in capsys.readouterr().out and len(faked) == 5
    monkeypatch.setattr("training.environment.find_git_revision", lambda: "def")
    assert run(tmp_path, *options) == 0
    assert [line["git_revision"] for line in read(tmp_path)] == ["abc"] * 5 + ["def"] * 5


def test_predictions_stand_beside_measurements(faked, tmp_path, capsys):
    assert run(tmp_path, "--models=resnet18", "--optimizers=adam,adam_g", "--gpus=h100") == 0
    measured = tmp_path / "measured"
    assert run(tmp_path, "--beside", str(measured)) == 2
    assert "there are no measurements in " in capsys.readouterr().err
    shutil.copytree(COMMAND.parent / "results" / "optimizer_step_cpu", measured)
    assert run(tmp_path / "none", "--beside", str(measured)) == 2
    assert "there are no programs in " in capsys.readouterr().err

    assert run(tmp_path, "--beside", str(measured)) == 0
    text = (measured / "predicted.md").read_text()
    of_model = text.partition("### resnet18")[2].partition("###")[0]
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in of_model.splitlines()[4:-1]}
    bytes_and_launches = 28e6 / targets.GPUS["h100"].bandwidth + 100 * 2e-6
    assert rows["adam_g"][-2:] == [f"{1e3 * bytes_and_launches:.3f}", "1.00 |"]
    assert rows["sgd"][-2:] == ["–", "– |"]
    assert float(rows["adam_g"][0]) > float(rows["adam"][0])  # as measured, in ms


def test_predictions_are_for_the_gpu_that_was_measured(faked, tmp_path):
    assert run(tmp_path, "--models=resnet18", "--optimizers=adam", "--gpus=h100,h200") == 0
    measured = tmp_path / "measured"
    shutil.copytree(COMMAND.parent / "results" / "optimizer_step_gpu", measured)
    assert run(tmp_path, "--beside", str(measured)) == 0
    text = (measured / "predicted.md").read_text()
    assert "predicted for NVIDIA H200, ms" in text and "H100" not in text


def test_a_failure_is_told_and_the_others_are_compiled(faked, tmp_path, capsys, monkeypatch):
    def fail(setting):
        if setting.optimizer == "muon":
            raise RuntimeError("RESOURCE_EXHAUSTED: no memory\nand much more")
        return FIGURES

    monkeypatch.setattr(compiled_programs, "compile_and_count", fail)
    assert run(tmp_path, "--models=vgg16", "--optimizers=sgd,muon,adam_s", "--gpus=h100") == 1
    out, err = capsys.readouterr()
    message = "failed: step muon on vgg16 for h100: RESOURCE_EXHAUSTED: no memory"
    assert err.splitlines()[-1] == f"compiled_for_gpu.py: {message}"
    assert [line["optimizer"] for line in read(tmp_path)] == ["sgd", "adam_s"]
    assert "2 compiled, 0 there" in out and (tmp_path / "table.md").exists()


def test_an_interrupted_command_goes_on(faked, tmp_path, capsys, monkeypatch):
    def interrupted(setting):
        if setting.optimizer == "sgd":
            raise KeyboardInterrupt
        return FIGURES

    options = ["--models=vgg16", "--optimizers=adamw,sgd", "--gpus=h100"]
    with monkeypatch.context() as patched:
        patched.setattr(compiled_programs, "compile_and_count", interrupted)
        assert run(tmp_path, *options) == 130
    assert "interrupted; what " in capsys.readouterr().err.splitlines()[-1]
    assert [line["optimizer"] for line in read(tmp_path)] == ["adamw"]
    assert run(tmp_path, *options) == 0
    assert [line["optimizer"] for line in read(tmp_path)] == ["adamw", "sgd"]


@pytest.mark.parametrize("module", ["jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"])
def test_a_plugin_that_is_missing(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(targets, "_is_there", lambda name: name != module)
    assert run(tmp_path / "new") == 2
    assert capsys.readouterr().err == (
        f"compiled_for_gpu.py: error: to compile for GPUs JAX needs {module}, which is missing: "
        "pip install '.[gpu_compile]'\n"
    )
    assert not (tmp_path / "new").exists()


def test_a_plugin_that_does_not_start(tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("UNKNOWN: no such target\nand much more")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuse)
    with pytest.raises(Refused, match=r"does not start \(UNKNOWN: no such target\): pip install"):
        targets.devices("a100", 4)


def test_help_and_refusals_start_no_jax():
    program = (
        "import sys, compiled_for_gpu\n"
        "for arguments in (['--help'], ['--gpus', 'x'], ['--report', '--output', 'nowhere']):\n"
        "    try: compiled_for_gpu.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=COMMAND.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "runs/compiled_for_gpu)" in done.stdout and "of h100,h200,a100" in done.stdout
    assert "examples:" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or not all(map(targets._is_there, targets._NEEDED)),
    reason="JAX's plugin for CUDA is missing: pip install '.[gpu_compile]'",
)
def test_steps_are_compiled_for_a_gpu(tmp_path):
    """What a step of Adam is: one loop over mu, nu and x of each leaf, seven passes."""
    options = ["--models=resnet20", "--optimizers=adam,adam_s", f"--output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, COMMAND, *options, "--gpus=h100"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(COMMAND.parents[1])},
    )
    assert done.returncode == 0, done.stderr
    adam, spherical, training = read(tmp_path)
    leaves = 65  # 21 kernels, 21 scales and 21 biases of norms, a linear layer's two
    assert leaves <= adam["kernels"] <= leaves + 3
    assert adam["nbytes"] / adam["parameter_bytes"] == pytest.approx(7, rel=0.01)
    assert adam["spherical_leaves"] == 21 and adam["collective_bytes"] == 0
    assert spherical["kernels"] > adam["kernels"]
    assert training["kinds"]["custom-call"] >= 3 * 20  # each convolution and its two gradients


# The report.


def made(kind="step", model="resnet18", optimizer="adam", *, revision="abc", **changes):
    own = {name: changes.pop(name) for name in list(changes) if name in Setting._fields}
    devices, precision, batch_size = compiled_lines._how(kind, model)
    setting = Setting(
        *(kind, model, optimizer, "h100", devices, precision, batch_size),
        versions={"jax": "0.12"},
        flags="--no",
    )
    return Compiled(setting._replace(**own), revision, FIGURES._replace(**changes))


def rows_of(programs):
    text = compiled_report.table(compiled_report.sections(programs))
    return text, [line for line in text.splitlines() if line.startswith("| adam")]


def test_lines_come_back_as_they_were(tmp_path):
    programs = [made(), made("training", "vgg16", "adam_srt", temporary_bytes=None)]
    lines = b"".join(map(compiled_lines.to_line, programs))
    wrong = [
        *(made(kernels=101), made(kernels=0, kinds={}), made(parameter_bytes=0)),
        *(made("sharded", "vgg16"), made(optimizer="lamb"), made(gpu="tpu"), made(devices=0)),
    ]
    lines += b"".join(map(compiled_lines.to_line, wrong))
    (tmp_path / "runs.jsonl").write_bytes(b'{"model": "vg\n\n5\n' + lines + lines[:100])
    broken = [1, 3, *range(6, 6 + len(wrong)), 6 + len(wrong)]
    assert compiled_lines.load(tmp_path / "runs.jsonl") == (programs, broken)


def test_the_table_says_what_is_predicted():
    text, rows = rows_of([made(optimizer="adam_srt", kernels=160, nbytes=40_000_000), made()])
    assert rows == [
        "| adam | 100 | 0.0 | 7.0 | 28.0 | 0.016 | 0.208 | 1.00 |",
        "| adam_srt | 160 | 3.0 | 10.0 | 40.0 | 0.016 | 0.332 | 1.59 |",
    ]
    assert sum(compiled_report.predicted(made())) == pytest.approx(28e6 / 3.35232e12 + 200e-6)
    assert text.startswith("# What steps do on a GPU, from compiled programs: predicted, not meas")
    assert "## NVIDIA H100 80GB HBM3, 3.35 TB/s\n" in text
    assert "### resnet18 (4.00 MB of parameters, 20 spherical leaves)\n" in text
    assert "* versions: jax 0.12\n* XLA_FLAGS: `--no`\n* git revision: abc\n" in text
    assert "compiled_for_gpu.py --gpus h100 --models resnet18 --optimizers adam,adam_srt`" in text


def test_fewer_kernels_than_adam_are_negative_or_zero():
    few = [made(optimizer="adamw", kernels=98), made(optimizer="adam_s", kernels=100, nbytes=1)]
    few.append(made(optimizer="adam_g", kernels=99, spherical_leaves=50))
    more = [row.split(" | ")[2] for row in rows_of([made(), *few])[1]]
    assert more == ["0.0", "-0.1", "0.0", "0.0"]


def test_the_table_without_adam_compares_nothing():
    _, rows = rows_of([made(optimizer="adam_s")])
    assert rows == ["| adam_s | 100 | – | 7.0 | 28.0 | 0.016 | 0.208 | – |"]


def test_the_table_of_shared_parameters_has_the_collectives():
    shared = made("sharded", kinds={"fusion": 97, "all-reduce": 2, "all-gather": 1})
    text, rows = rows_of([shared._replace(figures=shared.figures._replace(collective_bytes=3000))])
    assert rows == [
        "| adam | 100 | 0.0 | 28.0 | 28.0 | 0.016 | 2 all-reduce, 1 all-gather | 0.003 |"
    ]
    assert "### resnet18 shared by 4 GPUs (4.00 MB of parameters, 20 spherical leaves)\n" in text


def test_the_table_of_trainings_names_the_batch():
    text, rows = rows_of([made("training", "resnet20", kinds={"fusion": 40, "custom-call": 60})])
    assert rows == ["| adam | 100 | 0.0 | 60 | 0.028 | 0.000 | 0.208 | 1.00 |"]
    assert "### training resnet20, batch 128, float32 (20 spherical leaves)\n" in text


def test_what_was_before_is_of_the_last_line_with_other_figures():
    def of(revision, kernels):
        kinds = {"fusion": kernels}
        return made(optimizer="adam_srt", revision=revision, kernels=kernels, kinds=kinds)

    text, rows = rows_of([of("a", 200), of("b", 160), of("c", 160), made(revision="a"), made()])
    assert rows[0].endswith(" | 1.00 | as now |")
    assert rows[1].startswith("| adam_srt | 160 |") and rows[1].endswith(" | 200, 7.0 |")
    assert "* git revision: abc, c\n* git revision of what is before: a\n" in text
    again = [of("a", 200), of("b", 160), of("c", 200)]
    assert rows_of(again)[1][0].endswith(" | 160, 7.0 |")
    other_batch = made("training", "resnet20", batch_size=64, kernels=1, kinds={"copy": 1})
    assert "before |" not in rows_of([other_batch, made("training", "resnet20")])[0]


def test_other_gpus_versions_and_flags_have_sections_of_their_own():
    others = [made(gpu="a100"), made(versions={"jax": "0.11"}), made(flags="--other")]
    text, rows = rows_of([made(), *others])
    assert len(rows) == 4 and len(re.findall("^## ", text, re.M)) == 4
    assert "## NVIDIA A100-SXM4-80GB, 2.04 TB/s\n" in text and "before |" not in text


def test_report_makes_the_table_again(tmp_path, capsys):
    programs = [made(), made("sharded"), made("training", "vgg16", gpu="a100")]
    lines = b"".join(map(compiled_lines.to_line, programs))
    (tmp_path / "runs.jsonl").write_bytes(lines + b"{")
    assert run(tmp_path, "--report") == 0
    out, err = capsys.readouterr()
    assert "warning: line 4 of" in err and "3 there" in out
    assert (tmp_path / "table.md").read_text().count("###") == 3
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kinds", [("step", "training"), ("sharded",)])
def test_pictures_of_all_and_of_nothing(kinds, tmp_path):
    every = compiled_lines.settings(
        compiled_lines.MODELS, compiled_lines.OPTIMIZERS, tuple(targets.GPUS), {}, ""
    )
    programs = [Compiled(setting, None, FIGURES) for setting in every if setting.kind in kinds]
    compiled_report.draw(tmp_path / "a.png", compiled_report.sections(programs))
    with Image.open(tmp_path / "a.png") as picture:
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).min() < 128
