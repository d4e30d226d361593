"""Training over several processes, each with its own devices."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.command import Refused
from training.signals import StopSignals

T = TypeVar("T")
PATIENCE = 300  # seconds in which the processes should find each other


class JoinError(Refused):
    """The processes cannot find each other; the message says why."""


def join(coordinator: str, count: int | None, index: int | None) -> None:
    """Join this process to the others; called before JAX is used.

    Args:
      coordinator: HOST:PORT of process 0; or "auto", where SLURM, Open MPI, Kubernetes or a TPU pod
        gives all three.
      count: number of processes.
      index: of this process, from 0.

    Raises:
      JoinError: the cluster is not recognised, the port is taken, or the others do not answer.
    """
    # It would take SIGTERM from us, and has no place for a stop between two scans.
    jax.config.update("jax_enable_preemption_service", False)
    # Later than `PATIENCE`, since JAX ends the process where it runs out.
    initialize = partial(jax.distributed.initialize, initialization_timeout=2 * PATIENCE)
    where = "at the cluster's coordinator"
    if coordinator != "auto":
        _check_address(coordinator, serves=index == 0)
        initialize = partial(initialize, coordinator, count, index)
        where = f"at {coordinator}"
    errors: list[Exception] = []

    def begin() -> None:
        try:
            initialize()
        except (ValueError, RuntimeError) as error:
            errors.append(error)

    # In a thread, because it waits in compiled code, which is deaf to signals.
    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while thread.is_alive() and time.monotonic() < end:
        thread.join(0.1)
    if thread.is_alive():
        raise JoinError(f"the processes did not find each other {where} within {PATIENCE} seconds")
    for error in errors:
        if coordinator == "auto" and isinstance(error, ValueError):
            raise JoinError("--coordinator auto finds no cluster that JAX knows here") from error
        raise JoinError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


def _check_address(coordinator: str, *, serves: bool) -> None:
    """Refuse a host without an address, and where this process serves, a port that is taken."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
        if serves:  # on all addresses, as JAX does
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            socket.create_server(("", int(port)), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise JoinError(f"--coordinator {coordinator}: {reason}") from error


def leads() -> bool:
    """Whether this is the process that prints, and that writes metrics and pictures."""
    return jax.process_index() == 0


def in_turn(load: Callable[[], T]) -> T:
    """Call `load` in the leading process first: what it downloads need not be fetched twice."""
    if jax.process_count() == 1:
        return load()
    if leads():
        result = load()
        multihost_utils.sync_global_devices("loaded")
        return result
    multihost_utils.sync_global_devices("loaded")
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        return load()  # one process's progress is enough


def make_stop(signals: StopSignals) -> Callable[[], bool]:
    """What `loop.fit` asks before each step: whether a signal asked to stop there.

    Several processes must stop at the same step, so each is told what any of them was asked.
    """
    if jax.process_count() == 1:
        return lambda: signals.requested != 0

    def agreed() -> bool:
        requests = multihost_utils.process_allgather(np.int32(signals.requested))
        signals.requested = signals.requested or int(requests.max())
        return signals.requested != 0

    return agreed
