"""The optimizer step's command: what it measures, skips and refuses; the report from its lines."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import optimizer_step
import spherical_optax as so
from common import timing
from common.run_lines import Spread
from steps import step_programs, step_report, step_runs
from steps.step_programs import Program
from steps.step_runs import COUNTERPARTS, OPTIMIZERS
from tiny_step import FIGURES, make_measurement, make_tree


@pytest.fixture
def quick(monkeypatch):
    """A tiny tree instead of every network's, single steps, and no measured copy."""
    monkeypatch.setattr(step_programs, "make_tree", make_tree)
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
    state = so.adam_srt(1e-3, channel_axes=so.by_path({"conv": -1})).init(make_tree().params)
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
    monkeypatch.setattr("training.environment.versions", lambda: {"jax": "0.99"})
    assert run(tmp_path, *options) == 0
    assert len(read(tmp_path)) == 3


def test_with_other_steps_of_a_call_it_is_measured_again(faked, tmp_path, monkeypatch):
    options = ["--models=resnet20", "--optimizers=sgd"]
    assert run(tmp_path, *options) == 0
    lines = (tmp_path / "runs.jsonl").read_text()
    (tmp_path / "runs.jsonl").write_text(lines.replace('"steps_per_call": 1, ', ""))  # an old line
    assert run(tmp_path, *options) == 0
    assert len(read(tmp_path)) == 1
    monkeypatch.setattr(step_programs, "steps_per_call", lambda: 20)
    assert run(tmp_path, *options) == 0
    assert [line.get("steps_per_call") for line in read(tmp_path)] == [None, 20]


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


def test_torch_that_is_missing(faked, tmp_path, capsys, monkeypatch):
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


def test_help_and_refusals_start_no_jax():
    program = (
        "import sys, optimizer_step\n"
        "for arguments in (['--help'], ['--rounds', '0'], ['--report', '--output', 'nowhere']):\n"
        "    try: optimizer_step.main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'matplotlib', 'torch'} & sys.modules.keys()))"
    )
    directory = Path(optimizer_step.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "default: 20" in done.stdout and "runs/optimizer_step)" in done.stdout
    assert "examples:" in done.stdout


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
