"""Ctrl-C and SIGTERM: at once, or at the next point where a run can be cut and continued."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

NUMBERS = (signal.SIGINT, signal.SIGTERM)


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
      raised: whether an exception was raised for it.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.requested = 0
        self.raised = False

    @contextmanager
    def defer(self) -> Generator[None, None, None]:
        """Defers a signal within the context."""
        before, self.deferred = self.deferred, True
        try:
            yield
        finally:
            self.deferred = before

    @contextmanager
    def held(self) -> Generator[None, None, None]:
        """Holds signals back to the end of the context, for imports.

        An exception that is raised inside the import of compiled code may crash the process.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)

    def check(self) -> None:
        """Raises `Stopped` if a signal has come whose exception got lost, unless it is deferred."""
        if self.requested and not self.deferred:
            raise Stopped(self.requested, at_once=True)

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Raises `Stopped`, or notes a signal that is to be deferred; Ctrl-C is only once."""
        if not self.deferred or (self.requested and signum == signal.SIGINT):
            self.requested = self.requested or signum
            self.raised = True
            raise Stopped(signum, at_once=True)
        first, self.requested = not self.requested, self.requested or signum
        if first and signum == signal.SIGINT:
            # Not `print`: a handler may run in the middle of another print.
            os.write(2, b"\nstopping at the next step; Ctrl-C again stops at once\n")


@contextmanager
def stop_signals() -> Generator[StopSignals, None, None]:
    """Handles SIGINT and SIGTERM within the context.

    Raises:
      Stopped: also for an error after a signal: some code makes an error of its own of what is
        raised inside it, an ImportError for example.
    """
    signals = StopSignals()
    previous = [signal.signal(number, signals.handle) for number in NUMBERS]
    with _raised_again(signals):
        try:
            yield signals
        except Exception as error:
            if signals.raised:
                raise Stopped(signals.requested, at_once=True) from error
            raise
        finally:
            for number, handler in zip(NUMBERS, previous, strict=True):
                signal.signal(number, handler)


@contextmanager
def _raised_again(signals: StopSignals) -> Generator[None, None, None]:
    """Raises `Stopped` again after Python has ignored it, in the garbage collection for example."""
    hook = sys.unraisablehook

    def again(ignored: sys.UnraisableHookArgs) -> None:
        if isinstance(ignored.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # when the ignoring code has returned
        else:
            hook(ignored)

    def on_alarm(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signals.requested, at_once=True)

    sys.unraisablehook = again
    previous = signal.signal(signal.SIGALRM, on_alarm)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        sys.unraisablehook = hook
