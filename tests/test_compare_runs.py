"""The picture and the table that overlay runs, and what is refused."""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

import compare_runs
from images import recipes
from made_runs import make_run

pytestmark = pytest.mark.filterwarnings("error")


def column(directory: Path, key: str) -> list[float]:
    return [json.loads(x)[key] for x in (directory / "metrics.jsonl").read_text().splitlines()]


def groups_of(*directories: Path) -> list[compare_runs.Group]:
    return compare_runs.group_runs(compare_runs.find_runs(directories))


def labels_of(*directories: Path) -> list[str]:
    groups = groups_of(*directories)
    return [compare_runs.label(group, groups) for group in groups]


def test_the_command(tmp_path, capsys):
    runs, output = tmp_path / "runs", tmp_path / "new.png"
    sgd = {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.00025}
    for seed, accuracy in enumerate((0.9, 0.92, 0.97)):
        make_run(runs / f"adamsrt/seed-{seed}", seed=seed, test_accuracy=accuracy)
    make_run(runs / "sgd/a", **sgd, test_accuracy=0.5)
    make_run(runs / "sgd/b", **sgd, seed=1, done=2)
    assert compare_runs.main([str(runs), "--output", str(output)]) == 0
    out, err = capsys.readouterr()

    def best(optimizer: str) -> str:
        values = [
            100 * max(column(path.parent, "valid_accuracy"))
            for path in (runs / optimizer).rglob("metrics.jsonl")
        ]
        return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"

    assert err == ""
    head, *rows, foot = out.splitlines()
    assert head == "resnet20 on digits, epochs 4, batch_size 32, precision float32"
    # (90, 92, 97): mean 93, sample variance (9 + 1 + 16) / 2 = 13.
    assert [row.split("  ") for row in map(squeeze, rows)] == [
        [
            "optimizer",
            "learning_rate",
            "weight_decay",
            "n",
            "epochs",
            "test accuracy (%)",
            "best validation (%)",
        ],
        ["adamsrt", "0.001", "7.8125e-06", "3", "4", "93.00 ± 3.61", best("adamsrt")],
        ["sgd", "0.1", "0.00025", "2, 1 unfinished", "2 to 4 of 4", best("sgd")],
    ]
    assert foot == f"The curves are in {output}."
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) >= 600
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "new.png"}


def squeeze(row: str) -> str:
    """A row of a table with exactly two spaces between its columns."""
    return "  ".join(filter(None, (cell.strip() for cell in row.split("  "))))


def test_lines_are_means_and_bands_deviations(tmp_path):
    lengths = (9, 9, 6)
    paths = [
        make_run(tmp_path / f"{seed}", seed=seed, epochs=9, done=done)
        for seed, done in enumerate(lengths)
    ]
    single = make_run(tmp_path / "single", optimizer="sgd", epochs=9, done=7)
    figure = compare_runs.draw(groups_of(*paths, single))
    figure.draw_without_rendering()
    for row, key, scale in ((0, "train_loss", 1), (1, "valid_accuracy", 100)):
        values = np.full((3, 9), np.nan)
        for i, path in enumerate(paths):
            values[i, : lengths[i]] = [scale * v for v in column(path, key)]
        mean, deviation = np.nanmean(values, axis=0), np.nanstd(values, axis=0, ddof=1)
        for col, start in ((0, 0), (1, 6)):
            ax = figure.axes[2 * row + col]
            line, other = ax.lines
            np.testing.assert_array_equal(line.get_xdata(), np.arange(start + 1, 10))
            np.testing.assert_allclose(line.get_ydata(), mean[start:], rtol=1e-12)
            alone = [scale * v for v in column(single, key)][start:]
            np.testing.assert_allclose(other.get_ydata(), alone, rtol=1e-12)
            band, none = ax.collections
            corners = band.get_paths()[0].vertices
            for epoch in range(start, 9):
                heights = corners[corners[:, 0] == epoch + 1, 1]
                np.testing.assert_allclose(
                    [heights.min(), heights.max()],
                    [mean[epoch] - deviation[epoch], mean[epoch] + deviation[epoch]],
                    rtol=1e-12,
                )
            assert not none.get_paths()
    assert figure.axes[0].get_ylabel() == "training loss (nats)"
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[2].get_ylabel() == "validation accuracy (%)"
    assert figure.axes[2].get_xlabel() == figure.axes[3].get_xlabel() == "epoch"
    (legend,) = figure.legends
    assert "± sample deviation" in legend.get_title().get_text()
    assert [text.get_text() for text in legend.get_texts()] == [
        "adamsrt (n = 3, 3 unfinished)",
        "sgd (n = 1, 1 unfinished)",
    ]


