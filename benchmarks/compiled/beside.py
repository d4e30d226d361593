"""What was predicted of steps beside what `optimizer_step.py` measured, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.words import number
from compiled import compiled_report, targets
from compiled.compiled_lines import Compiled
from steps import step_report
from steps.step_runs import Measurement


def beside(programs: Sequence[Compiled], measurements: Sequence[Measurement]) -> str:
    """A table for each device and model: times measured, and predicted.

    Predicted for the GPU that was measured, if programs were compiled for it, and else for all.

    Args:
      programs: the last line of a program counts.
      measurements: likewise.
    """
    newest: dict[
        str, dict[tuple[str, str, str], compiled_report.Row]
    ] = {}  # of each GPU, the last line of each program
    for part in compiled_report.sections(programs):
        newest.setdefault(part.gpu, {}).update(part.rows)
    lines = ["# Steps of optimizers, predicted and measured", ""]
    for part in step_report.sections(measurements):
        same = [gpu for gpu in newest if f"({targets.GPUS[gpu].name})" in part.device]
        head = ["measured, ms", "to adam", "accessed, of copy bandwidth"]
        for gpu in same or newest:
            head += [f"predicted for {targets.GPUS[gpu].name}, ms", "to adam"]
        lines += [f"## Measured on {part.device}", ""]
        for model, rows in part.models().items():
            lines += [f"### {model}", "", f"| optimizer | {' | '.join(head)} |"]
            lines.append(f"|---|{'---:|' * len(head)}")
            for name, measurement in rows.items():
                figures = measurement.figures
                share = figures.bandwidth_share
                cells = [
                    number(figures.seconds.median, 1e3),
                    f"{figures.ratio_to_adam.median:.2f}",
                    "–" if share is None else f"{100 * share:.0f} %",
                ]
                for gpu in same or newest:
                    cells += _predicted(newest[gpu], model, name)
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


def _predicted(
    rows: Mapping[tuple[str, str, str], compiled_report.Row], model: str, name: str
) -> list[str]:
    row, adam = (rows.get(("step", model, optimizer)) for optimizer in (name, "adam"))
    if row is None:
        return ["–", "–"]
    seconds = sum(compiled_report.predicted(row.last))
    ratio = f"{seconds / sum(compiled_report.predicted(adam.last)):.2f}" if adam else "–"
    return [number(seconds, 1e3), ratio]
