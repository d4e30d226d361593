"""The README: its Python runs and prints what it says, and its commands are understood."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import plot_geometry
from images import recipes
from steps import step_report, step_runs
from table import paper_table, table_runs
from throughput import throughput_report

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
RESULTS = ROOT / "benchmarks" / "results"
SPEED = ("optimizer_step", "training_throughput")
ONE_LINE = README.replace("\\\n", " ").replace("$optimizer", "adam")
UNWRAPPED = " ".join(README.split())
COMMANDS = re.findall(r"python (?:examples|benchmarks)/(\w+)\.py (.+)", ONE_LINE)


def test_the_python_blocks_run_and_print_what_the_text_says(compiled_quickly, capsys):
    namespace = {}
    pairs = zip(BLOCKS, [*BLOCKS[1:], ("", "")], strict=True)
    count = 0
    for (language, source), (following, text) in pairs:
        if language == "python":
            exec(compile(source, "README.md", "exec"), namespace)
            count += 1
            printed = capsys.readouterr().out
            if following == "text":
                assert printed == text
    assert count >= 4


def test_there_are_two_shell_commands():
    shell = [source for language, source in BLOCKS if language == "bash"]
    assert len(shell) == 2  # one trains, one tests; .ci/run runs both
    assert "train_cifar.py" in shell[0] and "pytest" in shell[1]


def test_the_commands_are_found():
    examples = {"train_cifar", "train_lm", "compare_runs", "plot_geometry"}
    assert {name for name, _ in COMMANDS} == examples | {"reproduce_table", "atlas", *SPEED}


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_the_commands_are_understood(name, arguments, capsys):
    command = importlib.import_module(name)
    with pytest.raises(SystemExit) as end:  # arguments before --help are checked
        command.main([*shlex.split(arguments), "--help"])
    assert end.value.code == 0 and "--output" in capsys.readouterr().out


def test_the_table_is_the_papers_and_that_of_the_raw_results():
    lines = README[README.index("| test accuracy, %") :].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:9]]
    assert [row[0].split("`")[1] for row in rows] == list(recipes.OF_THE_PAPER)
    results = [
        table_runs.load(RESULTS / name / "runs.jsonl")[0] for name in ("cifar10_jpeg", "digits")
    ]
    for (_, *figures), name in zip(rows, recipes.OF_THE_PAPER, strict=True):
        paper = [f"{paper_table.PAPER[s][name].mean:.2f}" for s in paper_table.SETTINGS]
        here = []
        for runs in results:
            accuracies = [100 * run.test_accuracy for key, run in runs.items() if key[1] == name]
            figure = f"{np.mean(accuracies):.2f}" if accuracies else "–"
            deviation = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
            here.append(figure + deviation)
        assert figures == paper + here
    assert rows[list(recipes.OF_THE_PAPER).index("adamg")][0] == "`adamg` ¹"


@pytest.mark.parametrize("name", ["cifar10_jpeg", "cifar10_jpeg_20", "digits"])
def test_the_committed_tables_are_made_from_the_committed_runs(name):
    directory = RESULTS / name
    runs, broken = table_runs.load(directory / "runs.jsonl")
    assert runs and not broken
    assert (directory / "table.md").read_text(encoding="utf-8") == paper_table.table(runs)


def test_the_times_are_those_of_the_raw_results():
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_cpu" / "runs.jsonl")
    older, newer = (s for s in step_report.sections(measurements) if "Intel" in s.device)
    assert "jax 0.10.2" in older.versions and "jax 0.12.0" in newer.versions
    lines = README[README.index("| to `optax.adam` |") :].split("\n\n")[0].splitlines()
    assert len(lines) == 2 + len({name for _, name in older.rows})
    for line in lines[2:]:
        label, *said = [cell.strip() for cell in line.strip("|").split("|")]
        name, expected = label.strip("`"), []
        for section in (older, newer):
            for model in ("resnet18", "transformer"):
                row = section.rows.get((model, name))
                expected.append(f"{row.figures.ratio_to_adam.median:.2f}" if row else "–")
        figures = older.rows["resnet18", name].figures
        expected += [f"{figures.bytes_ratio:.2f}", f"{figures.state_ratio:.2f}"]
        assert said == expected, label
    of_muon = [older.rows["transformer", name].figures for name in ("muon_h", "muon")]
    ratio = of_muon[0].ratio_to_adam.median / of_muon[1].ratio_to_adam.median
    assert f"`muon_h` takes {ratio:.2f} of the time of `optax.contrib.muon`" in UNWRAPPED
    amd = next(s for s in step_report.sections(measurements) if "AMD" in s.device)
    plain = [
        f"{amd.rows[model, 'torch_adam_srt'].figures.ratio_to_adam.median:.1f}"
        for model in ("resnet18", "transformer")
    ]
    assert "AdamSRT in plain PyTorch {} and {} times".format(*plain) in UNWRAPPED


def test_the_images_per_second_are_those_of_the_raw_results():
    lines, _ = throughput_report.load(RESULTS / "training_throughput_cpu" / "runs.jsonl")
    rates = {
        (line["versions"]["jax"], line["program"]): f"{line['images_per_second']['median']:.0f}"
        for line in lines.values()
        if line["kind"] == "steps" and line["batch_size"] == 128
    }
    said = re.search(
        r"at batch 128 with (\d+) images/s with `adam` and (\d+) with `adam_srt` \(jax 0.12: (\d+) "
        r"and (\d+)\), where PyTorch reaches (\d+) eagerly and (\d+) compiled",
        UNWRAPPED,
    )
    ours = [rates[jax, name] for jax in ("0.10.2", "0.12.0.1") for name in ("adam", "adamsrt")]
    torch = [rates["0.10.2", name] for name in ("torch_eager", "torch_compiled")]
    assert said and list(said.groups()) == ours + torch


def test_the_committed_speed_tables_are_made_from_the_committed_runs(tmp_path):
    programs = {f"{name}_cpu": name for name in SPEED} | {"geometry_cpu": "training_throughput"}
    for name, program in programs.items():
        directory, copy = RESULTS / name, tmp_path / name
        copy.mkdir()
        (copy / "runs.jsonl").write_bytes((directory / "runs.jsonl").read_bytes())
        assert importlib.import_module(program).main(["--report", "--output", str(copy)]) == 0
        assert (copy / "table.md").read_bytes() == (directory / "table.md").read_bytes()


def test_the_cost_of_measuring_is_that_of_the_raw_results():
    lines, _ = throughput_report.load(RESULTS / "geometry_cpu" / "runs.jsonl")
    ratios = {
        (line["program"], line["batch_size"]): f"{line['ratio_to_adam']['median']:.2f}"
        for line in lines.values()
    }
    said = re.search(r"took ([\d.]+) of its time at batch 32 and ([\d.]+) at batch 128", README)
    assert said and [*said.groups()] == [ratios["adam+geometry", size] for size in (32, 128)]


def test_the_pictures_of_spheres_are_of_the_committed_runs(tmp_path, capsys):
    plots = [shlex.split(rest) for name, rest in COMMANDS if name == "plot_geometry"]
    assert len(plots) == 2
    for arguments in plots:
        runs, picture = Path(arguments[0]).name, arguments[arguments.index("--output") + 1]
        committed = RESULTS / runs
        assert (
            committed / picture
        ).exists() and f"({committed.relative_to(ROOT)}/{picture})" in README
        options = [str(tmp_path / picture) if text == picture else text for text in arguments[1:]]
        assert plot_geometry.main([str(committed), *options]) == 0
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
        for summary in committed.glob("*/summary.json"):
            trained = json.loads(summary.read_text())
            asked = trained["arguments"]
            assert trained["device"].startswith("cpu (") and "dirty" not in trained["git_revision"]
            decay = f"--weight_decay {asked['weight_decay']:g} --geometry --output runs/{runs}/"
            assert decay in " ".join(ONE_LINE.split()) and asked["optimizer"] == summary.parent.name


def test_the_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