def test_no_band_where_one_seed_is_left(tmp_path):
    paths = [make_run(tmp_path / f"{n}", seed=n, done=n) for n in (2, 4)]
    figure = compare_runs.draw(groups_of(*paths))
    (band,) = figure.axes[0].collections
    assert set(band.get_paths()[0].vertices[:, 0]) == {1, 2}
    np.testing.assert_allclose(  # the line goes on with the one that is left
        figure.axes[0].lines[0].get_ydata()[2:], column(paths[1], "train_loss")[2:], rtol=1e-12
    )


def test_seven_groups_can_be_told_apart_in_grey(tmp_path):
    for optimizer in recipes.OF_THE_PAPER:
        make_run(tmp_path / optimizer, optimizer=optimizer)
    figure = compare_runs.draw(groups_of(tmp_path))
    lines = figure.axes[0].lines
    assert len(lines) == 7
    weights = (0.299, 0.587, 0.114)  # of a conversion to grey
    lightness = sorted(np.dot(to_rgb(line.get_color()), weights) for line in lines)
    assert lightness[-1] < 0.75  # visible on white
    assert np.diff(lightness).min() > 0.03
    assert len({line.get_marker() for line in lines}) == 7
    # Groups with the same dashes differ clearly in lightness.
    for i, j in itertools.combinations(range(7), 2):
        if compare_runs.LINES[i % 5] == compare_runs.LINES[j % 5]:
            ends = [np.dot(to_rgb(lines[k].get_color()), weights) for k in (i, j)]
            assert abs(ends[0] - ends[1]) > 0.1


def test_looks_do_not_return():
    sizes = [len(x) for x in (compare_runs.COLORS, compare_runs.MARKERS, compare_runs.LINES)]
    assert math.lcm(*sizes) == math.prod(sizes) == 280


def test_labels_name_what_differs(tmp_path):
    first = make_run(tmp_path / "a", test_accuracy=0.912)
    assert labels_of(first) == ["adamsrt (n = 1): test 91.20 %"]
    # Each optimizer has its own learning rate and decay: they go without saying.
    sgd = make_run(tmp_path / "b", optimizer="sgd", learning_rate=0.1, weight_decay=0.00025)
    assert labels_of(sgd, first) == ["sgd (n = 1, 1 unfinished)", "adamsrt (n = 1): test 91.20 %"]
    fast = [
        make_run(tmp_path / f"c{seed}", learning_rate=0.01, seed=seed, test_accuracy=0.5)
        for seed in range(2)
    ]
    assert labels_of(first, sgd, *fast) == [
        "adamsrt, learning_rate 0.001 (n = 1): test 91.20 %",
        "sgd (n = 1, 1 unfinished)",
        "adamsrt, learning_rate 0.01 (n = 2): test 50.00 ± 0.00 %",
    ]
    half = make_run(tmp_path / "d", precision="bfloat16", batch_size=64)
    assert labels_of(sgd, half) == [
        "sgd, batch_size 32, precision float32 (n = 1, 1 unfinished)",
        "adamsrt, batch_size 64, precision bfloat16 (n = 1, 1 unfinished)",
    ]
    assert compare_runs.title(groups_of(sgd, half)) == "resnet20 on digits, epochs 4"
    assert compare_runs.title(groups_of(first)) == (
        "resnet20 on digits, epochs 4, batch_size 32, "
        "learning_rate 0.001, weight_decay 7.8125e-06, precision float32"
    )


def test_watching_the_geometry_does_not_change_a_run(tmp_path):
    make_run(tmp_path / "old")  # of a time when --geometry was not there
    for seed, geometry in ((1, True), (2, False)):
        make_run(tmp_path / f"{seed}", seed=seed, geometry=geometry)
    assert labels_of(tmp_path) == ["adamsrt (n = 3, 3 unfinished)"]
    assert "geometry" not in compare_runs.title(groups_of(tmp_path))


def test_of_the_same_run_twice_the_finished_one_counts(tmp_path, capsys):
    cut = make_run(tmp_path / "cut", done=2)
    whole = make_run(tmp_path / "whole", test_accuracy=0.5)
    for directories in ([cut, whole], [whole, cut]):
        ((run,),) = compare_runs.group_runs(compare_runs.find_runs(directories))
        assert run.directory == whole
        assert capsys.readouterr().err == f"{cut} is left out: {whole} got further.\n"


def test_a_run_named_twice_counts_once(tmp_path):
    run = make_run(tmp_path / "runs/a", test_accuracy=0.5)
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    named = run, tmp_path / "runs", tmp_path / "link", run / ".." / "a"
    assert labels_of(*named) == ["adamsrt (n = 1): test 50.00 %"]


def test_runs_of_one_command_and_of_several_are_seeds_alike(tmp_path):
    alone = make_run(tmp_path / "alone", seeds=1)  # as in the directory of a command
    beside = [make_run(tmp_path / f"three/seed-{seed}", seed=seed) for seed in (1, 2, 3)]
    (tmp_path / "three/arguments.json").write_text("{}")  # of the command, with no metrics beside
    ((*group,),) = groups_of(tmp_path)
    assert [run.directory for run in group] == [alone, *beside]
    assert labels_of(tmp_path) == ["adamsrt (n = 4, 4 unfinished)"]


