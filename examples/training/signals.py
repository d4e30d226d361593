"""Ctrl-C and SIGTERM: at once, or at the next point where a run can be cut and continued."""

import os
import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A signal asked for the end; as KeyboardInterrupt, it is not an `Exception`."""

    def __init__(self, signum: int, *, at_once: bool):
        super().__init__(signum)
        self.signum = signum
        self.at_once = at_once  # else at a step, where every process stops


class StopSignals:
    """What the handler does, and what it has seen.

    Attributes:
      deferred: while it is set, a signal is only noted in `requested`.
      requested: the number of the first signal that came, or 0. A request is safer than an
        exception, which gets lost where compiled code calls Python back.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested = 0

    @contextmanager
    def defer(self) -> Generator[None, None, None]:
        """Defers a signal within the context."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    def check(self) -> None:
        """Raises `Stopped` if a signal has come whose exception got lost, unless it is deferred."""
        if self.requested and not self.deferred:
            raise Stopped(self.requested, at_once=True)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Raises `Stopped`, or notes a signal that is to be deferred; Ctrl-C is only once."""
        if not self.deferred or (self.requested and signum == signal.SIGINT):
            self.requested = self.requested or signum
            raise Stopped(signum, at_once=True)
        first, self.requested = not self.requested, self.requested or signum
        if first and signum == signal.SIGINT:
            # Not `print`: a handler may run in the middle of another print.
            os.write(2, b"\nstopping at the next step; Ctrl-C again stops at once\n")


@contextmanager
def stop_signals() -> Generator[StopSignals, None, None]:
    """Handles SIGINT and SIGTERM within the context."""
    signals = StopSignals()
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signals.handle) for number in numbers]
    try:
        yield signals
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
