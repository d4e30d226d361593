"""Training over several processes, each with its own devices."""

import os
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.command import Refused
from training.signals import StopSignals

T = TypeVar("T")


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
      JoinError: the cluster is not recognised, or the others do not answer.
    """
    # It would take SIGTERM from us, and has no place for a stop between two scans.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if coordinator == "auto":
            jax.distributed.initialize()
        else:
            jax.distributed.initialize(coordinator, count, index)
    except (ValueError, RuntimeError) as error:
        if coordinator == "auto" and isinstance(error, ValueError):
            raise JoinError("--coordinator auto finds no cluster that JAX knows here") from error
        raise JoinError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


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