def test_a_run_under_way(tmp_path, capsys):
    run, output = make_run(tmp_path / "run", done=3), tmp_path / "compare.png"
    metrics = run / "metrics.jsonl"
    text = metrics.read_text()
    for end in range(len(text) - 1, text.rindex("\n", 0, -1), -20):
        metrics.write_text(text[:end])
        ((read,),) = groups_of(run)
        whole = end == len(text) - 1  # without its newline only
        assert len(read.train_loss) == (3 if whole else 2)
    metrics.write_text('{"epo')
    waiting = f"{run} has not finished an epoch: left out.\n"
    assert compare_runs.main([str(run), "--output", str(output)]) == 2
    refusal = "compare_runs.py: error: no run has finished an epoch\n"
    assert capsys.readouterr() == ("", waiting + refusal)
    assert not output.exists()
    make_run(tmp_path / "other", seed=1, done=1)
    assert compare_runs.main([str(tmp_path), "--output", str(output)]) == 0
    out, err = capsys.readouterr()
    assert "1, 1 unfinished  1 of 4" in out and err == waiting and output.exists()


@pytest.mark.parametrize("losses", [(0.0, 0.0), (1e-9, 2.0), (1.0, 1.0)])
def test_losses_that_a_logarithm_cannot_show(losses, tmp_path):
    for seed, loss in enumerate(losses):
        metrics = make_run(tmp_path / f"{seed}", seed=seed, epochs=1) / "metrics.jsonl"
        line = json.loads(metrics.read_text()) | {"train_loss": loss, "valid_accuracy": seed}
        metrics.write_text(json.dumps(line) + "\n")
    figure = compare_runs.draw(groups_of(tmp_path))
    compare_runs.write_picture(tmp_path / "compare.png", figure)
    low, high = figure.axes[0].get_ylim()
    assert low <= sum(losses) / 2 <= high
    assert low >= sum(losses) / 20 or low < 0  # the band does not stretch the logarithmic axis
    assert figure.axes[1].get_ylim()[1] <= 101


def test_text_is_drawn_as_it_is(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, dataset=rf"folder:/$\{name}$/" + "long" * 60)  # no formula
    for directory in (tmp_path / "a", tmp_path):  # in the title, in the legend
        figure = compare_runs.draw(groups_of(directory))
        compare_runs.write_picture(tmp_path / "compare.png", figure)


DAMAGES = {
    "arguments.json, line 1: damaged, not JSON": ("}", ""),
    "arguments.json, line 1: damaged, not a JSON object": ("{", "[{"),
    "arguments.json: damaged, model is missing": ('"model"', '"mode"'),
    "arguments.json: damaged, seed is missing or no": ('"seed": 0', '"seed": []'),
    "metrics.jsonl, line 2: damaged, not JSON": ('{"epoch": 2', '{"epoch": '),
    "metrics.jsonl, line 3: damaged, not JSON": ('{"epoch": 3', "\0\0"),
    "metrics.jsonl, line 2: damaged, it is not of": ('"epoch": 2', '"epoch": 3'),
    "metrics.jsonl, line 1: damaged, train_loss is": ('"train_loss"', '"loss"'),
    "metrics.jsonl, line 1: damaged, train_loss is not a finite number from 0": (
        '"train_loss": ',
        '"train_loss": NaN, "": ',
    ),
    "metrics.jsonl, line 1: damaged, valid_accuracy is not a finite number from 0 to 1": (
        '"valid_accuracy": 0.',
        '"valid_accuracy": 1.',
    ),
    "summary.json, line 2: damaged, not JSON": ('"test_accuracy":', ""),
    "summary.json: damaged, test_accuracy is": ("0.5", '"0.5"'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named(message, tmp_path, capsys):
    make_run(tmp_path / "runs/whole", seed=1, test_accuracy=0.5)
    run = make_run(tmp_path / "runs/damaged", test_accuracy=0.5)
    old, new = DAMAGES[message]
    file = run / re.split("[,:]", message)[0]
    text = file.read_text()
    assert old in text
    text = text.replace(old, new, 1)
    file.write_text(text + "]" if new == "[{" else text)
    assert_refused([tmp_path / "runs"], tmp_path / "compare.png", f"{run}/{message}", capsys)


def assert_refused(directories, output, message, capsys):
    before = sorted(output.parent.rglob("*"))
    try:
        code = compare_runs.main([*map(str, directories), "--output", str(output)])
    except SystemExit as error:
        code = error.code
    assert code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("usage:")]
    assert out == "" and len(lines) == 1
    assert lines[0].startswith("compare_runs.py: error: ") and message in lines[0]
    assert sorted(output.parent.rglob("*")) == before
