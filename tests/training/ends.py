"""What two runs that should be the same are compared by."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp


def figures(output: Path) -> tuple:
    """What does not depend on the clock."""
    summary = json.loads((output / "summary.json").read_text())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in (summary, *lines):
        for name in [name for name in line if name.endswith("_per_second")]:
            del line[name]
    of_clock_and_place = ("seconds", "compile_seconds", "versions", "device", "git_revision")
    return {k: v for k, v in summary.items() if k not in of_clock_and_place}, lines


def last_arrays(output: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint, read by Orbax alone."""
    newest = max((p for p in (output / "checkpoints").iterdir()), key=lambda p: int(p.name))
    tree = ocp.StandardCheckpointer().restore((newest / "arrays").absolute())
    return {
        jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(tree)
    }


def assert_same_end(output: Path, whole: Path) -> None:
    assert figures(output) == figures(whole)
    geometry = [directory / "geometry.jsonl" for directory in (output, whole)]
    assert geometry[0].exists() == geometry[1].exists()
    if geometry[0].exists():
        assert geometry[0].read_bytes() == geometry[1].read_bytes()
    found, expected = last_arrays(output), last_arrays(whole)
    assert found.keys() == expected.keys() and any("opt_state" in name for name in found)
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
