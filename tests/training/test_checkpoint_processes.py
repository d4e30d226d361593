"""Saving in processes that are killed, have no room, or share a checkpoint."""

import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from made_checkpoints import make_checkpoints, read_newest, step_names
from training import checkpoints

EXAMPLES = Path(checkpoints.__file__).parents[1]


def run_python(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(EXAMPLES)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


FAILING = """
import resource, sys
from pathlib import Path
import jax
from training import checkpoints

arrays = [jax.random.normal(jax.random.key(i), (20_000,)) for i in range(50)]
managers = [checkpoints.open_checkpoints(Path(directory)) for directory in sys.argv[1:]]
for manager in managers:
    checkpoints.save(manager, 1, arrays, {})
    manager.wait_until_finished()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for manager, raising in zip(managers, ("save", "close")):
    checkpoints.save(manager, 2, arrays, {})
    try:
        if raising == "save":
            checkpoints.save(manager, 3, arrays, {})
        else:
            checkpoints.close(manager)
    except OSError as error:
        print(error)
    checkpoints.close(manager)
    print(checkpoints.open_checkpoints(Path(manager.directory)).all_steps())
"""


def test_a_save_that_fails_in_the_background_is_one_sentence(tmp_path):
    directories = tmp_path / "a", tmp_path / "b"
    out, err = run_python(FAILING, *directories).communicate(timeout=60)
    assert err == ""
    assert out.splitlines() == [
        line
        for directory in directories
        for line in (f"cannot save a checkpoint in {directory}: File too large", "[1]")
    ]


SAVING = """
import sys
from pathlib import Path
import jax.numpy as jnp
from training import checkpoints

manager = checkpoints.open_checkpoints(Path(sys.argv[1]))
small = lambda step: {"small": jnp.full(3, step), "large": jnp.arange(2000.0) * step}
restored = checkpoints.restore(manager, small(0), warn=sys.exit)
step = restored[1]["step"] if restored else 0
while True:
    step += 1
    checkpoints.save(manager, step, small(step), {"step": step})
    print(step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_last_finished_save(tmp_path):
    wait = random.Random(0)
    newest = 0
    for _ in range(2):
        with run_python(SAVING, tmp_path) as process:
            assert process.stdout is not None and process.stderr is not None
            lines = [process.stdout.readline(), process.stdout.readline()]
            assert all(lines), process.stderr.read()
            time.sleep(wait.uniform(0, 0.3))
            process.kill()
            steps = [int(line) for line in [*lines, *process.stdout]]
        assert steps == list(range(newest + 1, newest + 1 + len(steps)))
        newest = read_newest(tmp_path)
        # A save waits for the one before, and the next may be finished but not yet reported.
        assert newest in (steps[-1] - 1, steps[-1], steps[-1] + 1)
    make_checkpoints(tmp_path, [newest + 1])
    assert step_names(tmp_path) == sorted([str(newest), str(newest + 1)])


PROCESS = """
import os, sys
from pathlib import Path
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

address, process, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(address, 2, process)
from training import checkpoints

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

def arrays(step):
    numbers = step * np.arange(24.0, dtype=np.float32).reshape(8, 3)
    return {
        "replicated": jax.device_put(numbers, NamedSharding(mesh, P())),
        "sharded": jax.make_array_from_callback(
            (8, 3), NamedSharding(mesh, P("data")), lambda index: numbers[index]
        ),
    }

sentences = []

def check(step):
    manager = checkpoints.open_checkpoints(directory)
    restored, progress = checkpoints.restore(manager, arrays(0), warn=sentences.append)
    assert progress == {"step": step, "process": 0}, progress
    for name, wanted in arrays(step).items():
        assert restored[name].sharding == wanted.sharding
        for a, b in zip(restored[name].addressable_shards, wanted.addressable_shards):
            np.testing.assert_array_equal(a.data, b.data)
    return manager

manager = checkpoints.open_checkpoints(directory)
for step in (1, 2, 3):
    checkpoints.save(manager, step, arrays(step), {"step": step, "process": process})
checkpoints.close(manager)
checkpoints.close(check(3))
if process == 0:
    os.truncate(directory / "3" / "arrays" / "ocdbt.process_1" / "manifest.ocdbt", 9)
multihost_utils.sync_global_devices("truncated")
manager = check(2)
assert len(sentences) == (process == 0), sentences
checkpoints.save(manager, 3, arrays(3), {"step": 3, "process": process})
checkpoints.close(manager)
checkpoints.close(check(3))
"""


def test_two_processes_save_and_agree_on_what_they_restore(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [run_python(PROCESS, address, i, tmp_path / "run") for i in range(2)]
    try:
        for process in processes:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    finally:  # one waits for the other
        for process in processes:
            process.kill()
    assert step_names(tmp_path / "run") == ["2", "3"]
