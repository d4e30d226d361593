"""The picture of what runs did on their spheres, its prediction, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from matplotlib.colors import to_rgb
from PIL import Image

import compare_runs
import plot_geometry
from images import recipes
from images.models import MODELS
from made_runs import LAYERS, add_geometry, make_run

pytestmark = pytest.mark.filterwarnings("error")
PREDICTED = ("adamw", "sgd", "sgdmrt")


def make(directory: Path, *, momentum=True, layers=LAYERS, **changed) -> Path:
    return add_geometry(make_run(directory, **changed), momentum=momentum, layers=layers)


def recorded(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "geometry.jsonl").read_text().splitlines()]


def edit(file: Path, line: int, **changed) -> None:
    """Change values in a line, counted from 1, of JSON lines."""
    lines = file.read_text().splitlines()
    lines[line - 1] = json.dumps(json.loads(lines[line - 1]) | changed)
    file.write_text("\n".join(lines) + "\n")


def panels(figure, rows: int) -> np.ndarray:
    axes = np.array(figure.axes)
    return axes.reshape(rows, -1)


@pytest.mark.parametrize("model", recipes.MODELS)
def test_layers_come_in_the_networks_order(model, tmp_path):
    state = nnx.state(nnx.eval_shape(lambda: MODELS[model](10, rngs=nnx.Rngs(0))), nnx.Param)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    kernels = [path for path in paths if "conv" in path]
    run = make(tmp_path / "a", model=model, layers=sorted(kernels))
    (read,) = plot_geometry.find_runs([run])
    # NNX sorts the names of a module's parts, but has a list's in their order.
    stem = ["conv1/kernel"] if model.startswith("resnet") else []
    assert read.layers == stem + [path for path in kernels if path not in stem]


def lines_of(ax) -> dict:
    return {line.get_label(): line for line in ax.lines}


def test_the_command(tmp_path, capsys):
    for name in ("adam", "sgd"):
        make(tmp_path / "runs" / name, optimizer=name)
    output = tmp_path / "new.png"
    assert plot_geometry.main([str(tmp_path / "runs"), "--output", str(output)]) == 0
    assert capsys.readouterr() == (f"The curves of 2 runs are in {output}.\n", "")
    with Image.open(output) as picture:
        assert picture.format == "PNG" and min(picture.size) >= 900
        assert np.asarray(picture.convert("L")).std() > 10  # something is drawn
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "new.png"}


def test_each_line_is_a_layer(tmp_path):
    run = make(tmp_path / "a")
    figure = plot_geometry.draw(plot_geometry.find_runs([run]))
    for (ax,), measure in zip(panels(figure, 5), plot_geometry.DEFAULT, strict=True):
        lines = lines_of(ax)
        assert [label for label in lines if label != "mean"] == list(LAYERS)
        for layer in LAYERS:
            values = np.array(recorded(run, f"{layer}/{measure}/mean"))
            expected = np.degrees(values) if measure == "deformation" else values
            np.testing.assert_array_equal(lines[layer].get_xdata(), [1, 2, 3, 4])
            # Exact up to the order of the products that make degrees.
            np.testing.assert_allclose(lines[layer].get_ydata(), expected, rtol=1e-15)
        assert ax.get_yscale() == ("linear" if measure == "deformation" else "log")
        assert ("mean" in lines) == (measure == "angle")
    angle = lines_of(figure.axes[1])
    mean = np.mean([angle[layer].get_ydata() for layer in LAYERS], axis=0)
    np.testing.assert_allclose(angle["mean"].get_ydata(), mean, rtol=1e-15)
    assert angle["mean"].get_linewidth() > 2 * angle[LAYERS[0]].get_linewidth()
    assert [ax.get_ylabel().replace("\n", " ") for ax in figure.axes] == [
        "turn per length of gradient",
        "angle per step (rad)",
        "radius",
        "radial fraction of the momentum",
        "deformation (degrees)",
    ]
    assert figure.axes[-1].get_xlabel() == "epoch"


def test_depth_is_lightness(tmp_path):
    layers = ["conv1/kernel", *(f"blocks/{i}/conv1/kernel" for i in range(11))]
    runs = plot_geometry.find_runs([make(tmp_path / "a", layers=sorted(layers))])
    (ax,) = plot_geometry.draw(runs, ["radius"]).axes
    assert [line.get_label() for line in ax.lines] == layers
    lightness = [np.dot(to_rgb(line.get_color()), (0.299, 0.587, 0.114)) for line in ax.lines]
    assert np.diff(lightness).min() > 0.03  # told apart in grey, too
    assert lightness[-1] < 0.8  # visible on white


def test_rows_share_their_axes(tmp_path):
    for seed in range(3):
        make(tmp_path / f"{seed}", seed=seed, done=seed + 2)
    edit(tmp_path / "1/geometry.jsonl", 1, **{f"{LAYERS[0]}/radius/mean": 1e6})
    runs = plot_geometry.find_runs([tmp_path])
    axes = panels(plot_geometry.draw(runs, ["deformation", "radius"]), 2)
    assert axes.shape == (2, 3)
    assert len({ax.get_ylim() for ax in axes[1]}) == len({ax.get_ylim() for ax in axes[0]}) == 1
    assert axes[1, 0].get_ylim()[1] >= 1e6 > 1e3 > axes[0, 0].get_ylim()[1]
    assert len({ax.get_xlim() for ax in axes.flat}) == 1
    assert axes[0, 0].get_ylabel() == "deformation\n(degrees)"  # in the order that was asked for
    assert [ax.get_title() for ax in axes[0]] == [f"adamsrt, seed {seed}" for seed in range(3)]


def test_titles_name_what_differs(tmp_path):
    first = make(tmp_path / "a")
    sgd = make(tmp_path / "b", optimizer="sgd", learning_rate=0.1, weight_decay=0.00025)

    def titles(*directories):
        return plot_geometry.titles(plot_geometry.find_runs(directories))

    assert titles(first) == ["adamsrt"]
    assert titles(first, sgd, first) == ["adamsrt", "sgd"]
    again = make(tmp_path / "c", seed=1, learning_rate=0.01)
    assert titles(first, sgd, again) == [
        "adamsrt, seed 0, learning_rate 0.001",
        "sgd, seed 0",
        "adamsrt, seed 1, learning_rate 0.01",
    ]
    same = make(tmp_path / "d", optimizer="sgd", learning_rate=0.1, weight_decay=0.00025)
    assert titles(sgd, same) == [f"sgd, {sgd}", f"sgd, {same}"]
    wide = make(tmp_path / "e", optimizer="sgd", batch_size=64, precision="bfloat16", seed=2)
    figure = plot_geometry.draw(plot_geometry.find_runs([first, wide, again]))
    assert figure.axes[1].get_title() == "sgd, batch_size 64,\nprecision bfloat16, seed 2"
    figure = plot_geometry.draw(plot_geometry.find_runs([first, sgd]))
    assert figure.get_suptitle().replace("\n", " ") == (
        "resnet20 on digits, epochs 4, batch_size 32, precision float32, seed 0"
    )


def test_the_prediction_is_drawn_at_each_epochs_learning_rate(tmp_path):
    decays = {"adamw": 0.01, "sgd": 2.5e-4, "sgdmrt": 3e-5}
    shares = {"adamw": 0.1 / 1.9, "sgd": 1 / 1.9, "sgdmrt": 1}  # b1 and momentum 0.9
    for name in recipes.OF_THE_PAPER:
        run = make(tmp_path / name, optimizer=name, weight_decay=decays.get(name, 1e-3))
        edit(run / "metrics.jsonl", 3, learning_rate=1e-4)
    runs = plot_geometry.find_runs([tmp_path / name for name in recipes.OF_THE_PAPER])
    figure = plot_geometry.draw(runs, ["angle"])
    for ax, name in zip(figure.axes, recipes.OF_THE_PAPER, strict=True):
        lines = lines_of(ax)
        assert ("predicted" in lines) == (name in PREDICTED)
        if name in PREDICTED:
            rates = np.array([1e-3, 1e-3, 1e-4, 1e-3])
            expected = np.sqrt(2 * rates * decays[name] * shares[name])
            np.testing.assert_allclose(
                lines["predicted"].get_ydata(), expected, rtol=1e-6
            )  # float32
            assert lines["predicted"].is_dashed() and not lines["mean"].is_dashed()
    assert legend(figure)[1:] == ["mean over the layers", "predicted equilibrium"]


def legend(figure) -> list[str]:
    return [text.get_text().replace("\n", " ") for text in figure.legends[0].get_texts()]


def test_no_prediction_without_decay(tmp_path):
    run = make(tmp_path / "a", optimizer="sgd", weight_decay=0.0)
    figure = plot_geometry.draw(plot_geometry.find_runs([run]), ["angle"])
    assert "predicted" not in lines_of(figure.axes[0])
    assert legend(figure)[1:] == ["mean over the layers"]
    figure = plot_geometry.draw(plot_geometry.find_runs([run]), ["radius"])
    layers = "layers, from the first (conv1/kernel) to the last (blocks/0/conv2/kernel)"
    assert legend(figure) == [layers]
    make(tmp_path / "b", model="vgg16", layers=LAYERS[:1])
    figure = plot_geometry.draw(plot_geometry.find_runs([tmp_path]), ["radius"])
    assert legend(figure) == ["layers, from the first to the last"]


def test_a_run_without_a_single_momentum_has_a_note(tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", optimizer="sgd", momentum=False)]
    name = ["momentum_radial_fraction"]
    with_momentum, without = plot_geometry.draw(plot_geometry.find_runs(runs), name).axes
    assert len(with_momentum.lines) == 3 and not with_momentum.texts
    assert not without.lines and "no\nsingle momentum" in without.texts[0].get_text()
    figure = plot_geometry.draw(plot_geometry.find_runs(runs[1:]), name)
    plot_geometry.write_picture(tmp_path / "alone.png", figure)


def test_all_measures_can_be_drawn_and_no_others(tmp_path, capsys):
    run, output = make(tmp_path / "run"), tmp_path / "geometry.png"
    every = ",".join(plot_geometry.MEASURES)
    command = [str(run), "--output", str(output), "--measures"]
    assert plot_geometry.main([*command, every]) == 0
    for text, message in (("angle,angle", "angle is named twice"), ("angel", "unknown 'angel'")):
        with pytest.raises(SystemExit) as end:
            plot_geometry.main([*command, text])
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_an_epoch_whose_figures_were_lost_is_a_gap(tmp_path):
    run = make(tmp_path / "run")
    file = run / "geometry.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(['{"epoch": 1}', *lines[1:]]) + "\n")
    (read,) = plot_geometry.find_runs([run])
    assert read.layers == list(LAYERS) and "momentum_radial_fraction" in read.curves
    for curves in read.curves.values():
        assert all(np.isnan(curve[0]) and np.isfinite(curve[1]) for curve in curves.values())


def test_the_layers_of_a_stack_are_drawn_apart(tmp_path):
    run, (first, *_) = make(tmp_path / "run"), LAYERS
    for line in range(1, 5):
        figures = {
            f"{first}/{name}/mean": [line, 2 * line, None] for name in plot_geometry.MEASURES
        }
        edit(run / "geometry.jsonl", line, **figures)
    (read,) = plot_geometry.find_runs([run])
    assert [layer for layer in read.layers if layer.startswith(first)] == [
        f"{first}/{i}" for i in range(3)
    ]
    radii = read.curves["radius"]
    np.testing.assert_array_equal(radii[f"{first}/1"], [2, 4, 6, 8])
    assert np.isnan(radii[f"{first}/2"]).all()
    assert len(plot_geometry.draw([read]).axes[2].lines) == len(LAYERS) + 2


@pytest.mark.parametrize("value", [None, 0, -2.5, 1e38])
def test_figures_that_a_logarithm_cannot_show(value, tmp_path):
    run, names = make(tmp_path / "run"), LAYERS
    file = run / "geometry.jsonl"
    edit(file, 2, **{f"{names[0]}/turn_per_gradient/mean": value})
    (read,) = plot_geometry.find_runs([run])
    curve = read.curves["turn_per_gradient"][names[0]]
    assert np.isnan(curve[1]) if value is None else curve[1] == value
    figure = plot_geometry.draw([read])
    plot_geometry.write_picture(tmp_path / "a.png", figure)
    if value != 1e38:
        assert figure.axes[0].get_ylim()[0] > 1e-4  # the others are what the scale is for
    for line in range(1, 5):  # and where nothing else is there
        keys = [f"{name}/turn_per_gradient/mean" for name in names]
        edit(file, line, **dict.fromkeys(keys, value))
    figure = plot_geometry.draw(plot_geometry.find_runs([run]))
    plot_geometry.write_picture(tmp_path / "b.png", figure)


def test_a_logarithm_is_for_figures_of_different_sizes(tmp_path):
    run = make(tmp_path / "run")
    for line in range(1, 5):
        edit(run / "geometry.jsonl", line, **{f"{name}/radius/mean": line for name in LAYERS})
    assert plot_geometry.draw(plot_geometry.find_runs([run])).axes[2].get_yscale() == "linear"
    edit(run / "geometry.jsonl", 4, **{f"{LAYERS[0]}/radius/mean": 11})
    assert plot_geometry.draw(plot_geometry.find_runs([run])).axes[2].get_yscale() == "log"


def test_infinite_figures_are_gaps(tmp_path):
    run = make(tmp_path / "run")
    edit(run / "geometry.jsonl", 1, **{f"{LAYERS[0]}/angle/mean": float("inf")})  # Infinity in JSON
    (read,) = plot_geometry.find_runs([run])
    assert np.isnan(read.curves["angle"][LAYERS[0]]).tolist() == [True, False, False, False]


def test_a_run_under_way(tmp_path, capsys):
    run, output = make(tmp_path / "run", done=3), tmp_path / "geometry.png"
    geometry, metrics = run / "geometry.jsonl", run / "metrics.jsonl"
    whole = geometry.read_text()
    geometry.write_text(whole[:-20])  # torn
    (read,) = plot_geometry.find_runs([run])
    assert {len(c) for curves in read.curves.values() for c in curves.values()} == {2}
    geometry.write_text(whole)
    metrics.write_text(metrics.read_text().split("\n")[0] + "\n")  # which was to be written next
    figure = plot_geometry.draw(plot_geometry.find_runs([run]))
    (ax, *_) = figure.axes
    assert all(line.get_xdata().tolist() == [1] and line.get_marker() == "." for line in ax.lines)
    geometry.write_text("")
    assert plot_geometry.main([str(run), "--output", str(output)]) == 2
    assert capsys.readouterr() == (
        "",
        f"{run} has not finished an epoch: left out.\n"
        "plot_geometry.py: error: no run has finished an epoch\n",
    )
    assert not output.exists()


def test_text_is_drawn_as_it_is(tmp_path):
    for name in "ab":  # no formulas, and longer than a column
        make(
            tmp_path / name,
            dataset=rf"folder:/$\{name}$/" + "long" * 60,
            layers=(r"$\conv$", "conv/" + "kernel" * 30),
        )
    for directory in (tmp_path / "a", tmp_path):  # above all columns, above each
        figure = plot_geometry.draw(plot_geometry.find_runs([directory]))
        plot_geometry.write_picture(tmp_path / "geometry.png", figure)
        with Image.open(tmp_path / "geometry.png") as picture:
            assert picture.width == round(150 * figure.get_figwidth())


DAMAGES = {
    "arguments.json: damaged, unknown model 'resnet21'": (0, {"model": "resnet21"}),
    "arguments.json: damaged, unknown optimizer 'sdg'": (0, {"optimizer": "sdg"}),
    "arguments.json: damaged, weight_decay is not a finite number from 0": (
        0,
        {"weight_decay": "much"},
    ),
    "metrics.jsonl, line 2: damaged, learning_rate is not a finite number from 0": (
        2,
        {"learning_rate": -1},
    ),
    "geometry.jsonl, line 3: damaged, it is not of epoch 3": (3, {"epoch": 4}),
    "geometry.jsonl, line 4: damaged, conv1/kernel/angle/mean is not a number": (
        4,
        {"conv1/kernel/angle/mean": "1"},
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_files_are_named(message, tmp_path, capsys):
    make(tmp_path / "runs/whole", seed=1)
    run = make(tmp_path / "runs/damaged")
    line, changed = DAMAGES[message]
    edit(run / message.split(":")[0].split(",")[0], line or 1, **changed)
    assert_refused([tmp_path / "runs"], tmp_path / "geometry.png", f"{run}/{message}", capsys)


def assert_refused(directories, output, message, capsys):
    before = sorted(output.parent.rglob("*"))
    assert plot_geometry.main([*map(str, directories), "--output", str(output)]) == 2
    assert capsys.readouterr() == ("", f"plot_geometry.py: error: {message}\n")
    assert sorted(output.parent.rglob("*")) == before


def test_a_measure_that_a_line_lacks_is_named(tmp_path, capsys):
    run, output = make(tmp_path / "run"), tmp_path / "geometry.png"
    file = run / "geometry.jsonl"
    first, second, *rest = file.read_text().splitlines()
    second = second.replace(f"{LAYERS[1]}/radius/mean", "radius")
    file.write_text("\n".join([first, second, *rest]))
    message = f"{file}, line 2: damaged, {LAYERS[1]}/radius/mean is not a number"
    assert_refused([run], output, message, capsys)


def test_runs_with_geometry_are_compared_with_those_without(tmp_path):
    runs = make(tmp_path / "a"), make_run(tmp_path / "b", seed=1)
    (group,) = compare_runs.group_runs(compare_runs.find_runs(runs))
    assert [run.seed for run in group] == [0, 1]
