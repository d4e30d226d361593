"""Twenty minutes of training use no more memory, files and programs than the first ones did.

With `-m long`; SOAK_MINUTES takes the place of the 20, and what was sampled is left in the output.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import train_lm
from test_processes import COMMAND, FAST

MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
WARM_UP = 0.25  # of the samples: allocators and caches fill first
# KiB that each line of figures may add: itself, as it is kept to the end in several copies, and for
# text, which saves at each line, what tensorstore (0.1.86) loses then: 200 bytes with each
# `Spec.to_json()`, of which Orbax makes several for each array. Epochs of images outrun the saves.
LINE = {"images": 10, "text": 60}
COMMANDS = {
    "images": f"{COMMAND} --epochs 1000000 --batch_size 8 --geometry --tensorboard",
    "text": f"{train_lm.__file__} --steps 100000000 --eval_every 20 --width 32 --heads 2 --geometry"
    " --context 32",
}


class Sample(NamedTuple):
    seconds: float
    megabytes: float  # resident
    files: int
    programs: int  # compiled so far


def sample(process: subprocess.Popen, log: Path, seconds: float) -> Sample:
    home = Path("/proc") / str(process.pid)
    pages = int((home / "statm").read_text().split()[1])
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    programs = log.read_text(errors="replace").count("Finished XLA compilation")
    return Sample(seconds, megabytes, len(list((home / "fd").iterdir())), programs)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_grows(command, tmp_path):
    log = tmp_path / "log"
    arguments = f"{COMMANDS[command]} --output {tmp_path / 'run'}".split()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=stream,
            env=os.environ | FAST | {"JAX_LOG_COMPILES": "1"},
        )
    samples, began = [], time.monotonic()
    while (seconds := time.monotonic() - began) < 60 * MINUTES:
        assert process.poll() is None, log.read_text()
        samples.append(sample(process, log, seconds))
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    rows = [sample._asdict() for sample in samples]
    (tmp_path / "samples.json").write_text(json.dumps(rows))

    lines = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    warm = np.array(samples[int(WARM_UP * len(samples)) :])
    seconds, megabytes, files, programs = warm.T
    half = len(files) // 2  # while a checkpoint is written there are more
    assert files[half:].min() <= files[:half].min()
    assert programs[-1] == programs[0] > 0
    (slope, _), covariance = np.polyfit(seconds, megabytes, 1, cov=True)
    print(
        f"{command}: {megabytes.mean():.0f} MiB, {60 * slope:+.3f} ± "
        f"{60 * np.sqrt(covariance[0, 0]):.3f} MiB a minute, {files.max():.0f} files, "
        f"{programs[-1]:.0f} programs, {lines} epochs, {len(samples)} samples"
    )
    # Neighbouring samples are alike, so that the regression's own deviation is too small: what is
    # allowed beside the figures is a growth below the scatter about the line, or 1 %.
    scatter = (megabytes - np.polyval([slope, megabytes.mean()], seconds - seconds.mean())).std()
    growth = slope * (seconds[-1] - seconds[0])
    kept = lines * LINE[command] / 2**10 * (1 - WARM_UP)
    assert growth < kept + max(3 * scatter, 0.01 * megabytes.mean())
