"""What pages say of GPUs, measured on one or compiled without, is in the raw results."""

import json

import numpy as np

import tables
from compiled import beside, compiled_lines, compiled_report
from steps import step_runs
from test_docs import RESULTS, ROOT, unwrapped
from test_readme import rows_of
from throughput import throughput_report

MEASUREMENTS = unwrapped("docs/measurements.md")
NOTES = " ".join((ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8").split())


def of_the_gpu():
    """What `training_throughput.py` measured on the GPU, by kind, model, program and seeds."""
    lines, _ = throughput_report.load(RESULTS / "training_throughput_gpu" / "runs.jsonl")
    names = ("kind", "model", "program", "seeds")
    found = {tuple(line[name] for name in names): line for line in lines.values()}
    assert len(found) == len(lines)  # each model in one precision and batch size
    return found


def test_what_is_said_of_trainings_on_a_gpu_is_in_the_raw_results():
    lines, readme = of_the_gpu(), unwrapped("README.md")
    names = ("adam", "adamsrt", "torch_eager", "torch_compiled")
    steps = [lines["steps", "resnet18", name, 1] for name in names]
    rates = [f"{line['images_per_second']['median']:,.0f}" for line in steps]
    said = (
        "with {} images/s with `adam` and {} with `adam_srt`, where PyTorch with Adam reaches {} "
    )
    assert f"{said}eagerly and {{}} compiled".format(*rates) in MEASUREMENTS
    srt, compiled = (steps[i]["ratio_to_adam"] for i in (1, 3))
    assert f"takes {srt['median']:.3f} times as long with `adam_srt`" in readme
    assert f"which takes {compiled['q1']:.1f} to {compiled['q3']:.1f} times as long in" in readme
    assert f"| {100 * steps[0]['peak_share']:.0f} %; {compiled['median']:.2f} |" in NOTES
    minutes = lines["epoch", "resnet18", "adam", 1]["projected_minutes"]
    assert f"would take {minutes:.1f} minutes" in MEASUREMENTS
    assert f"| {minutes:.1f} minutes, projected" in NOTES
    one, four = (lines["epoch", "resnet20", "adam", n]["epoch_seconds"]["median"] for n in (1, 4))
    assert f"[{one:.2f} s]" in MEASUREMENTS
    assert f"take {four / one:.2f} times as long" in MEASUREMENTS
    assert f"| at once {four / one:.2f}; in turn" in NOTES


def test_what_is_said_of_steps_on_a_gpu_is_in_the_raw_results():
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_gpu" / "runs.jsonl")
    rows = {m.setting[:2]: m.figures for m in measurements}
    models = ("resnet18", "transformer")
    srt = [rows[model, "adam_srt"] for model in models]
    times = [f"{figures.ratio_to_adam.median:.2f}" for figures in srt]
    said = (
        "the ratio of `adam_srt`, {} (ResNet-18) and {} (transformer) of `optax.adam`, says little"
    )
    assert said.format(*times) in MEASUREMENTS
    moved = [f"{figures.bytes_ratio:.2f}" for figures in srt]
    assert "its bytes are {} and {} of Adam's".format(*moved) in MEASUREMENTS
    of_adam = [
        [1e3 * f.seconds.median / f.ratio_to_adam.median for (of, _), f in rows.items() if of == m]
        for m in models
    ]
    ranges = [f"{min(found):.1f} to {max(found):.1f}" for found in of_adam]
    said = (
        "`optax.adam` beside the rows took from {} ms on ResNet-18 and from {} on the transformer"
    )
    assert said.format(*ranges) in MEASUREMENTS
    plain = [f"{rows[model, 'torch_adam_srt'].ratio_of_ours.median:.3f}" for model in models]
    assert "GPU: ResNet-18 {}, transformer {}".format(*plain) in NOTES
    fused = [f"{rows[model, 'torch_adam_fused'].ratio_to_adam.median:.2f}" for model in models]
    assert "PyTorch's fused Adam {} and {} of `optax.adam`".format(*fused) in MEASUREMENTS


def test_what_is_compiled_without_a_gpu_is_what_one_runs():
    programs, _ = compiled_lines.load(RESULTS / "compiled_for_gpu" / "runs.jsonl")
    steps = {
        (of.setting.model, of.setting.optimizer): of.figures
        for of in programs
        if (of.setting.gpu, of.setting.kind) == ("h200", "step")
        and of.git_revision == "cbb6f0b63399bbe72934fa6c70e4162c7253e919"
    }
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_gpu" / "runs.jsonl")
    ratios, same = [], 0
    for of in measurements:
        if of.figures.bytes_accessed:
            program = steps[of.setting.model, of.setting.optimizer]
            ratios.append(of.figures.bytes_accessed / program.nbytes)
            same += of.figures.temporary_bytes == program.temporary_bytes
    assert (len(ratios), same) == (10, 9)
    np.testing.assert_allclose(ratios, 1, atol=4e-5)


def test_the_predictions_are_made_from_the_committed_programs():
    programs, _ = compiled_lines.load(RESULTS / "compiled_for_gpu" / "runs.jsonl")
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_gpu" / "runs.jsonl")
    text = (RESULTS / "optimizer_step_gpu" / "predicted.md").read_text(encoding="utf-8")
    assert text == beside.beside(programs, measurements)


def test_the_kernels_are_those_of_the_compiled_programs():
    lines = (RESULTS / "compiled_for_gpu" / "runs.jsonl").read_text().splitlines()
    last = {}
    for line in map(json.loads, lines):
        if (line["kind"], line["gpu"]) == ("step", "h100"):
            passes = f"{line['nbytes'] / line['parameter_bytes']:.1f}"
            last[line["model"], line["optimizer"]] = f"{line['kernels']}, {passes}"
    (_, *models), _, *rows = rows_of(tables.compiled())
    said = {
        (model, label.strip("`")): cell
        for label, *cells in rows
        for model, cell in zip(models, cells, strict=True)
    }
    assert said == last and len(said) == 56


def test_what_is_said_of_compiled_steps_is_in_the_raw_results():
    programs, _ = compiled_lines.load(RESULTS / "compiled_for_gpu" / "runs.jsonl")
    newest = [part for part in compiled_report.sections(programs) if part.gpu == "h100"][-1]
    rows = {name: newest.rows["step", "resnet18", name].last for name in compiled_lines.OPTIMIZERS}
    said = {
        name: (str(row.figures.kernels), f"{compiled_report.passes(row):.1f}")
        for name, row in rows.items()
    }
    assert f"ResNet-18 has {said['adam_srt'][0]} kernels instead of" in unwrapped("CHANGELOG.md")
    notes = rows_of((ROOT / "benchmarks" / "NOTES.md").read_text())
    now = {row[0]: row[-2].strip("*") for row in notes if row[0].startswith("`") and len(row) == 5}
    assert len(now) == 6
    for name, words in now.items():
        key = "adam+geometry" if "with_geometry" in name else name.split("`")[1]
        assert words == ", ".join(said[key])
