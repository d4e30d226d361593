"""Tables for the pages, made of the committed lines in benchmarks/results at build time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from compiled import compiled_lines, compiled_report
from images import recipes
from steps import step_report, step_runs
from table import paper_figures, table_runs

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def paper() -> str:
    """The paper's mean test accuracies, and those of what was trained here."""
    here = {"here: JPEG, 4 epochs": "cifar10_jpeg", "here: JPEG, 20 epochs": "cifar10_jpeg_20"}
    runs = [table_runs.load(RESULTS / name / "runs.jsonl")[0] for name in here.values()]
    rows = []
    for name in recipes.OF_THE_PAPER:
        figures = [f"{paper_figures.PAPER[s][name].mean:.2f}" for s in paper_figures.SETTINGS]
        for of_table in runs:
            found = [100 * run.test_accuracy for key, run in of_table.items() if key[1] == name]
            figure = f"{statistics.mean(found):.2f}" if found else "–"
            deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            figures.append(figure + deviation)
        rows.append([f"`{name}`" + " ¹" * (name == paper_figures.NOT_COMPARABLE), *figures])
    return _markdown(["test accuracy, %", *paper_figures.SETTINGS, *here], rows)


def step() -> str:
    """Times, bytes and state of every optimizer's step, to optax.adam, on the Intel CPU."""
    measurements, _ = step_runs.load(RESULTS / "optimizer_step_cpu" / "runs.jsonl")
    older, newer = (s for s in step_report.sections(measurements) if "Intel" in s.device)
    head, rows = ["to `optax.adam`"], []
    for section in (older, newer):
        jax = section.versions.split("jax ")[1].split(",")[0]
        head += [f"{model}, jax {jax}" for model in ("ResNet-18", "transformer")]
    for name in dict.fromkeys(name for _, name in older.rows):
        cells = [s.rows.get((m, name)) for s in (older, newer) for m in ("resnet18", "transformer")]
        times = [f"{c.figures.ratio_to_adam.median:.2f}" if c else "–" for c in cells]
        figures = older.rows["resnet18", name].figures
        rows.append(
            [f"`{name}`", *times, f"{figures.bytes_ratio:.2f}", f"{figures.state_ratio:.2f}"]
        )
    return _markdown([*head, "bytes", "state"], rows)


def compiled() -> str:
    """Kernels, and passes over the parameters, of every optimizer's step on an H100."""
    programs, _ = compiled_lines.load(RESULTS / "compiled_for_gpu" / "runs.jsonl")
    newest = [s for s in compiled_report.sections(programs) if s.gpu == "h100"][-1]
    of_models = {model: rows for (kind, model), rows in newest.tables().items() if kind == "step"}
    rows = []
    for name in compiled_lines.OPTIMIZERS:
        found = [of_model.get(name) for of_model in of_models.values()]
        rows.append([f"`{name}`", *map(_kernels_and_passes, found)])
    return _markdown(["", *of_models], rows)


def _kernels_and_passes(row: compiled_report.Row | None) -> str:
    return f"{row.last.figures.kernels}, {compiled_report.passes(row.last):.1f}" if row else "–"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"paper": paper, "step": step, "compiled": compiled}
