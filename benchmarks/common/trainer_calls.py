"""A trainer as a process of its own: its lock, its signals, and how it ended.

JAX is never started in the process that calls, so that no run can take the others down with it and
the device is free between them.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

EXIT_CODES: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}
PATIENCE = 60  # seconds in which the trainer should end by itself after Ctrl-C


@contextmanager
def noted_signals() -> Generator[list[int], None, None]:
    """Makes Ctrl-C and SIGTERM do nothing but add themselves to the list that it yields."""
    received: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)

    previous = {signum: signal.signal(signum, note) for signum in EXIT_CODES}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def locked(home: Path, received: Sequence[int]) -> Generator[int, None, None]:
    """Waits for the lock of a directory and holds it; a signal ends the waiting.

    The trainer inherits the lock. If it outlives its killed parent, the next command waits for its
    end instead of starting a second one on the same files.

    Args:
      home: the directory of the lock; is made.
      received: gains an element with a signal.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = os.open(home / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not take(lock):
            print(f"waiting for another process that works in {home}", flush=True)
            while not received and not take(lock):
                time.sleep(0.1)
        yield lock
    finally:
        os.close(lock)


def take(lock: int) -> bool:
    """Takes the lock of an open file, unless another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def call(command: Sequence[str], lock: int, received: list[int]) -> int:
    """Runs a trainer to its end and returns its exit code, or minus the signal that killed it.

    A terminal sends Ctrl-C to the trainer as well, which then ends by itself. SIGTERM is handed on;
    it also follows a Ctrl-C that did not reach the trainer. `received` gains the signal that only
    the trainer got, and ended by.
    """
    trainer = subprocess.Popen(command, pass_fds=[lock])
    waited = 0.0
    while trainer.poll() is None and signal.SIGTERM not in received and waited < PATIENCE:
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(timeout=0.1)
        waited += 0.1 if received else 0
    if trainer.poll() is None:
        trainer.terminate()
    code = trainer.wait()
    received += [signum for signum in EXIT_CODES if code in (EXIT_CODES[signum], -signum)]
    return code


def ending(code: int) -> str:
    """How a trainer that left no result ended, in words."""
    if code < 0:
        return f"killed by signal {-code} ({signal.strsignal(-code)})"
    return f"exit code {code}" if code else "exit code 0 without the results of all seeds"
