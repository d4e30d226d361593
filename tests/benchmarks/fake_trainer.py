"""Takes the trainer's place and trains in a moment: writes what the trainer writes.

FAIL is "OPTIMIZER:SEED:EXIT_CODE", where a negative code is a signal. SLOW is
"OPTIMIZER:SEED:SECONDS", the pause after each epoch. The calls are noted in calls.txt beside this
file.
"""

import argparse
import json
import os
import signal
import sys
import time
import zlib
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("dataset", "model", "optimizer", "precision", "data_dir"):
        parser.add_argument(f"--{name}")
    for name in ("epochs", "batch_size", "seed", "seeds"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    with Path(__file__).with_name("calls.txt").open("a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        seeds = range(args.seed, args.seed + args.seeds)
        return int(any([not train(args, seed) for seed in seeds]))  # all, failed or not
    except KeyboardInterrupt:
        return 130


def train(args: argparse.Namespace, seed: int) -> bool:
    run = args.output / f"seed-{seed}" if args.seeds > 1 else args.output
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "1").write_text("large")
    fail, fail_seed, code = (os.environ.get("FAIL") or "none:0:0").split(":")
    if args.optimizer == fail and seed == int(fail_seed):
        if int(code) < 0:
            os.kill(os.getpid(), -int(code))
        if int(code) not in (0, 1):
            sys.exit(int(code))
        return int(code) == 0
    done = 0
    if (run / "metrics.jsonl").exists():
        assert args.resume
        done = len((run / "metrics.jsonl").read_text().splitlines())
    slow, slow_seed, seconds = (os.environ.get("SLOW") or "none:0:0").split(":")
    for epoch in range(done + 1, args.epochs + 1):
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps({"epoch": epoch, "valid_accuracy": 0.5}) + "\n")
        if args.optimizer == slow and seed == int(slow_seed):
            time.sleep(float(seconds))
    names = ("dataset", "model", "optimizer", "epochs", "batch_size", "precision")
    arguments = {name: getattr(args, name) for name in names}
    digest = zlib.crc32(repr((arguments, seed)).encode())
    summary = {
        "test_accuracy": 0.9 + digest % 1000 / 1e4,
        "test_loss": 0.1,
        "best_epoch": 1,
        "images_per_second": 100.0,
        "compile_seconds": 2.0,
        "seconds": 9.0,
        "seeds_at_once": 1,
        "arguments": {**arguments, "seed": seed},
        "versions": {"python": "3.11"},
        "device": "none",
        "git_revision": "abc",
    }
    (run / "summary.tmp").write_text(json.dumps(summary))
    os.replace(run / "summary.tmp", run / "summary.json")
    return True


if __name__ == "__main__":
    sys.exit(main())
