"""The README is one screen, and figures, there and on pages, are those of the raw results."""

import importlib
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import plot_geometry
import tables
from architectures import atlas_lines, atlas_report
from images import recipes
from steps import step_report, step_runs
from table import paper_figures, table_report, table_runs
from test_docs import FENCE, RESULTS, ROOT, TEXTS, unwrapped
from throughput import throughput_report

README = TEXTS["README.md"]
MEASUREMENTS = unwrapped("docs/measurements.md")
SPEED = ("optimizer_step", "training_throughput")


def test_it_is_one_screen():
    assert len(README.splitlines()) <= 120


def test_there_are_two_shell_commands():
    shell = [source for language, source in FENCE.findall(README) if language == "bash"]
    assert len(shell) == 2  # one trains, one tests; .ci/run runs both
    assert "train_cifar.py" in shell[0] and "pytest" in shell[1]


def rows_of(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_is_the_papers_and_that_of_the_raw_results():
    rows = rows_of(tables.paper())[2:]
    assert [row[0].split("`")[1] for row in rows] == list(recipes.OF_THE_PAPER)
    results = [
        table_runs.load(RESULTS / name / "runs.jsonl")[0]
        for name in ("cifar10_jpeg", "cifar10_jpeg_20")
    ]
    for (_, *figures), name in zip(rows, recipes.OF_THE_PAPER, strict=True):
        paper = [f"{paper_figures.PAPER[s][name].mean:.2f}" for s in paper_figures.SETTINGS]
        here = []
        for runs in results:
            accuracies = [100 * run.test_accuracy for key, run in runs.items() if key[1] == name]
            figure = f"{np.mean(accuracies):.2f}" if accuracies else "–"
            deviation = f" ± {np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
            here.append(figure + deviation)
        assert figures == paper + here
    assert rows[list(recipes.OF_THE_PAPER).index("adamg")][0] == "`adamg` ¹"


@pytest.mark.parametrize("name", ["cifar10_jpeg", "cifar10_jpeg_20", "cifar10_jpeg_20_cpu"])
def test_the_committed_tables_are_made_from_the_committed_runs(name):
    directory = RESULTS / name
    runs, broken = table_runs.load(directory / "runs.jsonl")
    assert runs and not broken
    assert (directory / "table.md").read_text(encoding="utf-8") == table_report.table(runs)


def test_the_differences_are_those_of_the_raw_results():
    table = (RESULTS / "cifar10_jpeg_20" / "table.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+ − \w+) \| (.+?) \| 2 \| (.+?) \|$", table, re.M)
    (srt, s, mrt) = (figures for _, *figures in rows)
    assert [pair for pair, *_ in rows] == ["adamsrt − adam", "adams − adam", "sgdmrt − sgd"]
    assert (
        "AdamSRT − Adam {} ({}), AdamS − Adam {} ({}), SGD-MRT − SGD {} ({}).".format(
            *srt, *s, *mrt
        )
    ) in unwrapped("README.md")
    said = (
        "AdamSRT − Adam is {0} points and AdamS − Adam {2}, where the paper has {1} and {3} after"
    )
    assert said.format(*srt, *s) in MEASUREMENTS
    runs = {
        name: {
            key[1:]: 100 * run.test_accuracy
            for key, run in table_runs.load(RESULTS / name / "runs.jsonl")[0].items()
        }
        for name in ("cifar10_jpeg_20", "cifar10_jpeg_20_cpu")
    }
    here, cpu = runs.values()
    each = [here["sgdmrt", seed] - here["sgd", seed] for seed in (0, 1)]
    said = "SGD-MRT − SGD is {} (in the paper {}), of +{:.2f} and +{:.2f};"
    assert said.format(*mrt, *each) in MEASUREMENTS
    higher, lower = cpu["adam", 0] - here["adam", 0], here["sgd", 0] - cpu["sgd", 0]
    said = f"Adam's seed 0 ended {higher:.2f} points higher, and SGD's {lower:.2f} lower"
    assert said in MEASUREMENTS


def test_the_curves_are_of_the_runs_in_the_table():
    """The picture's directories hold what the table's lines do."""
    found = {}
    for summary in (RESULTS / "cifar10_jpeg_20" / "cells").glob("*/*/*/*/summary.json"):
        trained = json.loads(summary.read_text())
        asked = trained["arguments"]
        lines = (summary.parent / "metrics.jsonl").read_text().splitlines()
        found[asked["optimizer"], asked["seed"]] = {
            "setting": "cifar10/resnet20",
            **trained,
            "curve": [json.loads(line) for line in lines],
        }
    lines = (RESULTS / "cifar10_jpeg_20" / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    asked = [run["arguments"] for run in runs]
    assert found == {
        (of["optimizer"], of["seed"]): run for of, run in zip(asked, runs, strict=True)
    }
    assert len(found) == 12 and {len(run["curve"]) for run in runs} == {20}


def test_the_times_are_those_of_the_raw_results():
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_cpu" / "runs.jsonl")
    older, newer = (s for s in step_report.sections(measurements) if "Intel" in s.device)
    assert "jax 0.10.2" in older.versions and "jax 0.12.0" in newer.versions
    rows = rows_of(tables.step())[2:]
    assert {label.strip("`") for label, *_ in rows} == {name for _, name in older.rows}
    for label, *said in rows:
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
    assert f"`muon_h` takes {ratio:.2f} of the time of `optax.contrib.muon`" in MEASUREMENTS
    amd = next(s for s in step_report.sections(measurements) if "AMD" in s.device)
    plain = [
        f"{amd.rows[model, 'torch_adam_srt'].figures.ratio_to_adam.median:.1f}"
        for model in ("resnet18", "transformer")
    ]
    assert "AdamSRT in plain PyTorch {} and {} times".format(*plain) in MEASUREMENTS


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
        MEASUREMENTS,
    )
    ours = [rates[jax, name] for jax in ("0.10.2", "0.12.0.1") for name in ("adam", "adamsrt")]
    torch = [rates["0.10.2", name] for name in ("torch_eager", "torch_compiled")]
    assert said and list(said.groups()) == ours + torch


def test_the_committed_speed_tables_are_made_from_the_committed_runs(tmp_path):
    programs = {f"{name}_{device}": name for name in SPEED for device in ("cpu", "gpu")}
    programs["geometry_cpu"] = "training_throughput"
    programs["compiled_for_gpu"] = "compiled_for_gpu"
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
    said = re.search(
        r"took ([\d.]+) of its time at batch 32 and ([\d.]+) at batch 128", unwrapped("docs/see.md")
    )
    assert said and [*said.groups()] == [ratios["adam+geometry", size] for size in (32, 128)]


def test_the_pictures_of_spheres_are_of_the_committed_runs(tmp_path, capsys):
    page = TEXTS["docs/see.md"].replace("\\\n", " ").replace("$optimizer", "adam")
    plots = [
        shlex.split(rest) for rest in re.findall(r"python examples/plot_geometry.py (.+)", page)
    ]
    assert len(plots) == 2
    for arguments in plots:
        runs, picture = Path(arguments[0]).name, arguments[arguments.index("--output") + 1]
        committed = RESULTS / runs
        assert f"(../{committed.relative_to(ROOT)}/{picture})" in page
        options = [str(tmp_path / picture) if text == picture else text for text in arguments[1:]]
        assert plot_geometry.main([str(committed), *options]) == 0
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"
        for summary in committed.glob("*/summary.json"):
            trained = json.loads(summary.read_text())
            asked = trained["arguments"]
            assert trained["device"].startswith("cpu (") and "dirty" not in trained["git_revision"]
            decay = f"--weight_decay {asked['weight_decay']:g} --geometry --output runs/{runs}/"
            assert decay in " ".join(page.split()) and asked["optimizer"] == summary.parent.name


def test_what_the_readme_claims_is_in_the_raw_results():
    claims = unwrapped("README.md")
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_cpu" / "runs.jsonl")
    older = next(s for s in step_report.sections(measurements) if "Intel" in s.device)
    figures = older.rows["resnet18", "adam_srt"].figures
    assert f"takes {figures.ratio_to_adam.median:.2f} of the time of `optax.adam`" in claims
    assert f"{figures.bytes_ratio:.2f}" == "1.00" and "moves as many bytes" in claims
    assert f"keeps {figures.state_ratio:.2f} of its state" in claims
    table = rows_of(
        "\n".join(
            atlas_report.table(
                atlas_lines.latest(atlas_lines.load(RESULTS / "atlas" / "atlas.jsonl")[0])
            )
        )
    )
    share = {row[0].split("]")[0].strip("["): row[1] for row in table[2:]}
    assert len(share) == 13 and "thirteen architectures" in claims
    assert share["ResNet, BatchNorm"] == share["ResNet, GroupNorm"] == "97 %"
    assert share["Gemma 3"] == share["OLMo 2"] == "77 %"
    assert (share["Qwen3"], share["Llama 3"]) == ("17 %", "0 %")
    for words in ("97 % of the weights of a ResNet's blocks", "77 % of Gemma 3's and OLMo 2's"):
        assert words in claims
    assert "17 % of Qwen3's and none of Llama 3's" in claims


def test_what_is_said_of_the_papers_means_is_so():
    def means(name):
        return np.array([paper_figures.PAPER[s][name].mean for s in paper_figures.SETTINGS])

    gain = means("adamsrt") - means("adam")
    assert gain.min() > 0.245 and gain.max() < 4.05  # 0.3 to 4.0
    small = np.array(["cifar100" not in setting for setting in paper_figures.SETTINGS])
    behind = means("sgd") - means("adamsrt")
    assert behind[small].max() < 0.65
    assert behind[~small].min() > 1.75 and behind[~small].max() < 2.35
    assert (means("sgd") - means("sgdmrt"))[~small].max() < 0.55


def test_the_differences_of_language_models_are_those_of_the_raw_results():
    table = (RESULTS / "lm_sweep_cpu" / "table.md").read_text(encoding="utf-8")
    to_adamw = {"muon": [], "adam_": []}
    for name, difference in re.findall(r"^\| (muon|adam_)\w* \|.* \| ([+-]\S+) \|", table, re.M):
        to_adamw[name].append(float(difference))
    assert [len(found) for found in to_adamw.values()] == [8, 8]
    (muon, most), (below, above) = ((min(x), max(x)) for x in to_adamw.values())
    readme = unwrapped("README.md")
    assert f"`muon_h` and `muon` are {-most:.2f} to {-muon:.2f} nats per byte below AdamW" in readme
    assert f"between {-below:.2f} below and {above:.2f} above" in readme
